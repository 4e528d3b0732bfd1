"""Construction of a component from a configuration created in Python."""

from __future__ import annotations

from typing import Any

from scoredist3d import registry
from scoredist3d.config.errors import ConfigError
from scoredist3d.config.fields import ComponentConfig
from scoredist3d.config.walker import parse_block


def build(config: ComponentConfig, **runtime: Any) -> Any:
    """Check a component's configuration and construct the component.

    Args:
        config: The ``Config`` of a registered class, e.g. ``SDS.Config(guidance_scale=20)``.
        **runtime: Arguments of the constructor besides ``config``; :data:`scoredist3d.registry.ARGUMENTS` lists them
            for each kind.

    Raises:
        ConfigError: A value in ``config`` is invalid, or its values contradict each other.
        TypeError: A required argument of the constructor is missing, or the constructor does not accept an argument.
    """
    if not isinstance(config, ComponentConfig):
        raise ConfigError(f"build needs the Config of a component, such as SDS.Config(), got {type(config).__name__}")
    return registry.build(parse_block(type(config), config), **runtime)

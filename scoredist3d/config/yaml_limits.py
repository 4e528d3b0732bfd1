"""Limits of configuration files, which are checked before OmegaConf copies their content."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from scoredist3d.config.errors import ConfigError
from scoredist3d.limits import MAX_CONFIG_BYTES, MAX_CONFIG_VALUES, check_file_size


def check_yaml_file(file: Path) -> None:
    """Check the size of a configuration file, also after the expansion of its aliases.

    An alias (``*name``) repeats the value of an anchor (``&name``). Nested aliases multiply, so that a file of a few
    hundred bytes can stand for more values than fit into memory.

    Raises:
        ConfigError: The file is too large.
        yaml.YAMLError: It is not valid YAML.
    """
    try:
        check_file_size(file, MAX_CONFIG_BYTES, "a configuration")
    except ValueError as error:
        raise ConfigError(str(error)) from None
    text = file.read_bytes()
    if b"&" not in text:
        return
    count = _expanded(yaml.compose(text, Loader=yaml.SafeLoader), {})
    if count > MAX_CONFIG_VALUES:
        raise ConfigError(f"{file}: its aliases expand to more than {MAX_CONFIG_VALUES:,} values; write fewer of them")


def _expanded(node: Any, counts: dict[int, int]) -> int:
    """Number of values of a node with its aliases expanded; one that contains itself counts as too large."""
    if id(node) not in counts:
        counts[id(node)] = MAX_CONFIG_VALUES + 1  # until it is known
        children = node.value if isinstance(node, yaml.CollectionNode) else []
        parts = [part for child in children for part in (child if isinstance(child, tuple) else (child,))]
        counts[id(node)] = 1 + sum(_expanded(part, counts) for part in parts)
    return counts[id(node)]

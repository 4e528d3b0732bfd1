"""Typed configuration: fields, schedules, merging of YAML files, validation.

Importing this package has no side effects outside it.
"""

from scoredist3d.config import walker as walker  # sets the function that parses blocks
from scoredist3d.config.errors import ConfigError, FieldError, under
from scoredist3d.config.fields import Block, ComponentConfig, component, component_map, option
from scoredist3d.config.schedule import Schedule

__all__ = [
    "Block",
    "ComponentConfig",
    "ConfigError",
    "FieldError",
    "Schedule",
    "component",
    "component_map",
    "option",
    "under",
]

"""Typed configuration: fields, schedules, layers of YAML, validation. Nothing here has side effects."""

from scoredist3d.config.fields import ComponentConfig, ConfigError, component, component_map, option
from scoredist3d.config.schedule import Schedule

__all__ = ["ComponentConfig", "ConfigError", "Schedule", "component", "component_map", "option"]

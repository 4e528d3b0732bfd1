"""Conversion between plain dictionaries and typed configuration.

The parser, :mod:`scoredist3d.config.walker`, collects all mistakes and raises one error with one line for each of them,
so that a config can be corrected in one pass.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from scoredist3d.config.coercion import NUMBER
from scoredist3d.config.errors import join_path
from scoredist3d.config.experiment import ExperimentConfig
from scoredist3d.config.fields import MISSING, ComponentConfig
from scoredist3d.config.interpolation import escape_interpolations, resolve
from scoredist3d.config.loader import layers_of_text, merge, merge_layers
from scoredist3d.config.schedule import Schedule
from scoredist3d.config.walker import Walker, default_value, own_fields, parse_block
from scoredist3d.paths import find_shipped

ConfigT = TypeVar("ConfigT")


def validate(plain: dict[str, Any]) -> ExperimentConfig:
    """The typed configuration of the run that a merged and resolved dictionary describes.

    Raises:
        ConfigError: There are unknown or missing keys, wrong types, values out of range, unknown component names or
            violated relations; the message lists all of them, one line each, starting with the key's path.
    """
    return parse(ExperimentConfig, plain)


def load_experiment(files: Sequence[str | Path], overrides: Sequence[str] = ()) -> ExperimentConfig:
    """The typed configuration that files and overrides describe; see :func:`resolve_run` for interpolations.

    Raises:
        ConfigError: As for :func:`scoredist3d.config.loader.load` and :func:`validate`.
    """
    return load_plain(merge_layers(files, overrides))


def load_text(text: str) -> ExperimentConfig:
    """The typed configuration in the text of a complete config file; for errors, see :func:`load_experiment`."""
    return load_plain(layers_of_text(text))


def load_plain(merged: dict[str, Any]) -> ExperimentConfig:
    """The typed configuration that merged layers, before interpolation, describe; see :func:`load_experiment`."""
    return validate(resolve_run(merged))


def resolve_run(merged: dict[str, Any]) -> dict[str, Any]:
    """Merged layers with interpolations resolved; absent keys of blocks that are not components get their defaults.

    If ``trainer.schedule_steps`` is set, ``${trainer.max_steps}`` is resolved to the value of that key.

    Raises:
        ConfigError: An interpolation refers to a key that does not exist.
    """
    fields = [field for field in own_fields(ExperimentConfig) if "component" not in field.metadata]
    values = {field.name: default_value(field) for field in fields}
    defaults = {name: dump(value) for name, value in values.items() if value is not MISSING}
    layers = merge(defaults, merged)
    plain = resolve(layers)
    trainer = plain["trainer"]
    steps = trainer.get("schedule_steps") if isinstance(trainer, dict) else None
    if steps is None or steps == trainer["max_steps"]:
        return plain
    plain = resolve(merge(layers, {"trainer": {"max_steps": steps}}))
    return merge(plain, {"trainer": {"max_steps": trainer["max_steps"]}})  # type: ignore[no-any-return]


def missing_files(config: Any, path: str = "") -> list[str]:
    """One line for each file that is named in a configuration but does not exist.

    :func:`validate` does not check whether files exist, so a config can be validated on a machine that lacks them.
    """
    problems: list[str] = []
    for field in own_fields(type(config)):
        value, here = getattr(config, field.name), join_path(path, field.name)
        if field.metadata.get("file") and value is not None:
            if find_shipped(value) is None:
                problems.append(f"{here}: there is no file {value} (relative paths are searched in {Path.cwd()})")
        elif isinstance(value, dict):
            blocks = {name: block for name, block in value.items() if dataclasses.is_dataclass(block)}
            for name, block in blocks.items():
                problems += missing_files(block, join_path(here, name))
        elif dataclasses.is_dataclass(value) and not isinstance(value, Schedule):
            problems += missing_files(value, here)
    return problems


def parse(cls: type[ConfigT], plain: dict[str, Any]) -> ConfigT:
    """An instance of the configuration dataclass ``cls`` from a plain dictionary; for errors, see :func:`validate`."""
    config: ConfigT = parse_block(cls, plain)
    return config


def parse_component(kind: str, plain: dict[str, Any]) -> Any:
    """The config of one component for ``registry.build``, as in ``parse_component("prior", {"type": "diffusers"})``.

    Raises:
        ConfigError: As for :func:`validate`.
    """
    walker = Walker()
    return walker.finished(walker.component(kind, plain, None, kind))


def dump(config: Any) -> Any:
    """``config`` as plain dicts, lists and scalars, which :func:`validate` converts to an equal configuration."""
    if isinstance(config, Schedule):
        return config.to_config()
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        block = {"type": config.type} if isinstance(config, ComponentConfig) and config.type else {}
        names = [field.name for field in dataclasses.fields(config) if field.init]
        return {**block, **{name: dump(getattr(config, name)) for name in names}}
    if isinstance(config, dict):
        return {key: dump(value) for key, value in config.items()}
    if isinstance(config, (list, tuple)):
        return [dump(item) for item in config]
    return config


def to_yaml(config: Any) -> str:
    """``config`` as the text of a complete config file, which is saved with a run and printed by ``--dry-run``."""
    return yaml.dump(_escape(dump(config)), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def layers_to_yaml(merged: dict[str, Any]) -> str:
    """Merged layers as the text of a config file, with unresolved interpolations.

    A resumed run reads this file, so an override of a value also changes all values that refer to it.
    """
    return yaml.dump(merged, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


class _Dumper(yaml.SafeDumper):
    """YAML dumper that writes lists of scalars on one line and quotes strings that look like numbers."""


def _represent_list(dumper: _Dumper, items: list[Any]) -> yaml.Node:
    nested = any(isinstance(item, (list, dict)) for item in items)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=not nested)


def _represent_text(dumper: _Dumper, text: str) -> yaml.Node:
    # PyYAML writes the string 1e-3 without quotes, but the loader reads 1e-3 as a number, as in YAML 1.2.
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="'" if NUMBER.fullmatch(text) else None)


_Dumper.add_representer(list, _represent_list)
_Dumper.add_representer(str, _represent_text)


def _escape(value: Any) -> Any:
    """``value`` with ``${`` escaped in every string, so that loading the file returns the string unchanged."""
    if isinstance(value, dict):
        return {key: _escape(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_escape(item) for item in value]
    return escape_interpolations(value) if isinstance(value, str) else value

"""Plain dictionaries become typed configuration, and back.

The validator walks the dictionary along the dataclasses beside the classes that it names (``type: sds`` leads to
``ScoreDistillationSampling.Config`` through the registry), down to the last leaf. It gathers every mistake before it
gives up, one line each, so that a config is corrected in one go.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from scoredist3d import registry
from scoredist3d.config.coercion import NUMBER, Problem, parse_leaf, shown
from scoredist3d.config.experiment import ExperimentConfig
from scoredist3d.config.fields import MISSING, ComponentConfig, ConfigError, accepted_type, field_types
from scoredist3d.config.loader import MISSING_MARK, escape_interpolations, is_bare, merge, merge_layers, resolve
from scoredist3d.config.schedule import Schedule
from scoredist3d.paths import find_shipped

ConfigT = TypeVar("ConfigT")


def validate(plain: dict[str, Any]) -> ExperimentConfig:
    """The typed run that a merged and resolved dictionary describes.

    Raises:
        ConfigError: Unknown keys, wrong types, values out of range, unknown component names, missing keys or relations
            that do not hold; all of them, one line each, starting with the key's path.
    """
    return parse(ExperimentConfig, plain)


def load_experiment(files: Sequence[str | Path], overrides: Sequence[str] = ()) -> ExperimentConfig:
    """Files and overrides to a typed run; see :func:`resolve_run` for interpolations.

    Raises:
        ConfigError: As :func:`scoredist3d.config.loader.load` and :func:`validate`.
    """
    return load_plain(merge_layers(files, overrides))


def load_plain(merged: dict[str, Any]) -> ExperimentConfig:
    """Merged layers to a typed run; see :func:`load_experiment`."""
    return validate(resolve_run(merged))


def resolve_run(merged: dict[str, Any]) -> dict[str, Any]:
    """Merged layers with every interpolation replaced, over the defaults of the blocks that are no components.

    ``${trainer.max_steps}`` stands for ``trainer.schedule_steps`` where that is set.

    Raises:
        ConfigError: An interpolation leads nowhere.
    """
    fields = [field for field in own_fields(ExperimentConfig) if "component" not in field.metadata]
    defaults = {field.name: dump(_default(field, None)) for field in fields if _default(field, None) is not MISSING}
    layers = merge(defaults, merged)
    plain = resolve(layers)
    trainer = plain["trainer"]
    steps = trainer.get("schedule_steps") if isinstance(trainer, dict) else None
    if steps is None or steps == trainer["max_steps"]:
        return plain
    plain = resolve(merge(layers, {"trainer": {"max_steps": steps}}))
    return merge(plain, {"trainer": {"max_steps": trainer["max_steps"]}})  # type: ignore[no-any-return]


def missing_files(config: Any, path: str = "") -> list[str]:
    """One line for each file that a configuration names and that does not exist.

    Validation itself leaves the disk alone, so that a config can be checked on another machine.
    """
    problems: list[str] = []
    for field in own_fields(type(config)):
        value, here = getattr(config, field.name), _join(path, field.name)
        if field.metadata.get("file") and value is not None:
            if find_shipped(value) is None:
                problems.append(f"{here}: there is no file {value} (relative paths start at {Path.cwd()})")
        elif isinstance(value, dict):
            blocks = {name: block for name, block in value.items() if dataclasses.is_dataclass(block)}
            for name, block in blocks.items():
                problems += missing_files(block, _join(here, name))
        elif dataclasses.is_dataclass(value) and not isinstance(value, Schedule):
            problems += missing_files(value, here)
    return problems


def parse(cls: type[ConfigT], plain: dict[str, Any]) -> ConfigT:
    """Like :func:`validate` for any configuration dataclass, for use outside a run."""
    walker = _Walker()
    config = walker.dataclass(cls, plain, "")
    problems = walker.all_problems()
    if problems:
        raise ConfigError("\n".join(problems))
    return config  # type: ignore[return-value]


def parse_component(kind: str, plain: dict[str, Any]) -> Any:
    """The config of one component, ready for ``registry.build``: ``parse_component("prior", {"type": "diffusers"})``.

    Raises:
        ConfigError: As :func:`validate`.
    """
    walker = _Walker()
    config = walker.component(kind, plain, None, kind)
    problems = walker.all_problems()
    if problems:
        raise ConfigError("\n".join(problems))
    return config


def dump(config: Any) -> Any:
    """Plain dicts, lists and scalars that :func:`validate` turns into an equal configuration."""
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
    """The text of a config file that runs again by itself; what is saved with a run and printed by ``--dry-run``."""
    return yaml.dump(_escape(dump(config)), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def layers_to_yaml(merged: dict[str, Any]) -> str:
    """Merged layers as a config file, interpolations kept: what a resumed run starts from, so that overriding a value
    also moves what was written in terms of it."""
    return yaml.dump(merged, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


class _Dumper(yaml.SafeDumper):
    """Lists of plain values on one line, text that looks like a number in quotes."""


def _represent_list(dumper: _Dumper, items: list[Any]) -> yaml.Node:
    nested = any(isinstance(item, (list, dict)) for item in items)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=not nested)


def _represent_text(dumper: _Dumper, text: str) -> yaml.Node:
    # PyYAML would write 1e-3 without quotes, and the loader, which knows YAML 1.2's numbers, would read a number.
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="'" if NUMBER.fullmatch(text) else None)


_Dumper.add_representer(list, _represent_list)
_Dumper.add_representer(str, _represent_text)


def _escape(value: Any) -> Any:
    """Keep resolved text that contains ``${`` from being resolved a second time."""
    if isinstance(value, dict):
        return {key: _escape(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_escape(item) for item in value]
    return escape_interpolations(value) if isinstance(value, str) else value


def own_fields(cls: type) -> list[dataclasses.Field[Any]]:
    """The fields that a user may set, in order of definition."""
    return [field for field in dataclasses.fields(cls) if field.init]  # type: ignore[arg-type]


class _Walker:
    """Walks one dictionary, gathering problems and the paths of all keys that exist."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        self.unknown: list[tuple[int, str, str, Any, list[str]]] = []
        self.known_paths: list[str] = []

    def report(self, path: str, problem: str) -> None:
        self.problems.append(f"{path}: {problem}" if path else problem)

    def all_problems(self) -> list[str]:
        """Every problem in order of discovery; unknown keys are described last, when all known ones have been seen."""
        problems = list(self.problems)
        for position, path, key, value, siblings in reversed(self.unknown):
            problems.insert(
                position, f"{_join(path, key)}: unknown key (value {shown(value)}).{self._hint(path, key, siblings)}"
            )
        return problems

    def _hint(self, path: str, key: str, siblings: list[str]) -> str:
        elsewhere = [known for known in self.known_paths if known.rpartition(".")[2] == key]
        if elsewhere:
            return f" Did you mean {' or '.join(repr(known) for known in elsewhere[:3])}?"
        return registry.near_matches(key, siblings) or f" Known keys: {', '.join(siblings) or 'none'}"

    def dataclass(self, cls: type, value: Any, path: str, base: Any = None) -> Any:
        """An instance of ``cls``, or ``None`` after reporting why not. Absent keys come from ``base``, if given."""
        if isinstance(value, cls):
            return value
        if not isinstance(value, dict):
            self.report(
                path, f"must be a block of keys ({', '.join(f.name for f in own_fields(cls))}), got {shown(value)}"
            )
            return None
        before = len(self.problems) + len(self.unknown)
        fields = own_fields(cls)
        value = self.current_keys(fields, value, path)
        types = field_types(cls)
        names = [field.name for field in fields]
        self.known_paths += [_join(path, name) for name in names]
        for key, item in value.items():
            if key not in names and not (key == "type" and issubclass(cls, ComponentConfig)):
                self.unknown.append((len(self.problems), path, str(key), item, names))
        values = {}
        for field in fields:
            given = value.get(field.name, MISSING)
            values[field.name] = self.field(field, types[field.name], given, _join(path, field.name), base)
        if len(self.problems) + len(self.unknown) > before:
            return None
        try:
            return self.checked(cls(**values), path)
        except ValueError as error:
            self.report(path, str(error))
            return None

    def current_keys(
        self, fields: Sequence[dataclasses.Field[Any]], block: dict[str, Any], path: str
    ) -> dict[str, Any]:
        """``block`` with the earlier keys of fields replaced by their present names."""
        current = {old: field.name for field in fields for old in field.metadata.get("aliases", ()) if old in block}
        for old, new in current.items():
            registry.report_alias(_join(path, old), _join(path, new))
            if new in block:
                self.report(_join(path, old), f"is an old name of {new}, which is also given; remove one of them")
        return {current.get(key, key): value for key, value in block.items()}

    def checked(self, config: Any, path: str) -> Any:
        """``config`` after its own ``validate`` (relations between fields) has had its say."""
        check = getattr(config, "validate", None)
        for problem in check() if check else []:
            self.problems.append(_join(path, problem))
        return config

    def field(self, field: dataclasses.Field[Any], hint: Any, value: Any, path: str, base: Any) -> Any:
        """The value of one field from what was given for it (``MISSING`` if nothing was)."""
        if isinstance(value, str) and value == MISSING_MARK:
            return self.missing(field, path)
        default = _default(field, base)
        if "component" in field.metadata:
            given = default if value is MISSING else value
            return self.component(field.metadata["component"], given, field.metadata["default_type"], path)
        if "component_map" in field.metadata:
            given = default if value is MISSING else value
            return self.component_map(field, given, path)
        block_cls = block_class(hint)
        if block_cls is not None:
            absent = default in (MISSING, None) if value is MISSING else value is None
            if absent and hint is not block_cls:
                return None
            base = default if isinstance(default, block_cls) else None
            return self.dataclass(block_cls, {} if value is MISSING else value, path, base)
        if value is MISSING:
            if default is MISSING:
                return self.missing(field, path)
            value = default
        try:
            return parse_leaf(accepted_type(field, hint), value, field.metadata.get("bounds", {}), self.nested)
        except Problem as problem:
            self.report(_join(path, problem.where), str(problem))
            return None

    def nested(self, cls: type, value: Any) -> Any:
        """A dataclass inside a list, a dict or an optional field."""
        walker = _Walker()
        config = walker.dataclass(cls, value, "")
        problems = walker.all_problems()
        if problems:
            raise Problem("; ".join(problems))
        return config

    def missing(self, field: dataclasses.Field[Any], path: str) -> None:
        example = field.metadata.get("example") or f"{path}=..."
        self.report(path, f"is required but missing; set it in a config file or on the command line: {example}")

    def component(self, kind: str, value: Any, default_type: str | None, path: str) -> Any:
        """The config of the class that ``value['type']`` names, with ``kind`` and ``type`` filled in."""
        if isinstance(value, ComponentConfig):
            return value
        if value is None and default_type is None:
            return None
        block = {} if value is None else value
        if not isinstance(block, dict):
            self.report(path, f"must be a block whose type names a {kind}, as in {{type: {block}}}; got {shown(value)}")
            return None
        name = block.get("type", default_type)
        if name is None or name == MISSING_MARK:
            self.report(f"{path}.type", f"is required but missing; known: {', '.join(registry.names(kind)) or 'none'}")
            return None
        try:
            entry = registry.lookup(kind, str(name))
        except registry.UnknownComponentError as error:
            self.report(f"{path}.type" if "type" in block else path, str(error))
            return None
        config = self.dataclass(entry.config_cls, block, path)
        if config is not None:
            config.kind, config.type = kind, entry.name
        return config

    def component_map(self, field: dataclasses.Field[Any], value: Any, path: str) -> dict[str, Any]:
        """Blocks by name; a bare value is the block's shorthand key, and ``null`` takes an entry out."""
        kind, shorthand = field.metadata["component_map"], field.metadata["shorthand"]
        if value is None:
            return {}
        if not isinstance(value, dict):
            self.report(path, f"must be a mapping from {kind} names to weights or blocks, got {shown(value)}")
            return {}
        configs = {}
        for name, block in value.items():
            if block is None:
                continue
            if is_bare(block) and not isinstance(block, ComponentConfig):
                block = {shorthand: block}
            configs[str(name)] = self.component(kind, block, str(name), _join(path, str(name)))
        return configs


def block_class(hint: Any) -> type | None:
    """The dataclass that a field of type ``X`` or ``X | None`` holds as a nested block."""
    members = [member for member in (typing.get_args(hint) or (hint,)) if member is not type(None)]
    if len(members) != 1 or typing.get_origin(hint) not in (None, typing.Union, types.UnionType):
        return None
    cls = members[0]
    return cls if isinstance(cls, type) and dataclasses.is_dataclass(cls) and cls is not Schedule else None


def _default(field: dataclasses.Field[Any], base: Any) -> Any:
    if base is not None:
        return getattr(base, field.name)
    if field.default_factory is not MISSING:
        return field.default_factory()
    return field.default


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path and key else path or key

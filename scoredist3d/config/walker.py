"""Parser of typed configurations, from YAML blocks and from the keyword arguments of a ``Config`` in Python.

The walker traverses a block together with the configuration dataclass of its component (the registry maps ``type: sds``
to ``ScoreDistillationSampling.Config``), down to single values, and collects all mistakes.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Sequence
from typing import Any

from scoredist3d import registry
from scoredist3d.config.coercion import MISSING_MARK, Problem, check_label, is_bare, parse_leaf, shown
from scoredist3d.config.errors import ConfigError, join_path
from scoredist3d.config.fields import MISSING, Block, ComponentConfig, accepted_type, field_types, set_parser
from scoredist3d.config.schedule import Schedule


def parse_block(cls: type, value: Any, *, relations: bool = True) -> Any:
    """An instance of the configuration dataclass ``cls`` with the values in ``value``.

    Args:
        cls: A configuration dataclass.
        value: A mapping from keys to plain values or configurations, or an instance of ``cls`` to check.
        relations: Whether to check relations between fields, by calling ``validate`` on each block.

    Raises:
        ConfigError: ``value`` contains mistakes; the message lists all of them, one line each, starting with the path
            of the key.
    """
    walker = Walker(relations=relations)
    return walker.finished(walker.dataclass(cls, value, ""))


def from_keywords(cls: Any, values: dict[str, Any]) -> Any:
    """The result of ``cls(**values)`` for a :class:`~scoredist3d.config.fields.Block`."""
    return parse_block(cls, values, relations=False)


class Walker:
    """Parser of one configuration, which collects all problems and the paths of all known keys."""

    def __init__(self, *, relations: bool = True) -> None:
        self.relations = relations
        self.problems: list[str] = []
        self.unknown: list[tuple[int, str, str, Any, list[str]]] = []
        self.known_paths: list[str] = []

    def finished(self, config: Any) -> Any:
        """``config``, if no problems were recorded.

        Raises:
            ConfigError: Problems were recorded; the message lists all of them.
        """
        problems = self.all_problems()
        if problems:
            raise ConfigError("\n".join(problems))
        return config

    def report(self, path: str, problem: str) -> None:
        """Record a problem with the value at ``path``."""
        self.problems.append(f"{path}: {problem}" if path else problem)

    def all_problems(self) -> list[str]:
        """All problems in order of discovery, including unknown keys.

        Call this method after parsing, because the hints for unknown keys depend on the paths of all known keys.
        """
        problems = list(self.problems)
        for position, path, key, value, siblings in reversed(self.unknown):
            hint = self._hint(key, siblings)
            problems.insert(position, f"{join_path(path, key)}: unknown key (value {shown(value)}).{hint}")
        return problems

    def _hint(self, key: str, siblings: list[str]) -> str:
        elsewhere = [known for known in self.known_paths if known.rpartition(".")[2] == key]
        if elsewhere:
            return f" Did you mean {' or '.join(repr(known) for known in elsewhere[:3])}?"
        return registry.near_matches(key, siblings) or f" Known keys: {', '.join(siblings) or 'none'}"

    def dataclass(self, cls: Any, value: Any, path: str, base: Any = None) -> Any:
        """A new instance of ``cls``, or None if problems were recorded; absent keys have the values of ``base``."""
        if isinstance(value, cls):
            cls, value = type(value), {field.name: getattr(value, field.name) for field in own_fields(type(value))}
        if not isinstance(value, dict):
            keys = ", ".join(field.name for field in own_fields(cls))
            self.report(path, f"must be a block of keys ({keys}), got {shown(value)}")
            return None
        before = len(self.problems) + len(self.unknown)
        fields = own_fields(cls)
        value = self._current_keys(fields, value, path)
        types = field_types(cls)
        names = [field.name for field in fields]
        self.known_paths += [join_path(path, name) for name in names]
        for key, item in value.items():
            if key not in names:
                self.unknown.append((len(self.problems), path, str(key), item, names))
        values = {}
        for field in fields:
            given = value.get(field.name, MISSING)
            values[field.name] = self.field(field, types[field.name], given, join_path(path, field.name), base)
        if len(self.problems) + len(self.unknown) > before:
            return None
        try:
            return self._checked(cls.construct(values) if issubclass(cls, Block) else cls(**values), path)
        except ValueError as error:
            self.report(path, str(error))
            return None

    def _current_keys(
        self, fields: Sequence[dataclasses.Field[Any]], block: dict[str, Any], path: str
    ) -> dict[str, Any]:
        """``block`` with keys that are earlier names of fields replaced by the current names."""
        current = {old: field.name for field in fields for old in field.metadata.get("aliases", ()) if old in block}
        for old, new in current.items():
            registry.report_alias(join_path(path, old), join_path(path, new))
            if new in block:
                self.report(join_path(path, old), f"is an old name of {new}, which is also set; remove one of them")
        return {current.get(key, key): value for key, value in block.items()}

    def _checked(self, config: Any, path: str) -> Any:
        """``config`` unchanged; violated relations between fields, found by ``config.validate``, are recorded."""
        check = getattr(config, "validate", None) if self.relations else None
        for problem in check() if check else []:
            self.problems.append(join_path(path, problem))
        return config

    def field(self, field: dataclasses.Field[Any], hint: Any, value: Any, path: str, base: Any) -> Any:
        """The parsed value of one field; ``value`` is ``MISSING`` if the block does not contain the key."""
        if isinstance(value, str) and value == MISSING_MARK:
            return self._missing(field, path)
        default = default_value(field, base)
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
                return self._missing(field, path)
            value = default
        try:
            return parse_leaf(accepted_type(field, hint), value, field.metadata.get("bounds", {}), self._nested)
        except Problem as problem:
            self.report(join_path(path, problem.where), str(problem))
            return None

    def _nested(self, cls: type, value: Any) -> Any:
        """An instance of the dataclass ``cls`` for a value inside a list, a dict or a union."""
        walker = Walker(relations=self.relations)
        config = walker.dataclass(cls, value, "")
        problems = walker.all_problems()
        if problems:
            raise Problem("; ".join(problems))
        return config

    def _missing(self, field: dataclasses.Field[Any], path: str) -> None:
        example = field.metadata.get("example") or f"{path}=..."
        self.report(path, f"is required but missing; set it in a config file or on the command line: {example}")

    def component(self, kind: str, value: Any, default_type: str | None, path: str) -> Any:
        """The config of the component that ``value['type']`` names; if ``value`` is a config, a checked copy of it."""
        if isinstance(value, ComponentConfig):
            return self._component_instance(kind, value, path)
        if value is None and default_type is None:
            return None
        block = {} if value is None else value
        if not isinstance(block, dict):
            self.report(path, f"must be a block whose type names a {kind}, as in {{type: {block}}}; got {shown(value)}")
            return None
        name = block.get("type", default_type)
        if name is None or name == MISSING_MARK:
            self.report(
                f"{path}.type", f"is required but missing; known types: {', '.join(registry.names(kind)) or 'none'}"
            )
            return None
        try:
            entry = registry.lookup(kind, str(name))
        except registry.UnknownComponentError as error:
            self.report(f"{path}.type" if "type" in block else path, str(error))
            return None
        return self.dataclass(entry.config_cls, {key: item for key, item in block.items() if key != "type"}, path)

    def _component_instance(self, kind: str, config: ComponentConfig, path: str) -> Any:
        if config.kind != kind:
            given = f"the Config of {config.kind}/{config.type}" if config.kind else type(config).__qualname__
            self.report(path, f"must be the Config of a registered {kind}, got {given}")
            return None
        return self.dataclass(type(config), config, path)

    def component_map(self, field: dataclasses.Field[Any], value: Any, path: str) -> dict[str, Any]:
        """Mapping from names to configs.

        A bare value stands for a block in which only the shorthand key is set; ``null`` removes an entry.
        """
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
            try:
                check_label(str(name))
            except Problem as problem:
                self.report(path, str(problem))
                continue
            if is_bare(block) and not isinstance(block, ComponentConfig):
                block = {shorthand: block}
            configs[str(name)] = self.component(kind, block, str(name), join_path(path, str(name)))
        return configs


def own_fields(cls: type) -> list[dataclasses.Field[Any]]:
    """The fields that a user may set, in order of definition."""
    return [field for field in dataclasses.fields(cls) if field.init]  # type: ignore[arg-type]


def block_class(hint: Any) -> type | None:
    """The dataclass ``X`` if ``hint``, the type of a field, is ``X`` or ``X | None``; otherwise None."""
    members = [member for member in (typing.get_args(hint) or (hint,)) if member is not type(None)]
    if len(members) != 1 or typing.get_origin(hint) not in (None, typing.Union, types.UnionType):
        return None
    cls = members[0]
    return cls if isinstance(cls, type) and dataclasses.is_dataclass(cls) and cls is not Schedule else None


def default_value(field: dataclasses.Field[Any], base: Any = None) -> Any:
    """The field's value in ``base`` or, if that is None, the field's default; ``MISSING`` for a required field."""
    if base is not None:
        return getattr(base, field.name)
    if field.default_factory is not MISSING:
        return field.default_factory()
    return field.default


set_parser(from_keywords)

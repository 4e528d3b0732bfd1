"""Output of ``--list`` and ``--describe``: lists of the registered components, and tables of their fields."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import Any, NamedTuple

from scoredist3d import registry
from scoredist3d.config.coercion import described, shown
from scoredist3d.config.fields import MISSING, accepted_type, field_types
from scoredist3d.config.validation import dump
from scoredist3d.config.walker import block_class, default_value, own_fields

WIDTH = 120


class Row(NamedTuple):
    """One field as a row of a table: key, default value, accepted values and help text."""

    key: str
    default: str
    accepts: str
    help: str


def list_kinds() -> str:
    """The kinds of components, one per line, with the package of each."""
    width = max(map(len, registry.KINDS))
    lines = [f"  {kind:<{width}}  {package.replace('.', '/')}/" for kind, package in registry.KINDS.items()]
    return "\n".join(["Kinds of components (--list KIND lists the components of a kind):", *lines])


def list_components(kind: str) -> str:
    """The components of a kind, one per line: name, summary, arXiv id."""
    names = registry.names(kind)
    if not names:
        return f"No {kind} is registered."
    width = max(map(len, names))
    lines = []
    for name in names:
        entry = registry.lookup(kind, name)
        paper = f"  (arXiv {entry.arxiv})" if entry.arxiv else ""
        lines.append(f"  {name:<{width}}  {entry.summary}{paper}")
    return "\n".join([f"{kind} (--describe {kind}/NAME shows the fields of a component):", *lines])


def describe_component(kind: str, name: str) -> str:
    """All fields of ``kind/name``: key (dotted in nested blocks), default, accepted values, help text."""
    entry = registry.lookup(kind, name)
    paper = f"\narXiv {entry.arxiv}" if entry.arxiv else ""
    rows = list(_rows(entry.config_cls, ""))
    head = f"{kind}/{name}: {entry.summary}{paper}\n"
    return f"{head}\n{format_rows(rows)}" if rows else f"{head}\nThis component has no fields."


def format_rows(rows: list[Row]) -> str:
    """The rows as a table with aligned columns; each help text is below the accepted values."""
    key_width = max(len("key"), *(len(row.key) for row in rows))
    default_width = min(max(len("default"), *(len(row.default) for row in rows)), 24)
    indent = " " * (2 + key_width + 2 + default_width + 2)
    lines = [f"  {'key':<{key_width}}  {'default':<{default_width}}  accepts"]
    for row in rows:
        head = f"  {row.key:<{key_width}}  {row.default:<{default_width}}  "
        accepts = textwrap.wrap(row.accepts, WIDTH - len(indent))
        text = [
            *accepts,
            *textwrap.wrap(row.help, WIDTH - len(indent) - 2, initial_indent="  ", subsequent_indent="  "),
        ]
        lines += [head + text[0], *(indent + line for line in text[1:])]
    return "\n".join(lines)


def _rows(cls: type, prefix: str, base: Any = None) -> Iterator[Row]:
    types = field_types(cls)
    for field in own_fields(cls):
        hint, key, text = types[field.name], prefix + field.name, field.metadata.get("help", "")
        default = default_value(field, base)
        nested = block_class(hint)
        if "component" in field.metadata:
            kind = field.metadata["component"]
            yield Row(key, field.metadata["default_type"] or "null", f"a {kind} (--list {kind})", text)
        elif "component_map" in field.metadata:
            kind, shorthand = field.metadata["component_map"], field.metadata["shorthand"]
            classes = [registry.lookup(kind, name).config_cls for name in registry.names(kind)]
            short = any(shorthand in field_types(cls) for cls in classes)
            accepts = (
                f"a mapping from {kind} names (--list {kind}) to {shorthand} values or blocks"
                if short
                else f"a mapping from labels of your choice to blocks, each with a {kind} as its type (--list {kind})"
            )
            yield Row(key, shown(dump(default)), accepts, text)
        elif nested is not None and default is not None:
            yield from _rows(nested, f"{key}.", None if default is MISSING else default)
        else:
            accepts = described(accepted_type(field, hint), field.metadata.get("bounds", {}))
            yield Row(key, "(required)" if default is MISSING else _plain(default), accepts, text)


def _plain(value: Any) -> str:
    plain = dump(value)
    return plain if isinstance(plain, str) and plain else shown(plain)

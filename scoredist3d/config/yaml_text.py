"""Reading of YAML text as plain data: dicts, lists, strings, numbers, booleans and null.

Only these types exist, dates are text, ``1e-3`` is a number, and a key may occur once, as in YAML 1.2. The text is
checked before anything is built from it, since aliases can expand a few lines to gigabytes.
"""

from __future__ import annotations

import math
import re
from typing import Any

import yaml

from scoredist3d.config.coercion import shown
from scoredist3d.limits import MAX_CONFIG_BYTES, MAX_CONFIG_DEPTH, MAX_CONFIG_VALUES

_LARGEST_INTEGER = 2**64

_PREFIX = "tag:yaml.org,2002:"
_SCALARS = ("null", "bool", "int", "float", "str", "merge", "value")
_FLOAT = re.compile(
    r"""^(?:[-+]?(?:[0-9][0-9_]*)\.[0-9_]*(?:[eE][-+]?[0-9]+)?
        |[-+]?(?:[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)
        |\.[0-9_]+(?:[eE][-+]?[0-9]+)?
        |[-+]?\.(?:inf|Inf|INF)
        |\.(?:nan|NaN|NAN))$""",
    re.VERBOSE,
)


class YamlProblem(Exception):
    """Error in YAML text.

    Attributes:
        line: Number of the line, from 1; None if unknown.
    """

    def __init__(self, message: str, line: int | None = None) -> None:
        super().__init__(message)
        self.line = line


def parse_yaml(text: str) -> Any:
    """The content of a YAML document.

    Raises:
        YamlProblem: The text is not valid YAML, or it contains something other than plain data.
    """
    try:
        if len(text) > MAX_CONFIG_BYTES:
            raise YamlProblem(f"longer than {MAX_CONFIG_BYTES:,} characters, which is too much for a configuration")
        loader = _PlainLoader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _check_size(node)
            return _value(loader, node)
        finally:
            loader.dispose()
    except RecursionError:
        raise YamlProblem(f"nested more than {MAX_CONFIG_DEPTH} levels deep; remove levels") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = " ".join(part for part in (error.context, error.problem) if part)
        raise YamlProblem(f"not valid YAML ({problem})", mark.line + 1 if mark else None) from None
    except yaml.reader.ReaderError as error:
        line = text[: error.position].count("\n") + 1
        problem = f"the character {shown(chr(error.character))} is not allowed"  # type: ignore[arg-type]
        raise YamlProblem(f"not valid YAML ({problem})", line) from None


class _PlainLoader(yaml.SafeLoader):
    """YAML parser without dates, which become text, and with numbers such as ``1e-3``."""


_PlainLoader.yaml_implicit_resolvers = {
    first: [
        (tag, pattern)
        for tag, pattern in resolvers
        if tag not in (f"{_PREFIX}timestamp", f"{_PREFIX}float", f"{_PREFIX}value")
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_PlainLoader.add_implicit_resolver(f"{_PREFIX}float", _FLOAT, list("-+0123456789."))


def _check_size(root: yaml.Node) -> None:
    """Check depth and number of the values below ``root``, with each alias expanded.

    Raises:
        YamlProblem: There are too many, or an alias contains itself.
    """
    sizes: dict[int, int] = {}
    open_nodes: set[int] = set()

    def size(node: yaml.Node, depth: int) -> int:
        if isinstance(node, yaml.ScalarNode):
            return 1
        key, line = id(node), node.start_mark.line + 1
        if key in open_nodes:
            raise YamlProblem("an alias refers to the block that contains it; write the values out", line)
        if depth > MAX_CONFIG_DEPTH:
            raise YamlProblem(f"nested more than {MAX_CONFIG_DEPTH} levels deep; remove levels", line)
        if key not in sizes:
            open_nodes.add(key)
            pairs = node.value if isinstance(node, yaml.MappingNode) else [(item,) for item in node.value]
            sizes[key] = 1 + sum(size(item, depth + 1) for pair in pairs for item in pair)
            open_nodes.discard(key)
        if sizes[key] > MAX_CONFIG_VALUES:
            raise YamlProblem(f"more than {MAX_CONFIG_VALUES:,} values, with aliases expanded; remove some", line)
        return sizes[key]

    size(root, 0)


def _value(loader: _PlainLoader, node: yaml.Node) -> Any:
    """The plain value of a node."""
    if isinstance(node, yaml.MappingNode) and node.tag == f"{_PREFIX}map":
        return _mapping(loader, node)
    if isinstance(node, yaml.SequenceNode) and node.tag == f"{_PREFIX}seq":
        return [_value(loader, item) for item in node.value]
    if isinstance(node, yaml.ScalarNode) and node.tag.removeprefix(_PREFIX) in _SCALARS:
        return _scalar(loader, node)
    tag = shown(node.tag.replace(_PREFIX, "!!"))
    raise YamlProblem(f"the tag {tag} is not supported here; write the value without it", node.start_mark.line + 1)


def _mapping(loader: _PlainLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    """The dict of a mapping; values of merged mappings (``<<``) are replaced by those next to the merge key."""
    own: set[Any] = set()
    for key_node, _ in node.value:
        if key_node.tag == f"{_PREFIX}merge":
            continue
        key, line = _key(loader, key_node), key_node.start_mark.line + 1
        if key in own:
            raise YamlProblem(f"not valid YAML (while constructing a mapping: duplicate key {shown(key)})", line)
        own.add(key)
    loader.flatten_mapping(node)
    return {_key(loader, key_node): _value(loader, value_node) for key_node, value_node in node.value}


def _key(loader: _PlainLoader, node: yaml.Node) -> Any:
    key = _value(loader, node) if isinstance(node, yaml.ScalarNode) else None
    if key is None or (isinstance(key, float) and not math.isfinite(key)):
        raise YamlProblem("a key must be text; put quotes around it", node.start_mark.line + 1)
    return key


def _scalar(loader: _PlainLoader, node: yaml.ScalarNode) -> Any:
    """The value of a scalar node.

    Raises:
        YamlProblem: The text does not have the type of the tag, or the value cannot be represented.
    """
    line, tag = node.start_mark.line + 1, node.tag.removeprefix(_PREFIX)
    if tag in ("str", "merge", "value"):
        if any("\ud800" <= character <= "\udfff" for character in node.value):
            raise YamlProblem(f"{shown(node.value)} contains half of a character; write both halves", line)
        return node.value
    try:
        value = loader.construct_object(node)
    except (ValueError, KeyError, IndexError, OverflowError):
        long = len(node.value) > 40
        hint = "it has too many digits" if long else "put quotes around text"
        raise YamlProblem(f"{shown(node.value)} cannot be read as a value of type {tag}; {hint}", line) from None
    if isinstance(value, int) and abs(value) > _LARGEST_INTEGER:
        raise YamlProblem(f"{shown(node.value)} is too large for a whole number; use a smaller one", line)
    return value

"""Conversion of single values to the type of a field, check of their bounds, and descriptions of accepted values."""

from __future__ import annotations

import dataclasses
import re
import sys
import types
from collections.abc import Callable, Mapping
from typing import Any, Literal, Union, get_args, get_origin

from scoredist3d.config.schedule import Schedule
from scoredist3d.limits import MAX_LABEL, MAX_TEXT
from scoredist3d.registry import near_matches

NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")
MISSING_MARK = "???"
"""Placeholder in a config for a required value that has not been set."""
_SCHEDULE_FORM = "a schedule {from, to, start, end, shape}"

Bounds = Mapping[str, float | None]
ParseNested = Callable[[type, Any], Any]


class Problem(ValueError):
    """An invalid value of a field.

    Attributes:
        where: Position of the invalid item in a list or mapping, such as ``2`` or ``encoding.0``; empty if the problem
            concerns the whole value.
    """

    def __init__(self, message: str, where: str = ""):
        super().__init__(message)
        self.where = where


def parse_leaf(hint: Any, value: Any, bounds: Bounds, nested: ParseNested) -> Any:
    """``value`` converted to the type ``hint``.

    Integers are accepted as floats. A string that represents a number is accepted as a number, since YAML 1.1
    reads ``1e-3`` as a string. Booleans are not accepted as numbers.

    Args:
        hint: The type of the field.
        value: A plain value, or a value that already has the type ``hint``.
        bounds: Bounds of every number in ``value``.
        nested: Function that converts a plain value to a dataclass; called with the dataclass and the value.

    Raises:
        Problem: The value has the wrong type or lies outside ``bounds``.
    """
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if hint is Schedule:
        return _parse_schedule(value, bounds)
    if dataclasses.is_dataclass(hint):
        return nested(hint, value)  # type: ignore[arg-type]
    if origin in (Union, types.UnionType):
        return _parse_union(hint, arguments, value, bounds, nested)
    if origin is Literal:
        return _parse_literal(hint, arguments, value)
    if origin in (list, tuple):
        return _parse_sequence(hint, value, bounds, nested)
    if origin is dict:
        return _parse_dict(hint, arguments, value, bounds, nested)
    if hint in (int, float):
        return _parse_number(hint, value, bounds)
    if hint in (bool, str):
        if isinstance(value, str) and not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value):
            raise Problem(f"must be valid text, got {shown(value)}, which contains half of a character")
        if isinstance(value, hint):
            if isinstance(value, str) and len(value) > MAX_TEXT:
                raise Problem(f"has {len(value):,} characters, but may have at most {MAX_TEXT:,}; shorten it")
            return value
        quote = "; put quotes around it" if hint is str and isinstance(value, (int, float)) else ""
        raise Problem(f"must be {described(hint, bounds)}, got {shown(value)}{quote}")
    raise TypeError(f"a config field cannot have the type {hint!r}")


def described(hint: Any, bounds: Bounds) -> str:
    """Description of the values that a field accepts, such as ``a number >= 0`` or ``one of 'linear', 'cosine'``."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Schedule:
        return f"a number{_limits(bounds)} or {_SCHEDULE_FORM}"
    if origin in (Union, types.UnionType):
        words = [described(member, bounds) for member in arguments if member is not type(None)]
        return " or ".join([*words, "null"] if type(None) in arguments else words)
    if origin is Literal:
        return "one of " + ", ".join(shown(choice) for choice in arguments)
    if origin is tuple and Ellipsis not in arguments:
        return f"a list of {len(arguments)} values ({', '.join(described(item, bounds) for item in arguments)})"
    if origin in (list, tuple):
        return f"a list, each item {described(arguments[0], bounds)}"
    if origin is dict:
        return f"a mapping from names to values, each value {described(arguments[1], bounds)}"
    if dataclasses.is_dataclass(hint):
        return f"a block ({', '.join(field.name for field in dataclasses.fields(hint) if field.init)})"
    leaves = {
        int: f"a whole number{_limits(bounds)}",
        float: f"a number{_limits(bounds)}",
        bool: "true or false",
        str: "text",
    }
    return leaves.get(hint, "anything")


def check_label(name: str) -> None:
    """Check the length of a name that the user chooses for an entry of a mapping.

    Raises:
        Problem: The name is too long.
    """
    if len(name) > MAX_LABEL:
        raise Problem(f"the name {shown(name)} has {len(name):,} characters; use at most {MAX_LABEL}")


def is_bare(value: Any) -> bool:
    """Whether an entry of a component map is a number, a schedule or an interpolation, rather than a block or null."""
    if isinstance(value, dict):
        return not {"from", "to"}.isdisjoint(value)
    return value is not None


def shown(value: Any, limit: int = 80) -> str:
    """``value`` as text for a message; null, true and false are written as in YAML, and long values are shortened."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    try:
        text = repr(value)
    except ValueError:  # Python does not print whole numbers of more than 4300 digits.
        text = "a number with too many digits"
    return text if len(text) <= limit else text[: limit - 4] + " ..."


def _limits(bounds: Bounds) -> str:
    ge, gt, le, lt = (bounds.get(key) for key in ("ge", "gt", "le", "lt"))
    if ge is not None and le is not None:
        return f" from {ge:g} to {le:g}"
    limits = [
        f"{sign} {limit:g}" for sign, limit in ((">=", ge), (">", gt), ("<=", le), ("<", lt)) if limit is not None
    ]
    return " " + " and ".join(limits) if limits else ""


def _within(number: float, bounds: Bounds) -> bool:
    ge, gt, le, lt = (bounds.get(key) for key in ("ge", "gt", "le", "lt"))
    return (
        (ge is None or number >= ge)
        and (gt is None or number > gt)
        and (le is None or number <= le)
        and (lt is None or number < lt)
    )


def _as_number(value: Any) -> Any:
    """``value`` converted to a number if it is a string that represents one, otherwise ``value`` unchanged."""
    if isinstance(value, str) and NUMBER.fullmatch(value.strip()):
        number = float(value)
        return int(number) if number.is_integer() and not re.search(r"[.eE]", value) else number
    return value


def _parse_number(hint: type, value: Any, bounds: Bounds) -> Any:
    number = _as_number(value)
    good = isinstance(number, (int, float)) and not isinstance(number, bool) and abs(number) <= sys.float_info.max
    if good and hint is int:
        good = float(number).is_integer()
    if not good or not _within(number, bounds):
        raise Problem(f"must be {described(hint, bounds)}, got {shown(value)}")
    return hint(number)


def _parse_schedule(value: Any, bounds: Bounds) -> Schedule:
    wanted = f"must be {described(Schedule, bounds)}, got {shown(value)}"
    try:
        schedule = Schedule.parse(_with_numbers(value))
    except ValueError as error:
        # The message for a scalar lists the accepted values; the message for a list or mapping names the invalid part.
        raise Problem(str(error) if isinstance(value, (dict, list)) else wanted) from None
    if not all(_within(number, bounds) for number in schedule.values):
        raise Problem(wanted)
    return schedule


def _with_numbers(value: Any) -> Any:
    """``value`` with all strings that represent numbers converted to numbers, also inside lists and mappings."""
    if isinstance(value, dict):
        return {key: _with_numbers(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_with_numbers(item) for item in value]
    return _as_number(value)


def _parse_literal(hint: Any, choices: tuple[Any, ...], value: Any) -> Any:
    for choice in choices:
        if value == choice and type(value) is type(choice):
            return choice
    near = (
        near_matches(value, [choice for choice in choices if isinstance(choice, str)]) if isinstance(value, str) else ""
    )
    raise Problem(f"must be {described(hint, {})}, got {shown(value)}{'.' + near if near else ''}")


def _parse_union(hint: Any, members: tuple[Any, ...], value: Any, bounds: Bounds, nested: ParseNested) -> Any:
    others = [member for member in members if member is not type(None)]
    if value is None and len(others) < len(members):
        return None
    exact = [member for member in others if isinstance(member, type) and type(value) is member]
    problems = []
    for member in [*exact, *(other for other in others if other not in exact)]:
        try:
            return parse_leaf(member, value, bounds, nested)
        except Problem as problem:
            problems.append(problem)
    if len(others) == 1 and (problems[0].where or not str(problems[0]).startswith("must be ")):
        raise problems[0]
    raise Problem(f"must be {described(hint, bounds)}, got {shown(value)}")


def _parse_sequence(hint: Any, value: Any, bounds: Bounds, nested: ParseNested) -> Any:
    kind, arguments = get_origin(hint), get_args(hint)
    fixed = kind is tuple and Ellipsis not in arguments
    if not isinstance(value, (list, tuple)) or (fixed and len(value) != len(arguments)):
        raise Problem(f"must be {described(hint, bounds)}, got {shown(value)}")
    items = []
    for index, item in enumerate(value):
        try:
            items.append(parse_leaf(arguments[index] if fixed else arguments[0], item, bounds, nested))
        except Problem as problem:
            raise Problem(str(problem), f"{index}.{problem.where}".rstrip(".")) from None
    return kind(items)


def _parse_dict(
    hint: Any, arguments: tuple[Any, ...], value: Any, bounds: Bounds, nested: ParseNested
) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise Problem(f"must be {described(hint, bounds)}, got {shown(value)}")
    parsed = {}
    for key, item in value.items():
        if not isinstance(key, str):
            raise Problem(f"must be {described(hint, bounds)}; the name {shown(key)} is not text; put quotes around it")
        check_label(key)
        try:
            parsed[key] = parse_leaf(arguments[1], item, bounds, nested)
        except Problem as problem:
            raise Problem(str(problem), f"{key}.{problem.where}".rstrip(".")) from None
    return parsed

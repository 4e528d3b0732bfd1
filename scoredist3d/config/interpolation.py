"""Interpolations ``${key.path}``, which stand for the value of another key of the merged configuration.

A string that consists of one interpolation becomes a copy of the value; inside a longer string, the value is inserted
as text. ``\\${`` is the literal text ``${``, and backslashes directly before ``${`` are halved.
"""

from __future__ import annotations

import copy
import re
from typing import Any

from scoredist3d.config.coercion import MISSING_MARK, shown
from scoredist3d.config.errors import ConfigError

MAX_SIZE = 300_000
"""Largest number of characters and values that all interpolations of a configuration produce together."""
MAX_CHAIN = 50
"""Largest number of interpolations that refer to each other in a chain."""
_REFERENCE = re.compile(r"(\\*)\$\{([^{}$\\]*)(\}?)")
_KEY = re.compile(r"[\w-]+(\.[\w-]+)*")


def escape_interpolations(text: str) -> str:
    """``text`` escaped so that :func:`resolve` returns the original text even if it contains ``${``."""
    return re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + "\\${", text)


def resolve(merged: dict[str, Any]) -> dict[str, Any]:
    """``merged`` with every interpolation replaced by the value that it refers to.

    Raises:
        ConfigError: An interpolation refers to a key that does not exist or to itself, or is not of the form
            ``${key.path}``.
    """
    resolver = _Resolver(merged)
    resolved: dict[str, Any] = resolver.value(merged, ())
    if resolver.problems:
        raise ConfigError("\n".join(resolver.problems))
    return resolved


class _Unresolved(Exception):
    """Error for an interpolation without a value; the message says why."""


class _Missing(Exception):
    """Signal that an interpolation refers to a required value that has not been set."""


class _Resolver:
    """Replaces interpolations; each referenced value is resolved once, so chains of references stay cheap."""

    def __init__(self, root: dict[str, Any]) -> None:
        self.root = root
        self.problems: list[str] = []
        self._done: dict[str, Any] = {}
        self._open: list[str] = []
        self._spent = 0

    def value(self, value: Any, path: tuple[str, ...]) -> Any:
        """The resolved ``value`` at ``path``; problems are collected, and the values concerned are kept."""
        if isinstance(value, dict):
            return {key: self.value(item, (*path, str(key))) for key, item in value.items()}
        if isinstance(value, list):
            return [self.value(item, (*path, str(index))) for index, item in enumerate(value)]
        try:
            return self.inside(value)
        except _Missing:
            # The interpolation refers to a missing value, so this value is missing too; the validator reports both.
            return MISSING_MARK
        except _Unresolved as error:
            self.problems.append(f"{'.'.join(path)}: cannot resolve {shown(value)}: {error}")
            return value

    def inside(self, value: Any) -> Any:
        """The resolved ``value``."""
        if isinstance(value, dict):
            return {key: self.inside(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self.inside(item) for item in value]
        return self.text(value) if isinstance(value, str) and "${" in value else value

    def text(self, text: str) -> Any:
        """``text`` with its interpolations replaced."""
        whole = _REFERENCE.fullmatch(text)
        if whole is not None and not whole[1] and whole[3]:
            value = self.referenced(whole[2])
            self.spend(_size(value))
            return copy.deepcopy(value)
        result = _REFERENCE.sub(self.replaced, text)
        self.spend(len(result))
        return result

    def replaced(self, match: re.Match[str]) -> str:
        """The text for one interpolation, or for an escaped one."""
        backslashes = match[1][: len(match[1]) // 2]
        if len(match[1]) % 2:
            return f"{backslashes}${{{match[2]}{match[3]}"
        if not match[3]:
            raise _Unresolved("the brace is not closed, or contains another one; write \\${ for the text ${")
        value = self.referenced(match[2])
        if isinstance(value, (dict, list)):
            raise _Unresolved(f"{match[2]} is a block or a list, which cannot be a part of a text")
        self.spend(len(str(value)))
        return f"{backslashes}{value}"

    def referenced(self, key: str) -> Any:
        """The resolved value of a key."""
        if not _KEY.fullmatch(key):
            raise _Unresolved("only the form ${key.path} is supported; write \\${ for the text ${")
        if key not in self._done:
            if any(f"{key}.".startswith(f"{other}.") or f"{other}.".startswith(f"{key}.") for other in self._open):
                raise _Unresolved(f"it refers to itself ({' -> '.join([*self._open[-3:], key])}); write a value")
            if len(self._open) > MAX_CHAIN:
                raise _Unresolved(f"more than {MAX_CHAIN} interpolations refer to each other; write a value")
            self._open.append(key)
            try:
                self._done[key] = self.inside(self.found(key))
            finally:
                self._open.pop()
        if self._done[key] == MISSING_MARK:
            raise _Missing
        return self._done[key]

    def found(self, key: str) -> Any:
        """The value of a key before interpolation, except on the way to it."""
        found: Any = self.root
        for part in key.split("."):
            found = self.text(found) if isinstance(found, str) and "${" in found else found
            if found == MISSING_MARK:
                raise _Missing
            if isinstance(found, dict) and part in found:
                found = found[part]
            elif isinstance(found, list) and part.isdecimal() and len(part) < 10 and int(part) < len(found):
                found = found[int(part)]
            else:
                raise _Unresolved(f"Interpolation key '{key}' not found; refer to a key that is set")
        return found

    def spend(self, size: int) -> None:
        """Count the size of a result, so that a few lines cannot expand to gigabytes."""
        self._spent += size
        if self._spent > MAX_SIZE:
            raise _Unresolved(f"interpolations produce more than {MAX_SIZE} characters; remove some")


def _size(value: Any) -> int:
    """Number of characters and values in ``value``."""
    if isinstance(value, dict):
        return 1 + sum(_size(item) for item in value.values())
    if isinstance(value, list):
        return 1 + sum(_size(item) for item in value)
    return len(value) if isinstance(value, str) else 1

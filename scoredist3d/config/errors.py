"""Exceptions for invalid configuration values; each exception contains the path of the field."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Self


class FieldError(ValueError):
    """A configured value that a component cannot use.

    A component raises this error with a path relative to the block of the component (``"t_min"``). The caller prepends
    the path of the block with :func:`under`, so that the message starts with the complete key
    (``system.guidance.t_min: ...``).

    Attributes:
        problem: Description of the problem and its remedy, without the path.
        path: Dotted path of the field; empty if the problem concerns the whole block.
    """

    def __init__(self, problem: str, path: str = "") -> None:
        super().__init__(f"{path}: {problem}" if path else problem)
        self.problem, self.path = problem, path

    def under(self, path: str) -> Self:
        """A copy of the error with ``path`` prepended to the path of the field."""
        return type(self)(self.problem, join_path(path, self.path))


MAX_MESSAGE = 500
"""Largest number of characters of the message of a :class:`ConfigError`."""


class ConfigError(FieldError):
    """A mistake in a config file, a configuration created in Python, an override or the command line.

    The message is short enough to read on a terminal, whatever the config contains: see :func:`brief`.

    Attributes:
        full: The message without the limit of its length; one line for each mistake.
    """

    def __init__(self, problem: str, path: str = "") -> None:
        super().__init__(problem, path)
        self.full = str(self)
        self.args = (brief(self.full),)


@contextmanager
def under(path: str, *, claim: bool = False) -> Iterator[None]:
    """Context manager that prepends ``path`` to the path of every :class:`FieldError` raised in its body.

    Args:
        path: Dotted path of the block that the body uses.
        claim: Whether to convert any other ``ValueError`` to a :class:`FieldError` for this block.
    """
    try:
        yield
    except FieldError as error:
        raise error.under(path).with_traceback(error.__traceback__) from error.__cause__
    except ValueError as error:
        if not claim:
            raise
        raise FieldError(str(error), path) from error


def join_path(path: str, key: str) -> str:
    """``path.key``; if one of the two is empty, the other one."""
    return f"{path}.{key}" if path and key else path or key


def brief(message: str, limit: int = MAX_MESSAGE) -> str:
    """``message`` with at most ``limit`` characters, all of them printable.

    Long lines are cut in the middle, because they start with the key and end with the remedy. Lines that do not fit are
    counted.
    """
    text = "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in message)
    if len(text) <= limit:
        return text
    lines = text.splitlines()
    if len(lines) == 1:
        return _cut(text, limit)
    room = limit - len(f"\n... and {len(lines)} more mistakes")
    kept = [_cut(lines[0], room)]
    for line in lines[1:]:
        if len("\n".join([*kept, line])) > room:
            break
        kept.append(line)
    left = len(lines) - len(kept)
    return "\n".join([*kept, f"... and {left} more mistake{'s' if left > 1 else ''}"])


def _cut(line: str, limit: int) -> str:
    if len(line) <= limit:
        return line
    tail = min(160, limit // 3)
    return f"{line[: limit - tail - 5]} ... {line[-tail:]}"

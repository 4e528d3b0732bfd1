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


class ConfigError(FieldError):
    """A mistake in a config file, a configuration created in Python, an override or the command line."""


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

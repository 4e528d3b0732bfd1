"""Errors about values of a configuration, with the path of the field that they are about."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Self


class FieldError(ValueError):
    """A configured value that a component cannot use.

    A component raises it with a path inside its own block (``"t_min"``). Code that holds the block adds the path of the
    block with :func:`under`, so that the message starts with the whole key (``system.guidance.t_min: ...``).

    Attributes:
        problem: What is wrong and what to do, without the path.
        path: Dotted path of the field; empty where the message is about the whole block.
    """

    def __init__(self, problem: str, path: str = "") -> None:
        super().__init__(f"{path}: {problem}" if path else problem)
        self.problem, self.path = problem, path

    def under(self, path: str) -> Self:
        """The same error with ``path`` in front of its own path."""
        return type(self)(self.problem, join_path(path, self.path))


class ConfigError(FieldError):
    """A mistake in a config file, a configuration made in Python, an override or the command line."""


@contextmanager
def under(path: str, *, claim: bool = False) -> Iterator[None]:
    """Puts ``path`` in front of the path of every :class:`FieldError` that is raised inside.

    Args:
        path: Dotted path of the block that the code inside works on.
        claim: Whether other ``ValueError`` s also become errors about this block.
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
    """``path.key``; either may be empty."""
    return f"{path}.{key}" if path and key else path or key

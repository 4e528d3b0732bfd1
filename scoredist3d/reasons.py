"""Reasons of failures as text for users: one sentence with the path of the file and what to do."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

_REMEDIES: dict[int, str] = {
    errno.ENOSPC: "the disk is full; free some space, or write to another disk",
    errno.EROFS: "the file system is read-only; write to another folder, or work on a copy of this one",
    errno.EACCES: "permission denied; change the permissions, or use another folder",
    errno.EPERM: "the operation is not permitted; change the permissions, or use another folder",
    errno.ENOENT: "there is no such file or folder; check the path",
    errno.ENOTDIR: "a part of the path is a file, not a folder; check the path",
    errno.EISDIR: "this is a folder, not a file; check the path",
    errno.EEXIST: "this exists already and is not what is needed here; rename it, or use another path",
    errno.ENAMETOOLONG: "the name is too long; shorten it",
    errno.EMFILE: "too many files are open; raise the limit with `ulimit -n`",
    errno.EIO: "the disk reports an input/output error; check it, or use another disk",
}
if hasattr(errno, "EDQUOT"):  # not on Windows
    _REMEDIES[errno.EDQUOT] = "the disk quota is exhausted; free some space, or write to another disk"


class ExplainedError(Exception):
    """An error whose message says what happened, where, and what to do; it is shown without its type."""


@dataclass(frozen=True)
class RunPart:
    """A part of a run.

    Attributes:
        name: Name for a message, such as ``the render``.
        settings: Config keys that reduce the memory of this part; none if those of a whole step do.
    """

    name: str
    settings: tuple[str, ...] = ()


@contextmanager
def part(name: str, *settings: str) -> Iterator[None]:
    """Context manager that marks exceptions of its body with a :class:`RunPart`; the innermost mark counts."""
    try:
        yield
    except Exception as error:
        if part_of(error) is None:
            error.part = RunPart(name, settings)  # type: ignore[attr-defined]
        raise


def part_of(error: BaseException) -> RunPart | None:
    """The part of a run in which an exception was raised; None if it is unknown."""
    found = getattr(error, "part", None)
    return found if isinstance(found, RunPart) else None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception of Python, NumPy, PyTorch or the operating system says that the memory is full."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    # torch.OutOfMemoryError is a RuntimeError; on the CPU, PyTorch raises a plain one.
    return isinstance(error, RuntimeError) and any(text in str(error).lower() for text in _MEMORY_TEXTS)


_MEMORY_TEXTS = ("out of memory", "defaultcpuallocator", "status_alloc_failed", "cannot allocate memory")


def is_disk_full(error: BaseException) -> bool:
    """Whether an exception says that a disk or the user's share of it is full."""
    if isinstance(error, shutil.Error):
        error = _first(error)
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))


def reason(error: BaseException) -> str:
    """The reason of a failure: the message of a user's mistake, a sentence for a system error, or type and message."""
    if isinstance(error, (ValueError, ExplainedError)):
        return str(error)
    if isinstance(error, OSError):
        return os_reason(error)
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def os_reason(error: OSError) -> str:
    """A sentence for an error of the operating system: path, problem and remedy.

    An error without a number, which this program raises, already has such a message.
    """
    if isinstance(error, shutil.Error):
        error = _first(error)
    if error.errno is None:
        return str(error) or type(error).__name__
    problem = _REMEDIES.get(error.errno) or f"{error.strerror or os.strerror(error.errno)}; check the disk and the path"
    named = isinstance(error.filename, (str, bytes, os.PathLike))
    return f"{os.fsdecode(error.filename)}: {problem}" if named else problem


def _first(error: shutil.Error) -> OSError:
    """The first of the errors that copying a folder collects as triples (source, target, text)."""
    collected = error.args[0] if error.args else None
    if not isinstance(collected, list) or not collected:
        return error
    _, target, text = collected[0]
    number = re.search(r"\[Errno (\d+)\]", str(text))
    return OSError(int(number[1]), os.strerror(int(number[1])), str(target)) if number else OSError(str(text))

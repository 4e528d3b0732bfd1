"""Errors of a full disk, reported in one sentence instead of the error of whichever file was being written."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from scoredist3d.paths import command_name
from scoredist3d.training.folder import RunFolder

_CODES = (errno.ENOSPC, errno.EDQUOT)


class FullDiskError(ValueError):
    """Error raised if a run cannot write its files because the disk, or the user's share of it, is full."""


@contextmanager
def explain_full_disk(folder: Path, resume_from: Path | None = None, *, trains: bool = True) -> Iterator[None]:
    """Context manager that turns errors of a full disk into one that says how to continue.

    Args:
        folder: Folder of the run.
        resume_from: Folder of the pipeline to which the run belongs.
        trains: Whether the run is trained; other commands are repeated, not continued.

    Raises:
        FullDiskError: The disk is full.
    """
    try:
        yield
    except FullDiskError:
        raise
    except Exception as error:
        if not _is_of_full_disk(error):
            raise
        begun = resume_from is not None or RunFolder(folder).newest_checkpoint is not None
        if trains and begun:
            again = f"continue with {command_name()} --train --resume {resume_from or folder}"
        else:
            again = "start the command again"
        raise FullDiskError(f"the disk of {folder} is full; free some space, then {again}") from error


def _is_of_full_disk(error: BaseException | None) -> bool:
    """Whether an error, or the one that it was raised from or after, is that of a full disk."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _CODES:
            return True
        # Libraries pass on the text only: shutil.copytree, and compiled code that writes to a Python file.
        if any(os.strerror(code) in str(error) for code in _CODES):
            return True
        error = error.__cause__ or error.__context__
    return False

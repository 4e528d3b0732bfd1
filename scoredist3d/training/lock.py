"""Lock of a run folder, which keeps a second process from writing to it."""

from __future__ import annotations

import errno
import json
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from scoredist3d.files import make_folder, naming, read_json, remove_leftovers
from scoredist3d.training.folder import PIPELINE_CONFIG, RunFolder
from scoredist3d.training.replacement import finish_replacement

LOCK = ".lock"

log = logging.getLogger(__name__)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Context manager that holds the lock of a run or pipeline folder and first repairs what a killed run left there.

    The lock is an ``flock`` on the file ``.lock``, which the kernel releases when the process ends, however it ends.
    The file contains the host, the process id and the start time of its holder.

    Raises:
        ValueError: Another process holds the lock; the message names it. Or ``.lock`` is a link.
    """
    make_folder(folder)
    path = folder / LOCK
    descriptor = _acquire(path)
    try:
        holder = {"host": socket.gethostname(), "pid": os.getpid(), "started": _now()}
        with naming(path):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{json.dumps(holder)}\n".encode(), 0)
        _repair(folder)
        yield
    finally:
        # Deleted before it is released: who opens it in between finds in `_acquire` that it is not the lock any more.
        with suppress(OSError):
            path.unlink(missing_ok=True)
        os.close(descriptor)
        with suppress(OSError):
            folder.rmdir()  # A run that could not begin has left nothing else in it.


@contextmanager
def locked_stage(folder: Path) -> Iterator[None]:
    """Context manager that holds the lock of a run and, if the run is a stage, also that of its pipeline."""
    if not (folder.absolute().parent / PIPELINE_CONFIG).is_file():
        with locked(folder):
            yield
        return
    with locked(folder.absolute().parent), locked(folder):
        yield


def tidy(folder: Path) -> None:
    """Remove the lock and the temporary files that a killed process left in a finished run.

    Nothing happens if another process uses the folder, or if the folder cannot be changed.
    """
    with suppress(ValueError, OSError), locked(folder):
        pass


def _acquire(path: Path) -> int:
    """Descriptor of the locked file."""
    while True:
        try:
            # In a folder from others, a link could lead to any file, which would be overwritten.
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o644)
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise
            raise ValueError(f"{path} is a link, which this program does not make; delete it") from error
        try:
            _lock(descriptor, path)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), path.stat()):
                    return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # An earlier holder has deleted this file.


def _lock(descriptor: int, path: Path) -> None:
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(f"{path.parent} is in use by {_holder(path)}; wait until it ends, or stop it") from error
    except OSError as error:
        log.warning("%s cannot be locked (%s); do not start a second process in this folder", path.parent, error)


def _holder(path: Path) -> str:
    holder = read_json(path)
    if not holder:
        return "another process"
    return f"process {holder.get('pid')} on {holder.get('host')}, started {holder.get('started')}"


def _now() -> str:
    return datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")


def _repair(root: Path) -> None:
    """Finish interrupted replacements and delete temporary files, except those in the stages of a pipeline."""
    folder = RunFolder(root)
    for target in (folder.export, folder.videos, folder.images):
        finish_replacement(target)
    remove_leftovers(root)
    for part in (folder.configs, folder.checkpoints, folder.images, folder.videos, folder.export, root / "history"):
        remove_leftovers(part, recursive=not part.is_symlink())  # A link may lead anywhere.

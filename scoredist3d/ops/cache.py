"""Cache files of the operators: compiled kernels and generated grids.

The name of a cache file contains a checksum of its content, ``<stem>-<checksum><suffix>``, which is verified before the
file is used: loading a truncated shared library or mapping a truncated file would kill the process. A file that does
not match its checksum is deleted, with one line of warning, and the caller makes it again.
"""

from __future__ import annotations

import atexit
import hashlib
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

from scoredist3d.files import naming, publish

logger = logging.getLogger("scoredist3d")

_CHECKSUM_BYTES = 12


def find(stem: str, suffix: str) -> Path | None:
    """The cache file of this stem whose content matches its checksum; None if there is none.

    Files are read from the user's cache folder even if it is read-only.
    """
    for folder in _folders():
        for path in sorted(folder.glob(f"{stem}-{'[0-9a-f]' * 2 * _CHECKSUM_BYTES}{suffix}")):
            if _is_intact(path):
                return path
            logger.warning("the cache file %s is damaged (its checksum differs) and is regenerated", path)
            with suppress(OSError):  # It lies in a read-only folder.
                path.unlink()
    return None


def store(stem: str, suffix: str, write: Callable[[Path], None]) -> Path:
    """Write a cache file atomically and durably; returns its path.

    Args:
        stem: First part of the file name, which identifies everything that the content depends on.
        suffix: Suffix of the file name.
        write: Function that writes the content to the path that it receives; the folder of this path is deleted
            afterwards, with everything else in it.

    Raises:
        OSError: The file cannot be written; neither it nor an incomplete file remains.
    """
    folder = _writable_folder()
    with naming(folder), tempfile.TemporaryDirectory(prefix=f".{stem}-", dir=folder) as draft_folder:
        draft = Path(draft_folder) / f"draft{suffix}"
        write(draft)
        target = folder / f"{stem}-{_checksum(draft)}{suffix}"
        publish(draft, target)
    return target


def _folders() -> list[Path]:
    """Folders that may contain cache files: that of the user, and the temporary one of this process if it is in use."""
    return [_user_folder(), *([_temporary_folder()] if _temporary_folder.cache_info().currsize else [])]


def _user_folder() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(root) / "scoredist3d"


def _writable_folder() -> Path:
    """The user's cache folder or, if it is not writable, a temporary folder."""
    folder = _user_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return _temporary_folder()
    return folder if os.access(folder, os.W_OK) else _temporary_folder()


@lru_cache(maxsize=1)
def _temporary_folder() -> Path:
    """A folder that is deleted when the process ends."""
    folder = tempfile.mkdtemp(prefix="scoredist3d-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def _is_intact(path: Path) -> bool:
    try:
        return path.stem.endswith(f"-{_checksum(path)}")
    except OSError:
        return False


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=_CHECKSUM_BYTES)).hexdigest()

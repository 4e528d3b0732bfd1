"""Atomic and durable file writing: a file appears under its name completely or not at all, even after a power cut."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

MAX_RUN_TEXT_BYTES = 16 * 1024**2
"""Size of JSON files, and of other short text files of a run folder."""


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path next to ``path`` with its suffix; deleted on an exception, otherwise published as ``path``."""
    make_folder(path.parent)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        with naming(path):
            yield temporary
            publish(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A binary file for writing; its content appears at ``path`` completely or not at all, even after a power cut."""
    make_folder(path.parent)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with naming(path):
            with os.fdopen(descriptor, "wb") as file:
                yield file
            os.chmod(temporary, 0o644)
            publish(Path(temporary), path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Add ``path`` to an ``OSError`` that names no file, as on a full disk, so that messages can name it."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def publish(temporary: Path, path: Path) -> None:
    """Rename a complete file to ``path``, on the same file system, so that it survives a power cut.

    Raises:
        OSError: The content cannot be written to the disk; ``path`` is unchanged.
    """
    sync_file(temporary)
    os.replace(temporary, path)
    sync_folder(path.parent)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """An empty folder at ``path`` for unfinished files; deleted afterwards, unless it has been renamed.

    Files that a killed process left there are deleted first.
    """
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def make_folder(folder: Path) -> None:
    """Create a folder and its missing parents durably; does nothing if it exists."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    for path in reversed(missing):  # mkdir(parents=True) is recursive, and a path can have 2000 parts.
        path.mkdir(exist_ok=True)
    folder.mkdir(exist_ok=True)
    for path in missing:
        sync_folder(path.parent)


def sync_file(path: Path) -> None:
    """Make the content of a file durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Make all files below ``folder``, and the folders themselves, durable."""
    for path, _, names in os.walk(folder):
        for name in names:
            if not (Path(path) / name).is_symlink():
                with naming(Path(path) / name):
                    sync_file(Path(path) / name)
        sync_folder(Path(path))


_LEFTOVER = re.compile(r"\..+\.tmp|\..+\.\d+\.tmp\.\w+")
"""Names of the temporary files of :func:`atomic_file` and :func:`atomic_path`, and of unfinished folders."""


def remove_leftovers(folder: Path, *, recursive: bool = False) -> None:
    """Delete the temporary files and folders in ``folder`` left by a process that was killed while writing."""
    for path in list(folder.iterdir()) if folder.is_dir() else []:
        is_folder = path.is_dir() and not path.is_symlink()
        if _LEFTOVER.fullmatch(path.name) and is_folder:
            shutil.rmtree(path, ignore_errors=True)
        elif _LEFTOVER.fullmatch(path.name):
            path.unlink(missing_ok=True)
        elif is_folder and recursive:
            remove_leftovers(path, recursive=True)


def sync_folder(folder: Path) -> None:
    """Make a rename in ``folder`` durable, on file systems that can sync a directory."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_atomically(path: Path, text: str) -> None:
    """Replace the content of a text file atomically."""
    with atomic_file(path) as file:
        file.write(text.encode())


def read_text(path: Path) -> str:
    """The content of a text file.

    Raises:
        ValueError: The file is not encoded in UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not a UTF-8 text file; save it with the encoding UTF-8") from None


def is_file_name(value: Any) -> bool:
    """Whether a value of a JSON file, which may come from others, is the name of a file without a folder."""
    return isinstance(value, str) and value not in ("", "..") and "\0" not in value and Path(value).name == value


def write_json(path: Path, content: dict[str, Any]) -> Path:
    """Replace the content of a JSON file atomically; returns ``path``."""
    write_atomically(path, json.dumps(content, indent=2) + "\n")
    return path


def read_json(path: Path) -> dict[str, Any]:
    """The mapping in a JSON file; empty if there is no such regular file, or if it is too large or something else."""
    try:
        if not path.is_file() or path.stat().st_size > MAX_RUN_TEXT_BYTES:
            return {}
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}

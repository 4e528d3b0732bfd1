"""Portable file names, and atomic writing of several files."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def safe_name(name: str, fallback: str = "asset") -> str:
    """``name`` reduced to at most 80 ASCII letters, digits, dots, dashes and underscores.

    Every reader of MTL files accepts such names. If nothing is left, the result is ``fallback``.
    """
    ascii_name = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    return re.sub(r"[^A-Za-z0-9._-]+", "-", ascii_name).strip("-.")[:80] or fallback


@contextmanager
def staged_files(folder: Path) -> Iterator[tuple[Path, list[Path]]]:
    """Context manager that writes several files to ``folder``: either all of them or none.

    On success, the staged files are moved to ``folder`` in the order of the list, so a file should come after those it
    refers to; the list then contains the final paths. After an exception, ``folder`` is unchanged.

    Yields:
        A staging folder, and an empty list to which the caller appends the path of each file it has written there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".export-", dir=folder))
    paths: list[Path] = []
    try:
        yield staging, paths
        for index, path in enumerate(paths):
            paths[index] = folder / path.name
            os.replace(staging / path.name, paths[index])
    finally:
        shutil.rmtree(staging)

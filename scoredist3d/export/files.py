"""Names that every reader accepts, and sets of files that appear together or not at all."""

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
    """``name`` reduced to ASCII letters, digits, dot, dash and underscore, which every MTL reader accepts."""
    ascii_name = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    return re.sub(r"[^A-Za-z0-9._-]+", "-", ascii_name).strip("-.")[:80] or fallback


@contextmanager
def staged_files(folder: Path) -> Iterator[tuple[Path, list[Path]]]:
    """A staging folder inside ``folder`` for files that belong together.

    Yields the staging folder and an empty list. On success every staged file is moved into ``folder`` in the order in
    which its name was added to the list (put a file after those it refers to) and the list then holds the final paths.
    On an exception nothing in ``folder`` has changed.
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

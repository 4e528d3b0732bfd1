"""Replacement of the files of a folder as one set; the earlier set is kept in a subfolder.

The new folder is completed beside the target, ``.<target>.new``, and then takes its place in one step (where the system
can exchange two folders; elsewhere in two renames). The old folder becomes ``.<target>.old``, from which files that do
not belong to the set return to the target. :func:`finish_replacement` continues after a kill at any point.
"""

from __future__ import annotations

import ctypes
import filecmp
import os
import shutil
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from scoredist3d.files import is_file_name, make_folder, read_json, sync_folder, sync_tree, write_json
from scoredist3d.training.checkpoint import link_or_copy

_PREVIOUS = "previous-"
_REPLACED = ".replaced.json"
"""File in the old folder that lists the files of the replaced set, which need not be kept there."""
_AT_CURRENT_FOLDER, _EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of renameat2(2)


@dataclass(frozen=True)
class Replacement:
    """Plan for replacing the current set of files in a folder.

    Attributes:
        staging: Folder with the new files, on the same file system as ``target``.
        target: Folder of the current set.
        current: Names of all files of the current set, even unchanged ones.
        previous: Folder in which the current set is kept, ``<target>/previous-<n>``; None if no file of it changes.
    """

    staging: Path
    target: Path
    current: tuple[str, ...] = ()
    previous: Path | None = None

    @classmethod
    def plan(cls, staging: Path, target: Path, earlier: Iterable[str], reports: Iterable[str] = ()) -> Replacement:
        """Compare the new files with the current set and return the plan for replacing it.

        Args:
            staging: Folder with the new files.
            target: Folder of the current set; it need not exist.
            earlier: Names of files of the current set; a file named like a new file or a report always belongs to it.
            reports: Names of files whose changes do not count as a difference, such as a report with times.
        """
        new, reports = {path.name for path in staging.iterdir()}, set(reports)
        old = tuple(sorted(name for name in {*earlier, *new, *reports} if (target / name).is_file()))
        gone = [name for name in old if name not in new | reports]
        compared = [name for name in old if name in new - reports]
        if not gone and all(filecmp.cmp(staging / name, target / name, shallow=False) for name in compared):
            return cls(staging, target, old)
        taken = [int(number) for path in target.glob(f"{_PREVIOUS}*") if (number := _number(path)).isdecimal()]
        return cls(staging, target, old, target / f"{_PREVIOUS}{max(taken, default=0) + 1}")

    @property
    def replaced(self) -> tuple[str, ...]:
        """Names of the files that are kept in ``previous``; empty if none changes."""
        return () if self.previous is None else self.current

    def apply(self) -> None:
        """Replace the current set by the files in ``staging``; a kill leaves the old or the new set complete."""
        new, old = _beside(self.target)
        finish_replacement(self.target)
        make_folder(self.target)
        if self.previous is not None:
            (self.staging / self.previous.name).mkdir()
            for name in self.current:
                link_or_copy(self.target / name, self.staging / self.previous.name / name)
        sync_tree(self.staging)
        write_json(self.target / _REPLACED, {"files": list(self.current)})
        self.staging.rename(new)
        target = self.target.resolve()
        if _exchange(new, target):
            new.rename(old)
        else:
            target.rename(old)
            new.rename(target)
        finish_replacement(self.target)

    def describe(self) -> str:
        """Message about the replaced files; empty if nothing was replaced."""
        if self.previous is None:
            return ""
        return f"replaced {', '.join(self.replaced)}; the earlier files are in {self.previous}"


def finish_replacement(target: Path) -> None:
    """Finish the replacement of the files in ``target``, or undo it if the new set has not taken its place yet.

    The run may come from others, so links are not followed, and only files in these folders are moved or deleted.
    """
    new, old = _beside(target)
    for path in (new, old):
        if path.is_symlink():
            path.unlink()
    if not old.exists() and (new / _REPLACED).is_file():
        new.rename(old)
    if old.exists():
        target = target.resolve()
        if not target.exists():
            new.rename(target)
        sync_folder(target.parent)
        replaced = _replaced_in(old)
        for path in old.iterdir():
            if path.name not in (_REPLACED, *replaced) and not (target / path.name).exists():
                path.rename(target / path.name)
        sync_folder(target)
        for name in replaced:  # Deleted ahead of their list; without it, they would return after a kill.
            (old / name).unlink(missing_ok=True)
        sync_folder(old)
        shutil.rmtree(old, ignore_errors=True)
    shutil.rmtree(new, ignore_errors=True)
    (target / _REPLACED).unlink(missing_ok=True)


def _replaced_in(old: Path) -> list[str]:
    """Names of the files of the replaced set; entries that are no names are left out."""
    names = read_json(old / _REPLACED).get("files")
    return [name for name in names if is_file_name(name)] if isinstance(names, list) else []


def _beside(target: Path) -> tuple[Path, Path]:
    """Folders next to ``target`` that hold the new and the old files during a replacement."""
    # The target may be a link to a folder elsewhere.
    folder = target.resolve()
    return folder.with_name(f".{folder.name}.new"), folder.with_name(f".{folder.name}.old")


def _exchange(first: Path, second: Path) -> bool:
    """Exchange two folders in one step; returns whether the system and the file system support that."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:  # a C library without the function
        return False
    paths = os.fsencode(first), os.fsencode(second)
    return rename(_AT_CURRENT_FOLDER, paths[0], _AT_CURRENT_FOLDER, paths[1], ctypes.c_uint(_EXCHANGE)) == 0


def _number(path: Path) -> str:
    return path.name.removeprefix(_PREVIOUS)

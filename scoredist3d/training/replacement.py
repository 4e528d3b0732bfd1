"""Replacement of the files of a folder; the earlier set is kept in a subfolder and never mixed with the new one."""

from __future__ import annotations

import filecmp
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from scoredist3d.training.checkpoint import link_or_copy

_PREVIOUS = "previous-"


@dataclass(frozen=True)
class Replacement:
    """Plan for replacing the current set of files in a folder.

    Attributes:
        staging: Folder with the new files, on the same file system as ``target``.
        target: Folder of the current set.
        replaced: Names of all files of the current set, even unchanged ones; empty if none of them changes.
        previous: Folder in which the current set is kept, ``<target>/previous-<n>``; None if nothing is replaced.
    """

    staging: Path
    target: Path
    replaced: tuple[str, ...] = ()
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
        old = sorted(name for name in {*earlier, *new, *reports} if (target / name).is_file())
        gone = [name for name in old if name not in new | reports]
        same = all(filecmp.cmp(staging / name, target / name, shallow=False) for name in old if name in new - reports)
        if same and not gone:
            return cls(staging, target)
        taken = [int(number) for path in target.glob(f"{_PREVIOUS}*") if (number := _number(path)).isdecimal()]
        return cls(staging, target, tuple(old), target / f"{_PREVIOUS}{max(taken, default=0) + 1}")

    def apply(self, order: Iterable[str] = ()) -> None:
        """Keep the current files in ``previous`` and move each new file into place atomically.

        Args:
            order: Names of new files to move first, in this order; list a file after the files that it refers to.
        """
        self.target.mkdir(parents=True, exist_ok=True)
        new = list(dict.fromkeys([*order, *sorted(path.name for path in self.staging.iterdir())]))
        if self.previous is not None:
            self.previous.mkdir()
            for name in self.replaced:
                link_or_copy(self.target / name, self.previous / name)
        for name in new:
            os.replace(self.staging / name, self.target / name)
        for name in set(self.replaced) - set(new):
            (self.target / name).unlink()

    def describe(self) -> str:
        """Message about the replaced files; empty if nothing was replaced."""
        if self.previous is None:
            return ""
        return f"replaced {', '.join(self.replaced)}; the earlier files are in {self.previous}"


def _number(path: Path) -> str:
    return path.name.removeprefix(_PREVIOUS)

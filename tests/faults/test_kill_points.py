"""A run that is killed at any of its file operations loses nothing but the steps since its last checkpoint.

The process ends ahead of an operation, as it does if it receives SIGKILL. What it has written is then whole or absent,
and the resumed run ends with the same bits as an undisturbed one.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from shared.fault_cases import REPRESENTATIONS, FaultCase, spread

from scoredist3d.training.replacement import Replacement, finish_replacement

Cases = Callable[..., FaultCase]
DEFAULT = {"images": 12, "implicit-volume": 4, "extended": 4, "pipeline": 4}
"""Numbers of kill points of the cases of the default suite."""
EVERY = 12
"""With ``--slow``: distance of the kill points, where not every operation is one."""
SLOW = [*REPRESENTATIONS, "extended", "pipeline", "vsd"]


def lost(case: FaultCase, points: list[int]) -> list[str]:
    return [problem for number in points for problem in case.kill_at(number)]


@pytest.mark.parametrize(
    ("name", "share"), [(name, share) for name, number in DEFAULT.items() for share in range(number)]
)
def test_a_killed_run_resumes_to_the_same_result(fault_case: Cases, name: str, share: int) -> None:
    case = fault_case(name)
    points = spread(len(case.operations), DEFAULT[name])
    assert lost(case, [points[share]]) == []


def test_a_replacement_that_ends_while_it_deletes_brings_no_old_file_back(tmp_path: Path) -> None:
    """The list of the old files must not be deleted before them."""
    unlink, ends = os.unlink, 0
    while True:
        target, staging = tmp_path / f"{ends}" / "export", tmp_path / f"{ends}" / "staging"
        for folder, names in ((target, ["a", "b", "notes"]), (staging, ["c"])):
            folder.mkdir(parents=True)
            for name in names:
                (folder / name).write_text(name)
        left = ends

        def interrupted(*arguments: Any, **options: Any) -> None:
            nonlocal left
            if ".export.old" in str(arguments[0]) or "dir_fd" in options:
                if left == 0:
                    raise KeyboardInterrupt
                left -= 1
            unlink(*arguments, **options)

        with pytest.MonkeyPatch.context() as patch, suppress(KeyboardInterrupt):
            patch.setattr(os, "unlink", interrupted)
            Replacement.plan(staging, target, ["a", "b"]).apply()
        finish_replacement(target)
        assert sorted(path.name for path in target.iterdir()) == ["c", "notes", "previous-1"]
        assert [path.name for path in target.parent.iterdir()] == ["export"]
        if left > 0:
            return
        ends += 1


@pytest.mark.slow
def test_every_kill_point_of_images(fault_case: Cases) -> None:
    case = fault_case("images")
    assert lost(case, list(range(1, len(case.operations) + 1))) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_kill_points_of_every_representation(fault_case: Cases, name: str) -> None:
    case = fault_case(name)
    first = 2 + SLOW.index(name)  # Most operations are the same in all cases, so others are chosen in each.
    assert lost(case, list(range(first, len(case.operations) + 1, EVERY))) == []


@pytest.mark.slow
def test_kill_points_of_two_processes(fault_case: Cases) -> None:
    case = fault_case("images", "cpu:2")
    assert lost(case, spread(len(case.operations), 12)) == []

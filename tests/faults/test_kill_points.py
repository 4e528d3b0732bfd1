"""A run that is killed at any of its file operations loses nothing but the steps since its last checkpoint.

The process ends ahead of an operation, as it does if it receives SIGKILL. What it has written is then whole or absent,
and the resumed run ends with the same bits as an undisturbed one.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from shared.fault_cases import REPRESENTATIONS, FaultCase, spread

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

from __future__ import annotations

import math
from typing import Any

import pytest

from scoredist3d.config import Schedule


@pytest.mark.parametrize(
    ("shape", "quarter", "half"),
    [
        ("linear", 2.0 + 8.0 * 0.25, 6.0),
        ("cosine", 2.0 + 8.0 * 0.5 * (1 - math.cos(math.pi / 4)), 6.0),
        ("sqrt", 2.0 + 8.0 * 0.5, 2.0 + 8.0 * math.sqrt(0.5)),
        ("exp", 2.0 * 5.0**0.25, math.sqrt(20.0)),
        ("step", 2.0, 2.0),
    ],
)
def test_values_on_the_way(shape: str, quarter: float, half: float) -> None:
    schedule = Schedule.parse({"from": 2, "to": 10, "start": 100, "end": 200, "shape": shape})
    assert schedule(0) == schedule(100) == 2.0
    assert schedule(125) == pytest.approx(quarter, rel=1e-12)
    assert schedule(150) == pytest.approx(half, rel=1e-12)
    assert schedule(200) == schedule(10**9) == 10.0


def test_the_last_step_of_a_step_schedule_before_its_end_keeps_the_old_value() -> None:
    schedule = Schedule.parse({"from": 1, "to": 0, "end": 10, "shape": "step"})
    assert (schedule(9), schedule(10)) == (1.0, 0.0)


def test_a_decreasing_schedule_decreases() -> None:
    values = [Schedule.parse({"from": 1.0, "to": 0.1, "end": 4})(step) for step in range(5)]
    assert values == pytest.approx([1.0, 0.775, 0.55, 0.325, 0.1], rel=1e-12)


def test_a_number_is_constant_and_a_list_is_the_reference_form() -> None:
    assert Schedule.parse(3) == Schedule.constant(3.0)
    assert Schedule.parse(3)(12345) == 3.0
    assert Schedule.parse([10, 1.0, 2.0, 20]) == Schedule(1.0, 2.0, 10, 20, "linear")


@pytest.mark.parametrize("start_and_end", [(0, 0), (5, 5)])
def test_no_room_between_start_and_end_is_a_jump(start_and_end: tuple[int, int]) -> None:
    start, end = start_and_end
    schedule = Schedule.parse({"from": 1, "to": 2, "start": start, "end": end})
    assert schedule(end) == 2.0
    if start:
        assert schedule(start - 1) == 1.0


@pytest.mark.parametrize(
    "value",
    [4.0, [0, 1, 2, 30], {"from": 2, "to": 2, "start": 3, "end": 9}, {"from": 1, "to": 3, "end": 9, "shape": "cosine"}],
)
def test_to_config_parses_back(value: Any) -> None:
    schedule = Schedule.parse(value)
    assert Schedule.parse(schedule.to_config()) == schedule


@pytest.mark.parametrize(
    "value", [True, "abc", None, float("inf"), {"from": 1}, [1, 2], {"from": True, "to": 1, "end": 2}]
)
def test_anything_else_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=r"schedule|expected a number"):
        Schedule.parse(value)

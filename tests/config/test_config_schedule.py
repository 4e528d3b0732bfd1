from __future__ import annotations

import math
import random
from typing import Any

import pytest

from scoredist3d.config import ConfigError, Schedule


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
    assert Schedule.parse([10, 1.0, 2.0, 20]) == Schedule.ramp(1.0, 2.0, 10, 20, "linear")


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


def test_blocks_in_a_list_follow_each_other() -> None:
    schedule = Schedule.parse(
        [
            {"from": 1.0, "to": 0.5, "end": 100},
            {"to": 0.1, "end": 300, "shape": "exp"},
            {"from": 2.0, "to": 3.0, "start": 400, "end": 500},
        ]
    )
    assert [schedule(step) for step in (0, 50, 100)] == [1.0, 0.75, 0.5]
    assert schedule(200) == pytest.approx(0.5 * 0.2**0.5, rel=1e-12)
    assert schedule(300) == schedule(399) == 0.1, "the value stays between segments"
    assert [schedule(step) for step in (400, 450, 500, 10**9)] == [2.0, 2.5, 3.0, 3.0]
    assert schedule.values == (1.0, 0.5, 0.5, 0.1, 2.0, 3.0)
    assert (schedule.start_value, schedule.end_value, schedule.start, schedule.end) == (1.0, 3.0, 0, 500)


def test_key_points_and_the_long_list_give_the_same_segments() -> None:
    points = Schedule.parse([[10, 1.0], [20, 2.0], [50, 0.5]])
    assert points == Schedule.parse([10, 1.0, 2.0, 20, 0.5, 50])
    assert points == Schedule.parse([{"from": 1, "to": 2, "start": 10, "end": 20}, {"to": 0.5, "end": 50}])
    assert [points(step) for step in (0, 10, 15, 20, 35, 50, 51)] == [1.0, 1.0, 1.5, 2.0, 1.25, 0.5, 0.5]


def test_two_key_points_at_one_step_are_a_jump() -> None:
    schedule = Schedule.parse([[0, 1], [100, 1], [100, 0], [200, 0.5]])
    assert [schedule(step) for step in (0, 99, 100, 150, 200)] == [1.0, 1.0, 0.0, 0.25, 0.5]
    assert Schedule.parse([[7, 3]])(0) == Schedule.parse([[7, 3]])(9) == 3.0


def test_the_long_list_agrees_with_the_reference_framework() -> None:
    """threestudio's rule for lists of six and more numbers, written out."""
    items = [100, 1.0, 4.0, 300, 2.0, 500, 8.0, 1000]
    schedule = Schedule.parse(items)
    for step in range(0, 1200, 7):
        chosen = max([3, *(i + 2 for i in range(3, len(items) - 2, 2) if step >= items[i])])
        if chosen == 3:
            (start, first), (second, end) = items[:2], items[2:4]
        else:
            first, start, second, end = items[chosen - 3 : chosen + 1]
        progress = max(min(1.0, (step - start) / (end - start)), 0.0)
        assert schedule(step) == pytest.approx(first + (second - first) * progress, rel=1e-12)


def random_schedule(draw: random.Random) -> list[dict[str, Any]]:
    blocks: list[dict[str, Any]] = []
    step = 0
    for _ in range(draw.randint(1, 5)):
        start = step + draw.choice([0, 0, 3])
        step = start + draw.randint(0, 20)
        block = {"from": draw.uniform(0.1, 5), "to": draw.uniform(0.1, 5), "start": start, "end": step}
        blocks.append(block | {"shape": draw.choice(["linear", "cosine", "exp", "sqrt", "step"])})
    return blocks


@pytest.mark.parametrize("seed", range(50))
def test_properties_of_schedules_of_many_segments(seed: int) -> None:
    blocks = random_schedule(random.Random(seed))
    schedule = Schedule.parse(blocks)
    assert Schedule.parse(schedule.to_config()) == schedule
    values = [schedule(step) for step in range(schedule.end + 10)]
    low, high = min(schedule.values), max(schedule.values)
    assert all(low - 1e-12 <= value <= high + 1e-12 for value in values)
    assert (values[schedule.end], values[-1]) == (schedule.end_value, schedule.end_value)
    for segment in schedule.segments:
        alone = Schedule((segment,))
        inside = range(segment.start + 1, segment.end)
        assert [schedule(step) for step in inside] == [alone(step) for step in inside]
    if schedule.never_rises:
        assert values == sorted(values, reverse=True)
    assert schedule.is_constant == (len(set(schedule.values)) == 1)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([{"from": 1, "to": 2, "end": 9}, {"to": 3, "start": 8, "end": 20}], "overlap: a segment starts at step 8"),
        ([{"to": 2, "end": 9}], "a schedule requires the key 'from'"),
        ([{"from": 1, "to": 2, "end": 9}, {"to": 3}], "a schedule requires the key 'end'"),
        ([[0, 1], [5, 2, 3]], r"a key point of a schedule must be two numbers \[step, value\], got \[5, 2, 3\]"),
        ([[5, 1], [0, 2]], "must not decrease, got 0 after 5"),
        ([[0.5, 1], [2, 2]], "the steps of a schedule must be whole numbers"),
        ([0, 1, 2, 3, 4], r"and a further pair \(to, end_step\) for each additional segment"),
        ([{"from": 1, "to": 2, "end": 9}, [5, 2]], "a schedule list must consist of numbers"),
        ([], "a schedule must be a number, a block"),
    ],
)
def test_a_wrong_part_of_a_schedule_is_named(value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Schedule.parse(value)


@pytest.mark.parametrize("value", [[[0, "1e-1"], [10, 2]], [{"from": "0.1", "to": 2, "end": 10}, {"to": 3, "end": 11}]])
def test_fields_take_every_form_and_bounds_hold_for_every_segment(value: Any) -> None:
    from scoredist3d.guidance.sds import ScoreDistillationSampling as SDS

    assert SDS.Config(grad_clip=value).grad_clip(0) == 0.1
    with pytest.raises(ConfigError, match=r"grad_clip: must be a number > 0"):
        SDS.Config(grad_clip=[[0, 1], [5, -1], [10, 1]])  # type: ignore[arg-type]

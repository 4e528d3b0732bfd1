"""Values that change with the optimizer step."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

SHAPES = ("linear", "cosine", "exp", "sqrt", "step")
KEYS = ("from", "to", "start", "end", "shape")


@dataclass(frozen=True)
class Segment:
    """A transition from one value to another between two steps.

    The value is ``start_value`` up to step ``start`` and ``end_value`` from step ``end`` on. In between, with progress
    p = (step - start) / (end - start):

    * ``linear`` interpolates in p;
    * ``cosine`` interpolates in (1 - cos pi p) / 2, which is flat at both ends;
    * ``exp`` interpolates geometrically, so both values must be positive;
    * ``sqrt`` interpolates in sqrt(p) (HiFA's annealing);
    * ``step`` stays at ``start_value`` and jumps to ``end_value`` at ``end``.
    """

    start_value: float
    end_value: float
    start: int = 0
    end: int = 0
    shape: str = "linear"

    def __call__(self, step: int) -> float:
        """The value at an optimizer step."""
        if step >= self.end:
            return self.end_value
        if step <= self.start or self.shape == "step":
            return self.start_value
        p = (step - self.start) / (self.end - self.start)
        if self.shape == "exp":
            return self.start_value * (self.end_value / self.start_value) ** p
        if self.shape == "cosine":
            p = 0.5 * (1.0 - math.cos(math.pi * p))
        elif self.shape == "sqrt":
            p = math.sqrt(p)
        return self.start_value + (self.end_value - self.start_value) * p

    def to_config(self) -> dict[str, Any]:
        """The mapping ``{from, to, start, end, shape}`` that describes this segment in a config."""
        return dict(zip(KEYS, (self.start_value, self.end_value, self.start, self.end, self.shape), strict=True))


@dataclass(frozen=True)
class Schedule:
    """A number that may depend on the optimizer step: a constant, or a sequence of :class:`Segment` objects.

    Between two segments, the value is the end value of the earlier one. :meth:`parse` lists the forms that a config
    value may have.

    Attributes:
        segments: One or more segments; each starts at or after the end of the previous one.
    """

    segments: tuple[Segment, ...]

    @classmethod
    def constant(cls, value: float) -> Schedule:
        """A schedule with the same value at every step."""
        return cls.ramp(value, value)

    @classmethod
    def ramp(
        cls, start_value: float, end_value: float, start: int = 0, end: int = 0, shape: str = "linear"
    ) -> Schedule:
        """A schedule with one segment."""
        return cls((Segment(float(start_value), float(end_value), start, end, shape),))

    @classmethod
    def parse(cls, value: Any) -> Schedule:
        """The schedule that a config value describes.

        Args:
            value: One of

                * a number;
                * ``{from, to, start, end, shape}``, where ``start`` is 0 and ``shape`` linear by default;
                * a list of such blocks; by default, ``from`` and ``start`` of a block equal ``to`` and ``end`` of
                  the previous one;
                * key points ``[[step, value], ...]``, with linear interpolation between them;
                * ``[start_step, from, to, end_step]``, the form of threestudio; each further pair ``to, end_step``
                  adds a segment.

        Raises:
            ValueError: The value has none of these forms, or a part of it is invalid; the message names that part.
        """
        if isinstance(value, Schedule):
            return value
        if _is_number(value):
            return cls.constant(value)
        if isinstance(value, dict):
            return cls(_segments([value]))
        if isinstance(value, (list, tuple)) and value:
            if all(isinstance(item, dict) for item in value):
                return cls(_segments(value))
            if all(isinstance(item, (list, tuple)) for item in value):
                return cls(_from_points(value))
            return cls(_from_flat_list(list(value)))
        raise ValueError(
            "a schedule must be a number, a block {from, to, start, end, shape}, a list of blocks, key points "
            f"[[step, value], ...] or [start_step, from, to, end_step], got {value!r}"
        )

    def __call__(self, step: int) -> float:
        """The value at an optimizer step."""
        current = self.segments[0]
        for segment in self.segments[1:]:
            if segment.start > step:
                break
            current = segment
        return current(step)

    @property
    def values(self) -> tuple[float, ...]:
        """Start and end value of each segment, in order; the schedule never leaves the range of these values."""
        return tuple(value for segment in self.segments for value in (segment.start_value, segment.end_value))

    @property
    def steps(self) -> tuple[int, ...]:
        """Start and end step of each segment, in order."""
        return tuple(step for segment in self.segments for step in (segment.start, segment.end))

    @property
    def start_value(self) -> float:
        """The value at the first step."""
        return self.segments[0].start_value

    @property
    def end_value(self) -> float:
        """The value after the last segment."""
        return self.segments[-1].end_value

    @property
    def start(self) -> int:
        """The step at which the first segment starts."""
        return self.segments[0].start

    @property
    def end(self) -> int:
        """The step at which the last segment ends."""
        return self.segments[-1].end

    @property
    def is_constant(self) -> bool:
        """Whether the value is the same at every step."""
        return len(set(self.values)) == 1

    @property
    def never_rises(self) -> bool:
        """Whether no value is larger than an earlier one."""
        return all(later <= earlier for earlier, later in pairwise(self.values))

    def to_config(self) -> Any:
        """The simplest config value that parses to this schedule."""
        if self == Schedule.constant(self.start_value):
            return self.start_value
        blocks = [segment.to_config() for segment in self.segments]
        return blocks if len(blocks) > 1 else blocks[0]


def _segments(blocks: Iterable[dict[str, Any]]) -> tuple[Segment, ...]:
    """Segments from blocks ``{from, to, start, end, shape}``; ``start`` is the end of the previous one by default."""
    segments: list[Segment] = []
    for block in blocks:
        defaults: dict[str, Any] = {"start": 0, "shape": "linear"}
        if segments:
            defaults |= {"from": segments[-1].end_value, "start": segments[-1].end}
        segment = _segment(defaults | block)
        if segments and segment.start < segments[-1].end:
            raise ValueError(
                f"segments of a schedule must not overlap: a segment starts at step {segment.start}, but the previous "
                f"segment ends at step {segments[-1].end}"
            )
        segments.append(segment)
    return tuple(segments)


def _segment(items: dict[str, Any]) -> Segment:
    unknown = sorted(map(str, items.keys() - set(KEYS)))
    if unknown:
        raise ValueError(f"the keys of a schedule are {', '.join(KEYS)}; got {unknown[0]!r}")
    for key in ("from", "to", "end"):
        if key not in items:
            raise ValueError(f"a schedule requires the key {key!r} (required: from, to, end; optional: start, shape)")
    for key in ("from", "to", "start", "end"):
        if not _is_number(items[key]):
            raise ValueError(f"the key {key!r} of a schedule must be a number, got {items[key]!r}")
    start_value, end_value, start, end, shape = (items[key] for key in KEYS)
    if shape not in SHAPES:
        raise ValueError(f"the shape of a schedule must be one of {', '.join(SHAPES)}, got {shape!r}")
    if start != int(start) or end != int(end) or start < 0 or end < start:
        raise ValueError(
            f"the steps of a schedule must be whole numbers with 0 <= start <= end, got start={start}, end={end}"
        )
    if shape == "exp" and min(start_value, end_value) <= 0:
        raise ValueError("a schedule of shape exp requires from > 0 and to > 0")
    return Segment(float(start_value), float(end_value), int(start), int(end), shape)


def _from_points(points: Iterable[Any]) -> tuple[Segment, ...]:
    points = list(points)
    for point in points:
        if len(point) != 2 or not all(_is_number(number) for number in point):
            raise ValueError(f"a key point of a schedule must be two numbers [step, value], got {point!r}")
    for (earlier, _), (later, _) in pairwise(points):
        if later < earlier:
            raise ValueError(f"the steps of key points of a schedule must not decrease, got {later} after {earlier}")
    if len(points) == 1:
        points *= 2
    return _segments(
        {"from": first, "to": second, "start": start, "end": end} for (start, first), (end, second) in pairwise(points)
    )


def _from_flat_list(items: list[Any]) -> tuple[Segment, ...]:
    """Segments of ``[start_step, from, to, end_step, to, end_step, ...]``."""
    if len(items) < 4 or len(items) % 2 or not all(_is_number(item) for item in items):
        raise ValueError(
            "a schedule list must consist of numbers: [start_step, from, to, end_step], and a further pair "
            f"(to, end_step) for each additional segment; got {items!r}"
        )
    first = {"start": items[0], "from": items[1], "to": items[2], "end": items[3]}
    return _segments([first, *({"to": items[i], "end": items[i + 1]} for i in range(4, len(items), 2))])


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max

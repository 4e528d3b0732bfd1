"""Values that change with the optimiser step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

SHAPES = ("linear", "cosine", "exp", "sqrt", "step")


@dataclass(frozen=True)
class Schedule:
    """A number that may depend on the optimiser step.

    Accepted forms (see :meth:`parse`): a number; ``{from, to, start, end, shape}``; the list ``[start_step, from, to,
    end_step]`` of the reference framework. Before ``start`` the value is ``from``, after ``end`` it is ``to``. With
    progress p = (step - start) / (end - start) in [0, 1]: ``linear`` interpolates in p, ``cosine`` in (1 - cos pi p)
    / 2, ``exp`` geometrically (both ends positive), ``sqrt`` in sqrt(p) (HiFA's annealing), ``step`` jumps at ``end``.
    """

    start_value: float
    end_value: float
    start: int = 0
    end: int = 0
    shape: str = "linear"

    @classmethod
    def constant(cls, value: float) -> Schedule:
        """The same value at every step."""
        return cls(float(value), float(value))

    @classmethod
    def parse(cls, value: Any) -> Schedule:
        """Build a schedule from a config value.

        Raises:
            ValueError: Not one of the accepted forms; the message says which part is wrong.
        """
        if isinstance(value, Schedule):
            return value
        if _is_number(value):
            return cls.constant(value)
        if isinstance(value, (list, tuple)):
            return cls._parse_list(list(value))
        if isinstance(value, dict):
            return cls._parse_dict(dict(value))
        raise ValueError(
            f"expected a number, {{from, to, start, end, shape}} or [start_step, from, to, end_step], got {value!r}"
        )

    @classmethod
    def _parse_list(cls, items: list[Any]) -> Schedule:
        if len(items) != 4 or not all(_is_number(item) for item in items):
            raise ValueError(f"a schedule list is [start_step, from, to, end_step] with four numbers, got {items!r}")
        return cls._checked(items[1], items[2], items[0], items[3], "linear")

    @classmethod
    def _parse_dict(cls, items: dict[str, Any]) -> Schedule:
        unknown = sorted(set(items) - {"from", "to", "start", "end", "shape"})
        if unknown:
            raise ValueError(f"a schedule has the keys from, to, start, end, shape; got {unknown[0]!r}")
        for key in ("from", "to", "end"):
            if key not in items:
                raise ValueError(f"a schedule needs {key!r} (from, to, end; optionally start, shape)")
        for key in ("from", "to", "start", "end"):
            if key in items and not _is_number(items[key]):
                raise ValueError(f"a schedule's {key!r} must be a number, got {items[key]!r}")
        return cls._checked(
            items["from"], items["to"], items.get("start", 0), items["end"], items.get("shape", "linear")
        )

    @classmethod
    def _checked(cls, start_value: float, end_value: float, start: float, end: float, shape: str) -> Schedule:
        if shape not in SHAPES:
            raise ValueError(f"a schedule's shape is one of {', '.join(SHAPES)}, got {shape!r}")
        if start != int(start) or end != int(end) or start < 0 or end < start:
            raise ValueError(
                f"a schedule's steps must be whole numbers with 0 <= start <= end, got start={start}, end={end}"
            )
        if shape == "exp" and min(start_value, end_value) <= 0:
            raise ValueError("an exp schedule needs from > 0 and to > 0")
        return cls(float(start_value), float(end_value), int(start), int(end), shape)

    def __call__(self, step: int) -> float:
        """The value at an optimiser step."""
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

    @property
    def values(self) -> tuple[float, float]:
        """Both ends; every value lies between them."""
        return self.start_value, self.end_value

    def to_config(self) -> Any:
        """The plainest form that parses back to this schedule."""
        if self == Schedule.constant(self.start_value):
            return self.start_value
        return {
            "from": self.start_value,
            "to": self.end_value,
            "start": self.start,
            "end": self.end,
            "shape": self.shape,
        }


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)

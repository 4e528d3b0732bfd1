"""Members of one procedural family with chosen proportions, for searches among them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor

from scoredist3d.procedural.attributes import CATEGORIES, FAMILIES, SIZE_STRETCH
from scoredist3d.procedural.batch import Batch
from scoredist3d.procedural.builder import Builder, fit
from scoredist3d.procedural.families import BUILDERS
from scoredist3d.procedural.objects import EXTENT, Objects, color_limits, mean_colors, needs_two

_BuilderKind = TypeVar("_BuilderKind", bound=Builder)


@dataclass(frozen=True)
class Proportions(Batch):
    """What distinguishes the shapes of ``N`` members of one family.

    Attributes:
        mode: (N,) int64, structural variant.
        size: (N,) int64, index into SIZES.
        values: (N, K), the K numbers that the family draws and, last, the extent, each as a fraction in [0, 1] of its
            range.
    """

    mode: Tensor
    size: Tensor
    values: Tensor

    def __len__(self) -> int:
        return len(self.mode)

    @classmethod
    def cat(cls, parts: list[Proportions]) -> Proportions:
        """Concatenate members of the same family."""
        return cls(
            torch.cat([part.mode for part in parts]),
            torch.cat([part.size for part in parts]),
            torch.cat([part.values for part in parts]),
        )


class _Given(Builder):
    """A builder whose random numbers are the columns of ``values``, in the order in which the family draws them."""

    values: Tensor
    drawn: int = 0

    def uniform(self, low: float, high: float) -> Tensor:
        """The next column, as a fraction of the range."""
        self.drawn += 1
        return low + (high - low) * self.values[:, self.drawn - 1]


class _Counting(Builder):
    """A builder that counts the random numbers of a family."""

    drawn: int = 0

    def uniform(self, low: float, high: float) -> Tensor:
        """The middle of the range."""
        self.drawn += 1
        return self.number((low + high) / 2)


@dataclass(frozen=True)
class ObjectFamily:
    """One family in one look; its members have the mean colors of the family, without jitter.

    Attributes:
        category: Name of the family.
        look: Indices of color, second color, pattern and finish, as in
            :func:`~scoredist3d.procedural.sample_objects`.
        device: Device of the members.

    Raises:
        ValueError: No family has this name.
    """

    category: str
    look: Mapping[str, int]
    device: torch.device

    def __post_init__(self) -> None:
        if self.category not in CATEGORIES:
            raise ValueError(f"category: there is no family {self.category!r}; choose one of {', '.join(CATEGORIES)}")

    @property
    def modes(self) -> int:
        """Number of structural variants."""
        return len(FAMILIES[CATEGORIES.index(self.category)].modes)

    @cached_property
    def dimensions(self) -> int:
        """Number of columns of :attr:`Proportions.values`."""
        builder = self._builder(_Counting, torch.zeros(1, dtype=torch.int64, device=self.device))
        BUILDERS[self.category](builder)
        return builder.drawn + 1

    def build(self, proportions: Proportions) -> Objects:
        """The members with these proportions."""
        count = len(proportions)
        builder = self._builder(_Given, proportions.mode)
        builder.values = proportions.values
        BUILDERS[self.category](builder)
        geometry, surface = builder.tables()
        factors = torch.tensor(SIZE_STRETCH, device=self.device)[proportions.size]
        extent = EXTENT[0] + (EXTENT[1] - EXTENT[0]) * proportions.values[:, -1]
        index = CATEGORIES.index(self.category)
        geometry = fit(geometry, builder.num_pieces, factors, extent, axial=FAMILIES[index].symmetry != 1)
        look = {name: torch.full_like(proportions.mode, value) for name, value in self.look.items()}
        category = torch.full((count,), index, device=self.device)
        return Objects(geometry, surface, category, size=proportions.size, mode=proportions.mode, **look)

    def _builder(self, kind: type[_BuilderKind], mode: Tensor) -> _BuilderKind:
        color, second, pattern, finish = (
            torch.full_like(mode, self.look[name]) for name in ("color", "second_color", "pattern", "finish")
        )
        first_value = mean_colors(color, pattern).clamp(*color_limits(color))
        second_value = mean_colors(second).clamp(*color_limits(second))
        second_value = torch.where((second == color)[:, None], first_value, second_value)
        two_tone = (second != color) & ~needs_two(pattern)
        generator = torch.Generator(self.device)  # not used: the proportions are given
        return kind(mode, first_value, second_value, pattern, two_tone, generator, finish)

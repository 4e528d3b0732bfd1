"""What every regulariser offers to the training step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

from scoredist3d.config import ComponentConfig, Schedule, option
from scoredist3d.geometry.base import Geometry
from scoredist3d.renderers.base import Render
from scoredist3d.seeding import Rng


class Loss(ABC):
    """One term of the objective; its value is unweighted, so that a log line means the same under every weight.

    Attributes:
        needs: Names of the maps that renders must carry while the term's weight is not zero
            (see :class:`~scoredist3d.renderers.base.Render`).
        applies_to: Protocol of :mod:`scoredist3d.geometry.protocols` (or base class) that the geometry must satisfy.
    """

    @dataclass
    class Config(ComponentConfig):
        """Options of every loss."""

        weight: Schedule = option(1.0, "Factor of the term in the objective; the term is skipped while it is 0.", ge=0)

    needs: frozenset[str] = frozenset()
    applies_to: type = Geometry

    def __init__(self, config: Config) -> None:
        self._weight = config.weight

    def weight(self, step: int) -> float:
        """The factor at an optimiser step."""
        return self._weight(step)

    @abstractmethod
    def __call__(self, render: Render, geometry: Geometry, step: int, rng: Rng) -> Tensor:
        """The term's value, a scalar that may be differentiated.

        Args:
            render: The views of this step.
            geometry: What they show.
            step: Optimiser step.
            rng: Source of the term's own randomness, e.g. points to look at.
        """

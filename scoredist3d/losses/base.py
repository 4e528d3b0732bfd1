"""Interface of losses."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

from scoredist3d.config import ComponentConfig, Schedule, option
from scoredist3d.geometry.base import Geometry
from scoredist3d.renderers.base import Render
from scoredist3d.seeding import Rng


class Loss(ABC):
    """Base class of losses, which are regularization terms of the objective.

    The value of a loss is unweighted, so logged values are comparable across runs with different weights.

    Attributes:
        config: Options.
        needs: Names of the optional maps of :class:`~scoredist3d.renderers.base.Render` that the loss reads. They are
            rendered while the weight is not 0.
        applies_to: Protocol of :mod:`scoredist3d.geometry.protocols` (or base class) that the geometry must satisfy.
    """

    @dataclass
    class Config(ComponentConfig):
        """Options shared by all losses."""

        weight: Schedule = option(1.0, "Weight of the loss in the objective; the loss is skipped while it is 0.", ge=0)

    config: Config
    needs: frozenset[str] = frozenset()
    applies_to: type = Geometry

    def __init__(self, config: Config) -> None:
        self.config = config

    def weight(self, step: int) -> float:
        """The weight at an optimizer step."""
        return self.config.weight(step)

    @abstractmethod
    def __call__(self, render: Render, geometry: Geometry, step: int, rng: Rng) -> Tensor:
        """The unweighted value, a differentiable scalar.

        Args:
            render: The views of the step.
            geometry: The rendered geometry.
            step: Optimizer step.
            rng: Random streams, for losses that sample points.
        """

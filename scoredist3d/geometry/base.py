"""What every geometry offers to renderers, losses and exporters."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from scoredist3d.config import ComponentConfig, option


@dataclass(frozen=True)
class GeometryOutput:
    """A field at ``N`` points.

    Attributes:
        density: (N,), extinction per scene unit, >= 0.
        features: (N, F), unbounded; the material turns them into colour.
        normal: (N, 3) unit vectors pointing out of the object, or ``None`` where not asked for.
    """

    density: Tensor
    features: Tensor
    normal: Tensor | None = None


class Geometry(nn.Module, ABC):
    """A field in the ball of ``radius`` around the origin; empty outside of it.

    Attributes:
        radius: Scene units.
        num_features: F, the number of feature channels.
    """

    @dataclass
    class Config(ComponentConfig):
        """Options of every geometry."""

        radius: float = option(1.0, "Radius of the ball that holds the object, in scene units.", gt=0)

    num_features: int

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.radius = config.radius

    @abstractmethod
    def forward(self, points: Tensor, *, with_normal: bool = False) -> GeometryOutput:
        """The field at (N, 3) world points."""

    @abstractmethod
    def density(self, points: Tensor) -> Tensor:
        """(N,) densities at (N, 3) world points; cheaper than :meth:`forward`."""

    def update_step(self, step: int) -> None:
        """Set everything that depends on the optimiser step, from ``step`` alone, so that resuming needs no state."""

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Optimiser groups ``{"name", "params"}``; the optimiser block may give each name its own learning rate."""
        return [{"name": "geometry", "params": list(self.parameters())}]

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device

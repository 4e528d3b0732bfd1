"""Fixed background color."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from scoredist3d.backgrounds.base import Background
from scoredist3d.config import option
from scoredist3d.registry import register
from scoredist3d.seeding import Rng


@register("background", "solid", summary="Fixed color, white by default.")
class Solid(Background):
    """The same color in all directions."""

    @dataclass
    class Config(Background.Config):
        """Options of the solid background."""

        color: tuple[float, float, float] = option((1.0, 1.0, 1.0), "RGB color.", ge=0, le=1)

    def __init__(self, config: Config, *, rng: Rng | None = None, num_channels: int = 3) -> None:
        super().__init__(config, num_channels=num_channels)
        self.color = config.color

    def forward(self, directions: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """(B, H, W, 3), the constant color."""
        return directions.new_tensor(self.color).expand_as(directions)

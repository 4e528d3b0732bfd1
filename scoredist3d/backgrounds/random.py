"""Random constant background colors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from scoredist3d.backgrounds.base import Background
from scoredist3d.config import option
from scoredist3d.registry import register
from scoredist3d.seeding import Rng


@register("background", "random", summary="Random constant color per training image; fixed color in evaluation.")
class Random(Background):
    """A constant color per image, drawn anew for each training image.

    With a changing background, the object cannot blend into the background. The distribution of colors should match
    the training images of the prior, since an unfamiliar background affects its predictions for the object.
    """

    @dataclass
    class Config(Background.Config):
        """Options of the random background."""

        mode: Literal["gray", "rgb"] = option("gray", "Draw one gray value or three independent channels per image.")
        value_range: tuple[float, float] = option((0.0, 1.0), "Smallest and largest random value.", ge=0, le=1)
        white_probability: float = option(0.5, "Probability of white in place of the random color.", ge=0, le=1)
        evaluation_color: tuple[float, float, float] = option((1.0, 1.0, 1.0), "RGB color in evaluation.", ge=0, le=1)

        def validate(self) -> list[str]:
            """Check that the range is ordered."""
            low, high = self.value_range
            if low > high:
                return [
                    *super().validate(),
                    f"value_range: the first value must not exceed the second, got [{low}, {high}]",
                ]
            return super().validate()

    def __init__(self, config: Config, *, rng: Rng | None = None, num_channels: int = 3) -> None:
        super().__init__(config, num_channels=num_channels)
        self.config = config

    def forward(self, directions: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """(B, H, W, 3), constant within each image."""
        if generator is None:
            return directions.new_tensor(self.config.evaluation_color).expand_as(directions)
        batch, device = directions.shape[0], directions.device
        low, high = self.config.value_range
        # Both modes draw three values, so that they leave the generator in the same state.
        values = low + (high - low) * torch.rand(batch, 3, generator=generator, device=device)
        colors = values if self.config.mode == "rgb" else values[:, :1].expand(batch, 3)
        white = torch.rand(batch, 1, generator=generator, device=device) < self.config.white_probability
        colors = torch.where(white, torch.ones_like(colors), colors)
        return colors[:, None, None, :].expand_as(directions)

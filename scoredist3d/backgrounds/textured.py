"""A picture of all directions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from scoredist3d.backgrounds.base import Background
from scoredist3d.config import option
from scoredist3d.meshes.images import load_radiance
from scoredist3d.ops.shading.color import linear_to_srgb
from scoredist3d.ops.shading.environment import resize_panorama, sample_panorama
from scoredist3d.registry import register
from scoredist3d.seeding import Rng

_MARGIN = 1e-3  # keeps the logits of black and white finite


@register("background", "textured", summary="An image around the object, learned or from a file.")
class Textured(Background):
    """rgb(d) = bilinear samples of sigmoid(texture), an equirectangular image whose centre is seen looking along +x.

    Sharper than ``environment``, whose network joins neighbouring directions, and without its limit on detail. With
    some probability a training image gets a random uniform colour instead, so that the background cannot take over
    what the object should show.
    """

    @dataclass
    class Config(Background.Config):
        """Options of the textured background."""

        height: int = option(64, "Rows of the texture.", ge=2, le=4096)
        width: int = option(128, "Columns of the texture.", ge=2, le=8192)
        image: str | None = option(
            None,
            "Equirectangular .hdr or 8-bit image to start from; null starts mid gray. Radiance above 1 is white.",
            file=True,
        )
        learned: bool = option(True, "Optimise the texture.")
        random_probability: float = option(0.5, "How often a training image gets a random colour instead.", ge=0, le=1)

        def validate(self) -> list[str]:
            """What is not learned must be given."""
            problems = super().validate()
            if not self.learned and self.image is None:
                problems.append("image: give a file, or set learned to true; a texture that is neither is plain gray")
            return problems

    def __init__(self, config: Config, *, rng: Rng | None = None, num_channels: int = 3) -> None:
        super().__init__(config, num_channels=num_channels)
        self.config = config
        colors = torch.full((config.height, config.width, 3), 0.5)
        if config.image is not None:
            radiance = load_radiance(config.image, key="image")
            colors = linear_to_srgb(resize_panorama(radiance, config.height, config.width).clamp(0.0, 1.0))
        self.texture = nn.Parameter(torch.logit(colors, eps=_MARGIN), requires_grad=config.learned)

    def forward(self, directions: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """(B, H, W, 3) of the image, or in some training images one random colour."""
        shown = sample_panorama(self.texture.sigmoid(), directions.reshape(-1, 3)).view_as(directions)
        if generator is None:
            return shown
        batch, device = directions.shape[0], directions.device
        colors = torch.rand(batch, 1, 1, 3, generator=generator, device=device)
        replaced = torch.rand(batch, 1, 1, 1, generator=generator, device=device) < self.config.random_probability
        return torch.where(replaced, colors, shown)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The texture, where it is learned."""
        return super().parameter_groups() if self.config.learned else []

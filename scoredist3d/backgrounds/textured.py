"""Background from an equirectangular panorama."""

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


@register("background", "textured", summary="Equirectangular image, learned or from a file.")
class Textured(Background):
    """Panorama color rgb(d), a bilinear sample of sigmoid(texture) at direction d.

    The texture is an equirectangular image centered at +x. Each texel is independent, so the image can be sharper than
    with ``environment``. With ``random_probability``, a training image gets a random constant color instead, which
    prevents the background from depicting the object.
    """

    @dataclass
    class Config(Background.Config):
        """Options of the textured background."""

        height: int = option(64, "Rows of the texture.", ge=2, le=4096)
        width: int = option(128, "Columns of the texture.", ge=2, le=8192)
        image: str | None = option(
            None,
            "Initial equirectangular .hdr or 8-bit image; null is mid gray. Radiance is clamped to 1.",
            file=True,
        )
        learned: bool = option(True, "Optimize the texture.")
        random_probability: float = option(
            0.5, "Probability of a random constant color in a training image.", ge=0, le=1
        )

        def validate(self) -> list[str]:
            """Check that a texture that is not learned comes from a file."""
            problems = super().validate()
            if not self.learned and self.image is None:
                problems.append(
                    "image: a texture that is not learned needs an image; give a file or set learned to true"
                )
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
        """(B, H, W, 3), the panorama or, in some training images, a random constant color."""
        shown = sample_panorama(self.texture.sigmoid(), directions.reshape(-1, 3)).view_as(directions)
        if generator is None:
            return shown
        batch, device = directions.shape[0], directions.device
        colors = torch.rand(batch, 1, 1, 3, generator=generator, device=device)
        replaced = torch.rand(batch, 1, 1, 1, generator=generator, device=device) < self.config.random_probability
        return torch.where(replaced, colors, shown)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The texture, if it is learned."""
        return super().parameter_groups() if self.config.learned else []

"""A stack of images as the representation: where methods are compared without a renderer in between."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from scoredist3d.config import ComponentConfig, option
from scoredist3d.registry import register
from scoredist3d.seeding import Rng


@register("geometry", "image-canvas", summary="N independent images, as pixels or latents; for text-to-2d only.")
class ImageCanvas(nn.Module):
    """``N`` particles that are optimised independently.

    ``pixels`` holds display values around [0, 1] without any squashing (the identity renderer of the score distillation
    literature); ``latents`` holds what the prior's denoiser sees, so that encoder and decoder take no part.
    """

    @dataclass
    class Config(ComponentConfig):
        """Options of the canvas."""

        parametrisation: Literal["pixels", "latents"] = option("latents", "What is optimised.")
        particles: int = option(4, "Number of images.", ge=1)
        size: int | None = option(None, "Pixels per side; the prior's own size where not given.", ge=8, le=4096)
        initial_std: float = option(
            1.0, "Deviation of the normal initialisation, in units of latents; pixels use half of it around gray.", ge=0
        )

    def __init__(self, config: Config, *, prior: Any, rng: Rng | None = None) -> None:
        super().__init__()
        self.config = config
        self.size: int = config.size or prior.image_size
        generator = (rng or Rng()).shared()("canvas")
        if config.parametrisation == "latents":
            shape = (config.particles, *prior.latent_shape(self.size, self.size))
            values = config.initial_std * torch.randn(shape, generator=generator)
        else:
            shape = (config.particles, self.size, self.size, 3)
            values = 0.5 + 0.5 * config.initial_std * torch.randn(shape, generator=generator)
        self.values = nn.Parameter(values)

    def latents(self, prior: Any, index: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """(B, C, h, w) of the particles in ``index`` (B,), differentiable; pixels pass the prior's encoder."""
        values = self.values[index]
        return values if self.config.parametrisation == "latents" else prior.encode(values, generator)

    @torch.no_grad()
    def images(self, prior: Any) -> Tensor:
        """(N, H, W, 3) in [0, 1]; latents pass the prior's decoder."""
        values = prior.decode(self.values) if self.config.parametrisation == "latents" else self.values
        return values.clamp(0.0, 1.0)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """One group, ``canvas``."""
        return [{"name": "canvas", "params": [self.values]}]

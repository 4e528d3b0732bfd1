"""Opaque loss: penalizes semi-transparent pixels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from scoredist3d.config import option
from scoredist3d.geometry.base import Geometry
from scoredist3d.losses.base import Loss
from scoredist3d.registry import register
from scoredist3d.renderers.base import Render
from scoredist3d.seeding import Rng


@register("loss", "opaque", summary="Entropy of the opacity; favors empty or opaque pixels.")
class Opaque(Loss):
    """Mean over pixels of -O log O - (1 - O) log(1 - O), with O clamped to [margin, 1 - margin]."""

    @dataclass
    class Config(Loss.Config):
        """Options of the opaque loss."""

        margin: float = option(1e-3, "Opacities within this distance of 0 or 1 get no gradient.", gt=0, lt=0.5)

    config: Config

    def __call__(self, render: Render, geometry: Geometry, step: int, rng: Rng) -> Tensor:
        """The loss, averaged over all pixels, in nats."""
        opacity = render.opacity
        if opacity.dtype in (torch.float16, torch.bfloat16):
            opacity = opacity.float()  # 1 - margin would round to 1
        opacity = opacity.clamp(self.config.margin, 1.0 - self.config.margin)
        return -(torch.xlogy(opacity, opacity) + torch.xlogy(1.0 - opacity, 1.0 - opacity)).mean()

"""Texture smoothness loss: penalizes differences between the colors of nearby points."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from scoredist3d.config import option
from scoredist3d.geometry.base import Geometry
from scoredist3d.limits import MAX_SAMPLES
from scoredist3d.losses.base import Loss
from scoredist3d.losses.visible import visible_positions
from scoredist3d.registry import register
from scoredist3d.renderers.base import Render
from scoredist3d.seeding import Rng


@register(
    "loss",
    "texture-smoothness",
    summary="Differences between the colors of nearby surface points; flattens the albedo of a lit surface.",
    arxiv="2111.12503",
)
class TextureSmoothness(Loss):
    """Mean over visible points x of |s(f(x)) - s(f(x + e))|, with features f, the sigmoid s and Gaussian noise e.

    s(f) is the albedo of materials without other features (Munkberg et al. 2022). Under a light, a smooth albedo makes
    the shape explain light and shade. The absolute value permits a few sharp edges between colors.
    """

    @dataclass
    class Config(Loss.Config):
        """Options of the texture smoothness loss."""

        points: int = option(4096, "Points per step.", ge=1, le=MAX_SAMPLES)
        spread: float = option(0.01, "Standard deviation of the noise e, as a fraction of the radius.", gt=0)

    needs = frozenset({"position"})

    config: Config

    def __call__(self, render: Render, geometry: Geometry, step: int, rng: Rng) -> Tensor:
        """The loss, averaged over points and features; 0 if nothing is visible.

        Raises:
            ValueError: The render has no map ``position``.
        """
        generator = rng("texture-smoothness", step, render.opacity.device)
        points, visible = visible_positions(render, self.config.points, generator)
        noise = torch.randn(points.shape, generator=generator, device=points.device).to(points)
        moved = points + self.config.spread * geometry.radius * noise
        first, second = geometry.features_at(torch.cat([points, moved])).sigmoid().chunk(2)
        return torch.where(visible, (first - second).abs().mean(), 0.0)

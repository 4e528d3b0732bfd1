"""Eikonal loss: penalizes deviations of the gradient norm of a signed distance field from 1."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from scoredist3d.config import option
from scoredist3d.geometry.base import Geometry
from scoredist3d.geometry.protocols import HasSignedDistance
from scoredist3d.limits import MAX_SAMPLES
from scoredist3d.losses.base import Loss
from scoredist3d.losses.visible import visible_positions
from scoredist3d.meshes.sampling import points_in_ball
from scoredist3d.registry import register
from scoredist3d.renderers.base import Render
from scoredist3d.seeding import Rng


@register("loss", "eikonal", summary="Deviation of the SDF gradient norm from 1.", arxiv="2002.10099")
class Eikonal(Loss):
    """Mean over points of (|grad sdf| - 1)^2 (Gropp et al. 2020).

    Half of the points are uniform in the ball. The other half are surface points visible in the views of the step,
    with Gaussian noise added; if no surface is visible, they are uniform too.
    """

    @dataclass
    class Config(Loss.Config):
        """Options of the eikonal loss."""

        points: int = option(2048, "Points per step.", ge=2, le=MAX_SAMPLES)
        spread: float = option(
            0.02, "Standard deviation of the noise on surface points, as a fraction of the radius.", ge=0
        )

    needs = frozenset({"position"})
    applies_to = HasSignedDistance

    config: Config

    def __call__(self, render: Render, geometry: Geometry, step: int, rng: Rng) -> Tensor:
        """The loss, averaged over the points.

        Raises:
            ValueError: The geometry has no signed distance, or the render has no map ``position``.
        """
        if not isinstance(geometry, HasSignedDistance):
            raise ValueError(f"system.loss.eikonal: {type(geometry).__name__} has no signed distance; remove the loss")
        generator = rng("eikonal", step, render.opacity.device)
        points = self._points(render, geometry.radius, generator)
        return (geometry.sdf_gradient(points).norm(dim=-1) - 1.0).square().mean()

    def _points(self, render: Render, radius: float, generator: torch.Generator) -> Tensor:
        """(N, 3) sample points in the ball."""
        points = points_in_ball(generator, self.config.points, radius).to(render.get("position"))
        near = self.config.points // 2
        seen, visible = visible_positions(render, near, generator)
        moved = seen + self.config.spread * radius * torch.randn(near, 3, generator=generator, device=seen.device).to(
            seen
        )
        moved = moved * (radius / moved.norm(dim=-1, keepdim=True)).clamp_max(1.0)
        return torch.cat([torch.where(visible, moved, points[:near]), points[near:]])

"""Sketch-shape loss: a coarse mesh guides the shape of a field (Latent-NeRF, arXiv 2211.07600)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from scoredist3d.config import option
from scoredist3d.geometry.base import Geometry
from scoredist3d.geometry.protocols import HasDensity
from scoredist3d.losses.base import Loss
from scoredist3d.meshes.loading import fit_into, load_mesh
from scoredist3d.meshes.sampling import points_in_ball, points_near
from scoredist3d.ops.mesh.distance import signed_distance
from scoredist3d.registry import register
from scoredist3d.renderers.base import Render
from scoredist3d.seeding import Rng

_POOL = 2**15  # number of points; their distances to the mesh are computed once
_MIN_DEPTH = 1e-5  # keeps the gradient of -log(occupancy) finite at zero density


@dataclass(frozen=True)
class _Pool:
    """Sample points: half near the surface of the mesh, half uniform in the ball."""

    points: Tensor  # (P, 3)
    inside: Tensor  # (P,) bool, inside the mesh
    weights: Tensor  # (P,) in [0, 1], small near the surface


@register(
    "loss",
    "sketch-shape",
    summary="Mismatch between the field's occupancy and a coarse mesh, away from the mesh surface.",
    arxiv="2211.07600",
)
class SketchShape(Loss):
    """Mean over points of (1 - exp(-d^2 / (2 sigma^2))) CE(o, inside) (section 3.3).

    o = 1 - exp(-extinction * step) is the occupancy of the field, and d is the distance to the mesh. Far from its
    surface, the occupancy must match the mesh; near the surface, the guidance can change the shape. The winding number
    of the mesh determines which points are inside.
    """

    @dataclass
    class Config(Loss.Config):
        """Options of the sketch-shape loss."""

        mesh: str = option(
            help="Mesh file (.glb, .obj, .ply, .stl); it is scaled to the radius given by size.",
            example="chair.obj",
            file=True,
        )
        size: float = option(0.7, "Radius of the scaled mesh, as a fraction of the radius of the ball.", gt=0, le=1)
        sigma: float = option(
            0.3,
            "Distance from the mesh surface within which the loss is weak, as a fraction of the radius of the ball.",
            gt=0,
        )
        step_length: float = option(
            0.2, "Ray length over which the occupancy is computed, as a fraction of the radius of the ball.", gt=0
        )
        points: int = option(4096, "Points per step.", ge=2, le=_POOL)

    config: Config
    applies_to = HasDensity

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._pool: Callable[[float, int, torch.device], _Pool] = cache(self._make_pool)

    def __call__(self, render: Render, geometry: Geometry, step: int, rng: Rng) -> Tensor:
        """The loss, a weighted mean over the points of the step.

        Raises:
            ValueError: The geometry is not a field, or the mesh file cannot be read.
        """
        if not isinstance(geometry, HasDensity):
            raise ValueError(f"system.loss.sketch-shape: {type(geometry).__name__} is not a field; remove the loss")
        pool = self._pool(geometry.radius, rng.seed, render.opacity.device)
        generator = rng("sketch-shape", step, render.opacity.device)
        chosen = torch.randint(_POOL, (self.config.points,), generator=generator, device=render.opacity.device)
        extinction = geometry.extinction(pool.points[chosen])
        depth = extinction * (self.config.step_length * geometry.radius)
        cost = torch.where(pool.inside[chosen], -torch.log(-torch.expm1(-depth - _MIN_DEPTH)), depth)
        return (pool.weights[chosen] * cost).mean()

    def _make_pool(self, radius: float, seed: int, device: torch.device) -> _Pool:
        """The sample points, identical in all processes of a run."""
        mesh = fit_into(load_mesh(self.config.mesh).mesh, radius * self.config.size, margin=1.0)
        generator = Rng(seed)("sketch-shape-pool")
        sigma = self.config.sigma * radius
        near = points_near(mesh, sigma, torch.zeros(()))(generator, _POOL // 2)
        near = near * (radius / near.norm(dim=-1, keepdim=True)).clamp_max(1.0)
        points = torch.cat([near, points_in_ball(generator, _POOL - len(near), radius)])
        distance = signed_distance(points, torch.from_numpy(mesh.vertices), torch.from_numpy(mesh.faces))
        weights = -torch.expm1(-distance.square() / (2.0 * sigma**2))
        return _Pool(points.to(device), (distance < 0).to(device), weights.to(device))

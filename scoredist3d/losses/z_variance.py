"""Penalty on thick surfaces."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from scoredist3d.config import option
from scoredist3d.geometry.base import Geometry
from scoredist3d.losses.base import Loss
from scoredist3d.registry import register
from scoredist3d.renderers.base import Render
from scoredist3d.seeding import Rng


@register("loss", "z-variance", summary="Variance of the depth along each ray: crisp surfaces.", arxiv="2305.18766")
class ZVariance(Loss):
    """mean over rays of sum_i w_i (t_i - d)^2 / (O radius^2), with d = sum_i w_i t_i / O the ray's depth (HiFA).

    In units of the ball's radius, so that a weight means the same in scenes of any size. Only rays with opacity O above
    ``min_opacity`` count: on the others the depth means little.
    """

    @dataclass
    class Config(Loss.Config):
        """Options of the z-variance loss."""

        min_opacity: float = option(0.5, "Rays with a smaller opacity are left out.", gt=0, lt=1)

    needs = frozenset({"depth_variance"})

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.min_opacity = config.min_opacity

    def __call__(self, render: Render, geometry: Geometry, step: int, rng: Rng) -> Tensor:
        """The mean over the rays that count, in units of the squared radius.

        Raises:
            ValueError: A render without ``depth_variance``.
        """
        counted = render.opacity > self.min_opacity
        total = (render.get("depth_variance") * counted).sum()
        return total / (geometry.radius**2 * counted.sum().clamp_min(1))

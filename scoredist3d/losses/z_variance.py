"""Z-variance loss: penalizes the variance of depth along each ray."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from scoredist3d.config import option
from scoredist3d.geometry.base import Geometry
from scoredist3d.losses.base import Loss
from scoredist3d.registry import register
from scoredist3d.renderers.base import Render
from scoredist3d.seeding import Rng


@register("loss", "z-variance", summary="Variance of the depth along each ray; sharpens surfaces.", arxiv="2305.18766")
class ZVariance(Loss):
    """Mean over rays of sum_i w_i (t_i - d)^2 / (O radius^2), where d = sum_i w_i t_i / O is the depth (HiFA).

    Lengths are relative to the radius of the ball, so the loss does not depend on the scale of the scene. Only rays
    with an opacity O above ``min_opacity`` are averaged, because the depth of other rays is unreliable.
    """

    @dataclass
    class Config(Loss.Config):
        """Options of the z-variance loss."""

        min_opacity: float = option(0.5, "Rays with a smaller opacity are ignored.", gt=0, lt=1)

    needs = frozenset({"depth_variance"})

    config: Config

    def __call__(self, render: Render, geometry: Geometry, step: int, rng: Rng) -> Tensor:
        """The loss, averaged over the rays with an opacity above ``min_opacity``.

        Raises:
            ValueError: The render has no map ``depth_variance``.
        """
        counted = render.opacity > self.config.min_opacity
        total = (render.get("depth_variance") * counted).sum()
        return total / (geometry.radius**2 * counted.sum().clamp_min(1))

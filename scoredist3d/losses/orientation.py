"""Penalty on visible surfaces that face away from the camera."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from scoredist3d.geometry.base import Geometry
from scoredist3d.losses.base import Loss
from scoredist3d.registry import register
from scoredist3d.renderers.base import Render
from scoredist3d.seeding import Rng


@register("loss", "orientation", summary="Visible normals should face the camera.", arxiv="2112.03907")
class Orientation(Loss):
    """mean over rays of sum_i sg(w_i) max(0, n_i . v)^2 (Ref-NeRF, equation 11; DreamFusion, appendix).

    v is the ray's direction, w_i and n_i weight and outward normal of its sample i. The weights are not differentiated,
    so that the term turns surfaces instead of making them transparent. The mean is over the rays that see anything, so
    that the weight does not depend on how much of the image the object fills.
    """

    @dataclass
    class Config(Loss.Config):
        """No further options."""

    needs = frozenset({"orientation"})

    def __call__(self, render: Render, geometry: Geometry, step: int, rng: Rng) -> Tensor:
        """The mean over rays with an opacity above 0.

        Raises:
            ValueError: A render without ``orientation``.
        """
        rays = (render.opacity > 0).sum().clamp_min(1)
        return render.get("orientation").sum() / rays

"""Orientation loss: penalizes visible normals that face away from the camera."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from scoredist3d.geometry.base import Geometry
from scoredist3d.losses.base import Loss
from scoredist3d.registry import register
from scoredist3d.renderers.base import Render
from scoredist3d.seeding import Rng


@register(
    "loss", "orientation", summary="Penalty on visible normals that face away from the camera.", arxiv="2112.03907"
)
class Orientation(Loss):
    """Mean over rays of sum_i sg(w_i) max(0, n_i . v)^2 (Ref-NeRF, equation 11; DreamFusion, appendix).

    v is the direction of the ray, and w_i and n_i are the weight and the outward normal of its sample i. The weights
    are detached, so the loss rotates normals instead of making surfaces transparent. Only rays with an opacity above 0
    are averaged, so the effect of the loss weight does not depend on the size of the object in the image.
    """

    @dataclass
    class Config(Loss.Config):
        """No further options."""

    needs = frozenset({"orientation"})

    def __call__(self, render: Render, geometry: Geometry, step: int, rng: Rng) -> Tensor:
        """The loss, averaged over rays with an opacity above 0.

        Raises:
            ValueError: The render has no map ``orientation``.
        """
        rays = (render.opacity > 0).sum().clamp_min(1)
        return render.get("orientation").sum() / rays

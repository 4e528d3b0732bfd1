"""Distortion loss: penalizes weights that are spread along the ray."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from scoredist3d.geometry.base import Geometry
from scoredist3d.losses.base import Loss
from scoredist3d.registry import register
from scoredist3d.renderers.base import Render
from scoredist3d.seeding import Rng


@register(
    "loss", "distortion", summary="Spread of the weights along each ray; reduces floaters and fog.", arxiv="2111.12077"
)
class Distortion(Loss):
    """Mean over pixels of sum_ij w_i w_j |s_i - s_j| + sum_i w_i^2 ds_i / 3 (mip-NeRF 360, equation 15).

    s is the distance along the ray in units of the ball's diameter. Unlike the depth variance, the loss also reduces
    the weights of semi-transparent pixels.
    """

    @dataclass
    class Config(Loss.Config):
        """No further options."""

    needs = frozenset({"distortion"})

    def __call__(self, render: Render, geometry: Geometry, step: int, rng: Rng) -> Tensor:
        """The loss, averaged over all pixels.

        Raises:
            ValueError: The render has no map ``distortion``.
        """
        return render.get("distortion").mean()

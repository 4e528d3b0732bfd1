"""Penalty on opaque pixels."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from scoredist3d.config import option
from scoredist3d.geometry.base import Geometry
from scoredist3d.losses.base import Loss
from scoredist3d.registry import register
from scoredist3d.renderers.base import Render
from scoredist3d.seeding import Rng


@register("loss", "sparsity", summary="Mean of sqrt(opacity^2 + epsilon): less fog.", arxiv="2209.14988")
class Sparsity(Loss):
    """mean over pixels of sqrt(O^2 + epsilon), O the opacity (DreamFusion, appendix).

    Close to |O|, so it drives unneeded density to exactly nothing; epsilon keeps the gradient smooth at O = 0.
    """

    @dataclass
    class Config(Loss.Config):
        """Options of the sparsity loss."""

        epsilon: float = option(0.01, "Added under the square root.", gt=0)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.epsilon = config.epsilon

    def __call__(self, render: Render, geometry: Geometry, step: int, rng: Rng) -> Tensor:
        """The mean over all pixels."""
        return (render.opacity.square() + self.epsilon).sqrt().mean()

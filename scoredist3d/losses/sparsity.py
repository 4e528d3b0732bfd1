"""Sparsity loss: penalizes opacity."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from scoredist3d.config import option
from scoredist3d.geometry.base import Geometry
from scoredist3d.losses.base import Loss
from scoredist3d.registry import register
from scoredist3d.renderers.base import Render
from scoredist3d.seeding import Rng


@register("loss", "sparsity", summary="Mean of sqrt(opacity^2 + epsilon); reduces fog.", arxiv="2209.14988")
class Sparsity(Loss):
    """Mean over pixels of sqrt(O^2 + epsilon), where O is the opacity (DreamFusion, appendix).

    The value is close to |O|, so unneeded density decays to zero. epsilon keeps the gradient smooth at O = 0.
    """

    @dataclass
    class Config(Loss.Config):
        """Options of the sparsity loss."""

        epsilon: float = option(0.01, "Constant added to the squared opacity under the square root.", gt=0)

    config: Config

    def __call__(self, render: Render, geometry: Geometry, step: int, rng: Rng) -> Tensor:
        """The loss, averaged over all pixels."""
        return (render.opacity.square() + self.config.epsilon).sqrt().mean()

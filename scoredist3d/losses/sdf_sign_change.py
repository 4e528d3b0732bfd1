"""Sign change loss: penalizes sign changes between neighboring vertices of a signed distance grid."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from scoredist3d.geometry.base import Geometry
from scoredist3d.geometry.protocols import HasSDFGrid
from scoredist3d.losses.base import Loss
from scoredist3d.ops.isosurface.marching_tetrahedra import sign_change_loss
from scoredist3d.registry import register
from scoredist3d.renderers.base import Render
from scoredist3d.seeding import Rng


@register(
    "loss",
    "sdf-sign-change",
    summary="Sign changes between neighbors of an SDF grid; removes floaters and cavities.",
    arxiv="2111.12503",
)
class SdfSignChange(Loss):
    """Mean of H(sigmoid(s_a), sign s_b) + H(sigmoid(s_b), sign s_a) over the grid edges (a, b) where s changes sign.

    H is the binary cross-entropy and s the signed distance in units of the radius (Munkberg et al. 2022, equation 2).
    The loss removes floaters and also cavities inside the object, which are invisible in the images.
    """

    @dataclass
    class Config(Loss.Config):
        """No further options."""

    applies_to = HasSDFGrid

    def __call__(self, render: Render, geometry: Geometry, step: int, rng: Rng) -> Tensor:
        """The loss, averaged over the edges; 0 without sign changes.

        Raises:
            ValueError: The geometry has no signed distance grid.
        """
        if not isinstance(geometry, HasSDFGrid):
            raise ValueError(
                f"system.loss.sdf-sign-change: {type(geometry).__name__} has no signed distance grid; remove the loss"
            )
        return sign_change_loss(geometry.signed_distances() / geometry.radius, geometry.grid_edges())

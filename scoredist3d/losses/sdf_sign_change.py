"""Penalty on changes of sign between neighbours of a grid."""

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
    summary="Signed distances of neighbours on a grid agree in sign: no pieces that nobody sees.",
    arxiv="2111.12503",
)
class SdfSignChange(Loss):
    """mean of H(sigmoid(s_a), sign s_b) + H(sigmoid(s_b), sign s_a) over the grid's edges (a, b) that change sign.

    H is the binary cross entropy and s the signed distance in units of the radius (Munkberg et al. 2022, equation 2).
    Floating pieces and cavities vanish, which no image shows; where images hold the surface in place it stays.
    """

    @dataclass
    class Config(Loss.Config):
        """No further options."""

    applies_to = HasSDFGrid

    def __call__(self, render: Render, geometry: Geometry, step: int, rng: Rng) -> Tensor:
        """The mean; zero where no sign changes.

        Raises:
            ValueError: A geometry whose distances are not those of a grid.
        """
        if not isinstance(geometry, HasSDFGrid):
            raise ValueError(
                f"system.loss.sdf-sign-change: {type(geometry).__name__} has no signed distances on a grid; remove "
                "the term"
            )
        return sign_change_loss(geometry.signed_distances() / geometry.radius, geometry.grid_edges())

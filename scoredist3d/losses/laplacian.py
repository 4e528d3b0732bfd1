"""Laplacian loss: penalizes offsets of mesh vertices from the mean of their neighbors."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from scoredist3d.config import option
from scoredist3d.geometry.base import SurfaceMesh
from scoredist3d.losses.base import Loss
from scoredist3d.losses.mesh_terms import MeshLoss
from scoredist3d.ops.mesh.regularizers import laplacian
from scoredist3d.ops.mesh.topology import EdgeFaces
from scoredist3d.registry import register


@register("loss", "laplacian", summary="Offsets of mesh vertices from the mean of their neighbors.")
class Laplacian(MeshLoss):
    """Mean over vertices of |L x|^2 / radius^2, with (L x)_i = (mean of x over the neighbors of i) - x_i.

    With ``relative``, the term is |L (x - x_0)|^2, where x_0 are the initial vertices, if the mesh stores them. The
    loss is then zero for the initial shape and penalizes only non-smooth displacements.
    """

    @dataclass
    class Config(Loss.Config):
        """Options of the Laplacian loss."""

        relative: bool = option(
            False,
            "Apply the Laplacian to displacements from the initial mesh; no effect if faces change during training.",
        )

    config: Config

    def of_mesh(self, mesh: SurfaceMesh, adjacency: EdgeFaces, radius: float) -> Tensor:
        """The loss, averaged over the vertices that belong to a face."""
        moved = mesh.vertices
        if self.config.relative and mesh.rest is not None:
            moved = moved - mesh.rest
        return laplacian(moved / radius, mesh.faces, adjacency=adjacency)

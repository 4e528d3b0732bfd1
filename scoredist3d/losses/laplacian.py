"""Penalty on vertices that leave the middle of their neighbours."""

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


@register("loss", "laplacian", summary="Mesh vertices should lie in the middle of their neighbours.")
class Laplacian(MeshLoss):
    """mean over vertices of |L x|^2 / radius^2, with (L x)_i = (mean of x over i's neighbours) - x_i.

    With ``relative`` it is |L (x - x_0)|^2 where the mesh remembers where its vertices began, x_0: what was curved at
    the start may stay so, and only uneven displacements cost.
    """

    @dataclass
    class Config(Loss.Config):
        """Options of the Laplacian loss."""

        relative: bool = option(
            False, "Measure the displacement from the starting mesh; no effect where the faces change while training."
        )

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.relative = config.relative

    def of_mesh(self, mesh: SurfaceMesh, adjacency: EdgeFaces, radius: float) -> Tensor:
        """The mean over the vertices of faces."""
        moved = mesh.vertices
        if self.relative and mesh.rest is not None:
            moved = moved - mesh.rest
        return laplacian(moved / radius, mesh.faces, adjacency=adjacency)

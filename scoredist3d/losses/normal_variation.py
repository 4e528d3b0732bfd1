"""Normal variation loss: total variation of the normals of a mesh."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from scoredist3d.config import option
from scoredist3d.geometry.base import SurfaceMesh
from scoredist3d.losses.base import Loss
from scoredist3d.losses.mesh_terms import MeshLoss
from scoredist3d.ops.mesh.regularizers import normal_variation
from scoredist3d.ops.mesh.topology import EdgeFaces
from scoredist3d.registry import register


@register(
    "loss", "normal-variation", summary="Total variation of the normals of adjacent mesh faces, which keeps creases."
)
class NormalVariation(MeshLoss):
    """Mean of sqrt(||n_a - n_b||^2 + tau^2) - tau over pairs (a, b) of faces that share an edge; 0 for a plane."""

    @dataclass
    class Config(Loss.Config):
        """Options of the normal variation loss."""

        tau: float = option(0.05, "Difference of unit normals below which the penalty is quadratic.", gt=0)

    config: Config

    def of_mesh(self, mesh: SurfaceMesh, adjacency: EdgeFaces, radius: float) -> Tensor:
        """The loss, averaged over the edges with two faces."""
        return normal_variation(mesh.vertices, mesh.faces, tau=self.config.tau, adjacency=adjacency)

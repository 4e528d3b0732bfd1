"""Normal consistency loss: penalizes angles between adjacent faces of a mesh."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from scoredist3d.geometry.base import SurfaceMesh
from scoredist3d.losses.base import Loss
from scoredist3d.losses.mesh_terms import MeshLoss
from scoredist3d.ops.mesh.regularizers import normal_consistency
from scoredist3d.ops.mesh.topology import EdgeFaces
from scoredist3d.registry import register


@register("loss", "normal-consistency", summary="Angles between the normals of adjacent mesh faces.")
class NormalConsistency(MeshLoss):
    """Mean of 1 - n_a . n_b over pairs (a, b) of faces that share an edge, in [0, 2]; 0 for a plane."""

    @dataclass
    class Config(Loss.Config):
        """No further options."""

    def of_mesh(self, mesh: SurfaceMesh, adjacency: EdgeFaces, radius: float) -> Tensor:
        """The loss, averaged over the edges with two faces."""
        return normal_consistency(mesh.vertices, mesh.faces, adjacency=adjacency)

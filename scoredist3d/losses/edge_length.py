"""Edge length loss: penalizes long or uneven edges of a mesh."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from scoredist3d.config import option
from scoredist3d.geometry.base import SurfaceMesh
from scoredist3d.losses.base import Loss
from scoredist3d.losses.mesh_terms import MeshLoss
from scoredist3d.ops.mesh.regularizers import edge_length
from scoredist3d.ops.mesh.topology import EdgeFaces
from scoredist3d.registry import register


@register("loss", "edge-length", summary="Squared deviation of mesh edge lengths from a target length.")
class EdgeLength(MeshLoss):
    """Mean over edges of (|e| - target)^2 / radius^2."""

    @dataclass
    class Config(Loss.Config):
        """Options of the edge length loss."""

        target: float = option(0.0, "Target edge length, as a fraction of the radius.", ge=0)

    config: Config

    def of_mesh(self, mesh: SurfaceMesh, adjacency: EdgeFaces, radius: float) -> Tensor:
        """The loss, averaged over the edges."""
        return edge_length(mesh.vertices / radius, mesh.faces, target=self.config.target, adjacency=adjacency)

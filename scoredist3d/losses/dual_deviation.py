"""Penalty on dual vertices that are nearer to one side of their cell's surface than to another."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from scoredist3d.geometry.base import SurfaceMesh
from scoredist3d.losses.base import Loss
from scoredist3d.losses.mesh_terms import MeshLoss
from scoredist3d.ops.mesh.topology import EdgeFaces
from scoredist3d.registry import register


@register("loss", "dual-deviation", summary="Keeps the weights of FlexiCubes from going astray.", arxiv="2308.05371")
class DualDeviation(MeshLoss):
    """mean over dual vertices v of MAD_e |v - u_e| / radius, u_e the crossings that v is a mean of (L_dev).

    MAD is the mean absolute deviation from the mean; it vanishes where v is equally far from all of them.
    """

    @dataclass
    class Config(Loss.Config):
        """No further options."""

    def of_mesh(self, mesh: SurfaceMesh, adjacency: EdgeFaces, radius: float) -> Tensor:
        """The mean.

        Raises:
            ValueError: The mesh is no dual surface.
        """
        if mesh.deviation is None:
            raise ValueError("system.loss: dual-deviation is for geometry.type=flexicubes; remove the term")
        if not len(mesh.deviation):
            return mesh.vertices.sum() * 0
        return mesh.deviation.mean() / radius

"""Dual deviation loss: penalizes dual vertices at unequal distances from their edge crossings."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from scoredist3d.geometry.base import SurfaceMesh
from scoredist3d.losses.base import Loss
from scoredist3d.losses.mesh_terms import MeshLoss
from scoredist3d.ops.mesh.topology import EdgeFaces
from scoredist3d.registry import register


@register(
    "loss",
    "dual-deviation",
    summary="Deviation of the distances between FlexiCubes vertices and their edge crossings.",
    arxiv="2308.05371",
)
class DualDeviation(MeshLoss):
    """Mean over dual vertices v of MAD_e |v - u_e| / radius (L_dev).

    The u_e are the edge crossings whose weighted mean is v, and MAD is the mean absolute deviation from the mean. It
    is 0 where v has the same distance from all crossings.
    """

    @dataclass
    class Config(Loss.Config):
        """No further options."""

    def of_mesh(self, mesh: SurfaceMesh, adjacency: EdgeFaces, radius: float) -> Tensor:
        """The loss, averaged over the dual vertices.

        Raises:
            ValueError: The mesh was not extracted by FlexiCubes.
        """
        if mesh.deviation is None:
            raise ValueError(
                "system.loss.dual-deviation: the loss needs geometry.type=flexicubes; use it or remove the loss"
            )
        if not len(mesh.deviation):
            return mesh.vertices.sum() * 0
        return mesh.deviation.mean() / radius

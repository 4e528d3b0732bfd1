"""What the regularisers on a rasterised mesh share."""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor

from scoredist3d.geometry.base import Geometry, SurfaceMesh
from scoredist3d.geometry.face_cache import FaceCache
from scoredist3d.geometry.protocols import HasSurface
from scoredist3d.losses.base import Loss
from scoredist3d.ops.mesh.topology import EdgeFaces, edge_faces
from scoredist3d.renderers.base import Render
from scoredist3d.seeding import Rng

adjacency_of = FaceCache(edge_faces)


class MeshLoss(Loss):
    """A term on the mesh that a rasteriser has shown. Lengths are in units of the object's radius."""

    applies_to = HasSurface

    def __call__(self, render: Render, geometry: Geometry, step: int, rng: Rng) -> Tensor:
        """The term's value on ``render.mesh``; zero for a mesh without faces.

        Raises:
            ValueError: The render shows no mesh.
        """
        mesh = render.mesh
        if mesh is None:
            raise ValueError(
                f"system.loss: {type(self).__name__} needs a mesh, which this renderer does not show; remove the term "
                "or use a mesh geometry with renderer.type=mesh-rasterizer"
            )
        return self.of_mesh(mesh, adjacency_of(mesh.faces), geometry.radius)

    @abstractmethod
    def of_mesh(self, mesh: SurfaceMesh, adjacency: EdgeFaces, radius: float) -> Tensor:
        """The term of a mesh with the edges ``adjacency`` in a ball of ``radius``."""

"""Base class of losses on meshes."""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor

from scoredist3d.geometry.base import Geometry, Surface, SurfaceMesh
from scoredist3d.geometry.face_cache import FaceCache
from scoredist3d.losses.base import Loss
from scoredist3d.ops.mesh.topology import EdgeFaces, edge_faces
from scoredist3d.renderers.base import Render
from scoredist3d.seeding import Rng

adjacency_of = FaceCache(edge_faces)


class MeshLoss(Loss):
    """A loss on the rasterized mesh. Lengths are relative to the radius of the ball that holds the object."""

    applies_to = Surface

    def __call__(self, render: Render, geometry: Geometry, step: int, rng: Rng) -> Tensor:
        """The value of the loss for ``render.mesh``.

        Raises:
            ValueError: The render has no mesh.
        """
        mesh = render.mesh
        if mesh is None:
            raise ValueError(
                f"system.loss: {type(self).__name__} needs renders of a mesh; remove the loss, or use a mesh "
                "geometry with renderer.type=mesh-rasterizer"
            )
        return self.of_mesh(mesh, adjacency_of(mesh.faces), geometry.radius)

    @abstractmethod
    def of_mesh(self, mesh: SurfaceMesh, adjacency: EdgeFaces, radius: float) -> Tensor:
        """The unweighted value, a differentiable scalar; 0 for a mesh without faces.

        Args:
            mesh: The rasterized mesh.
            adjacency: Its edges and the faces at each edge.
            radius: Radius of the ball that holds the object, scene units.
        """

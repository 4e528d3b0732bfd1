"""Questions to the mesh of a surface geometry, answered on the CPU, where a tree over the faces makes them cheap."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from scoredist3d.geometry.base import SurfaceMesh
from scoredist3d.meshes.mesh import Mesh
from scoredist3d.ops.mesh.distance import ClosestPoints, closest_point, signed_distance


def to_mesh(mesh: SurfaceMesh) -> Mesh:
    """The mesh in numpy, in the types that files need."""

    def array(values: Tensor | None, dtype: type) -> np.ndarray | None:
        return None if values is None else values.detach().cpu().numpy().astype(dtype)

    vertices, faces = array(mesh.vertices, np.float32), array(mesh.faces, np.int64)
    assert vertices is not None and faces is not None
    return Mesh(vertices, faces, uvs=array(mesh.uvs, np.float32), uv_faces=array(mesh.uv_faces, np.int64))


def distance_to(mesh: Mesh, points: Tensor) -> Tensor:
    """(N,) signed distances at (N, 3) points, negative inside; without gradients.

    Raises:
        ValueError: The mesh has no faces.
    """
    vertices, faces = torch.from_numpy(mesh.vertices), torch.from_numpy(mesh.faces)
    return signed_distance(points.detach().float().cpu(), vertices, faces).to(points)


def closest_on(mesh: SurfaceMesh, points: Tensor) -> ClosestPoints:
    """The closest points of the mesh to (N, 3) points; without gradients.

    Raises:
        ValueError: The mesh has no faces.
    """
    found = closest_point(points.detach().float().cpu(), mesh.vertices.detach().float().cpu(), mesh.faces.cpu())
    device = points.device
    return ClosestPoints(found.points.to(points), found.faces.to(device), found.barycentric.to(points))


def density_of(mesh: Mesh, points: Tensor, radius: float) -> Tensor:
    """(N,) exp(-distance / (0.01 radius)): 1 on the surface, more inside; 0 everywhere for a mesh without faces."""
    if not len(mesh.faces):
        return points.new_zeros(len(points))
    return (distance_to(mesh, points) * (-100.0 / radius)).clamp(-30.0, 30.0).exp()

"""Distances to triangle meshes and closest points on them, computed on the CPU with a tree over the faces."""

from __future__ import annotations

import torch
from torch import Tensor

from scoredist3d.geometry.base import SurfaceMesh
from scoredist3d.meshes.mesh import Mesh
from scoredist3d.ops.mesh.distance import ClosestPoints, closest_point, signed_distance


def distance_to(mesh: Mesh, points: Tensor) -> Tensor:
    """(N,) signed distances from (N, 3) points to the mesh, negative inside; not differentiable.

    Raises:
        ValueError: The mesh has no faces.
    """
    vertices, faces = torch.from_numpy(mesh.vertices), torch.from_numpy(mesh.faces)
    return signed_distance(points.detach().float().cpu(), vertices, faces).to(points)


def closest_on(mesh: SurfaceMesh, points: Tensor) -> ClosestPoints:
    """The points of the mesh that are closest to (N, 3) points; not differentiable.

    Raises:
        ValueError: The mesh has no faces.
    """
    found = closest_point(points.detach().float().cpu(), mesh.vertices.detach().float().cpu(), mesh.faces.cpu())
    device = points.device
    return ClosestPoints(found.points.to(points), found.faces.to(device), found.barycentric.to(points))


def density_of(mesh: Mesh, points: Tensor, radius: float) -> Tensor:
    """(N,) exp(-distance / (0.01 radius)) with the signed distance: 1 on the surface; 0 for a mesh without faces."""
    if not len(mesh.faces):
        return points.new_zeros(len(points))
    return (distance_to(mesh, points) * (-100.0 / radius)).clamp(-30.0, 30.0).exp()

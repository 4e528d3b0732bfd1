"""Distances between a reconstructed surface and the ground truth."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from scoredist3d.cameras import sphere_cameras
from scoredist3d.meshes.mesh import Mesh
from scoredist3d.meshes.quality import angles_deg
from scoredist3d.meshes.sampling import surface_sampler
from scoredist3d.ops.mesh.distance import closest_point
from scoredist3d.ops.mesh.regularizers import face_normals
from scoredist3d.procedural import Objects, cast_rays


def visible_points(object: Objects, *, views: int = 64, size: int = 64, distance: float = 3.2) -> Tensor:
    """Points (P, 3) on the surface of one procedural object that are visible from cameras around the object."""
    cameras = sphere_cameras(views, distance=distance, fovy_deg=40.0, size=size).to(object.device)
    points = []
    for index in range(views):
        rays = cameras[index].rays()
        origins, directions = rays.origins.flatten(1, 2)[:, :1], rays.directions.flatten(1, 2)
        hits = cast_rays(object.geometry, origins, directions)
        hit = torch.isfinite(hits.t[0])
        points.append((origins + directions * hits.t[..., None])[0, hit])
    return torch.cat(points)


def chamfer_distance(first: np.ndarray, second: np.ndarray) -> float:
    """Chamfer distance between point sets (N, 3) and (M, 3), in scene units.

    The distance is the mean of the two directed mean nearest-neighbor distances, which are not squared.
    """
    from scipy.spatial import cKDTree

    return 0.5 * float(cKDTree(second).query(first)[0].mean() + cKDTree(first).query(second)[0].mean())


def normal_angle_deg(first: Mesh, second: Mesh, *, points: int = 20000, seed: int = 0) -> float:
    """Mean angle in degrees, in [0, 180], between the face normals of two meshes at nearest surface points.

    ``points`` random points on each mesh, uniform by area, are compared with the nearest points of the other one; the
    result is the mean of both directions.

    Raises:
        ValueError: A mesh has no area.
    """
    generator = torch.Generator().manual_seed(seed)
    return 0.5 * sum(_angle_to(*pair, points, generator) for pair in ((first, second), (second, first)))


def _angle_to(mesh: Mesh, other: Mesh, count: int, generator: torch.Generator) -> float:
    """Mean angle in degrees between the normals at random points of a mesh and at the nearest points of another one."""
    vertices, faces = torch.from_numpy(other.vertices), torch.from_numpy(other.faces)
    points, normals = surface_sampler(mesh, vertices)(generator, count)
    nearest = face_normals(vertices, faces)[closest_point(points, vertices, faces).faces]
    return float(angles_deg(normals, nearest).mean())

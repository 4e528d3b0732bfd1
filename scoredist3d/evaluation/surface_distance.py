"""Distances between a reconstructed surface and the ground truth."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from scoredist3d.cameras import Cameras, orbit
from scoredist3d.procedural import Objects, cast_rays


def sphere_cameras(count: int, *, distance: float, fovy_deg: float, size: int, turn: float = 0.0) -> Cameras:
    """``count`` cameras that lie on a golden spiral around the origin and look at the origin.

    ``turn`` is the rotation of the spiral in units of the azimuth step between consecutive cameras. Values in (0, 1)
    give views between those of ``turn=0``.
    """
    index = torch.arange(count, dtype=torch.float32) + 0.5
    elevation = torch.rad2deg(torch.asin(1.0 - 2.0 * index / count))
    azimuth = (360.0 * ((index + turn) * (math.sqrt(5.0) - 1.0) / 2.0)) % 360.0
    ones = torch.ones(count)
    return orbit(azimuth, elevation, distance * ones, fovy_deg * ones, size, size)


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

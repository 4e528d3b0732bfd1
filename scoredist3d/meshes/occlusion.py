"""Ambient occlusion of surface points."""

from __future__ import annotations

import math

import numpy as np

from scoredist3d.meshes.mesh import Mesh
from scoredist3d.meshes.sampling import stratified_mesh_points

_OFFSET = 3.0  # offset along the normal in pixels, to avoid self-shadowing
_SAMPLES_PER_PIXEL = 8


def ambient_occlusion(
    mesh: Mesh, points: np.ndarray, normals: np.ndarray, *, directions: int = 96, resolution: int = 192
) -> np.ndarray:
    """Ambient visibility of surface points: the cosine-weighted fraction of the hemisphere that is not occluded.

    Visibility is tested in a depth image of the mesh for each of ``directions`` directions. Details smaller than about
    3 pixels of these images cast no shadow.

    Args:
        mesh: The occluder.
        points: (N, 3), on the surface.
        normals: (N, 3), unit.
        directions: Number of directions on the whole sphere (a Fibonacci lattice, so the result is deterministic).
        resolution: Side length of the depth images, in pixels.

    Returns:
        (N,) float32 in [0, 1], 1 where nothing is occluded.
    """
    low, high = mesh.bounds
    center = 0.5 * (low + high)
    radius = max(float(np.linalg.norm(mesh.vertices - center, axis=1).max()), 1e-12)
    scale = (0.5 * resolution - 2.0) / radius  # pixels per unit
    surface = stratified_mesh_points(mesh, _SAMPLES_PER_PIXEL * resolution**2, np.random.default_rng(0))
    occluders = (surface - center).astype(np.float32) * np.float32(scale)
    lifted = (points - center).astype(np.float32) * np.float32(scale) + np.float32(_OFFSET) * normals
    light, total = np.zeros(len(points), dtype=np.float32), np.zeros(len(points), dtype=np.float32)
    for direction in _fibonacci(directions):
        cosine = np.maximum(normals @ direction, 0.0)
        facing = np.flatnonzero(cosine > 0)
        axes = _across(direction)
        depth = _depth_image(occluders @ axes, occluders @ direction, resolution)
        pixel = _pixel(lifted[facing] @ axes, resolution)
        free = depth[pixel] <= lifted[facing] @ direction
        light[facing] += cosine[facing] * free
        total += cosine
    return np.where(total > 0, light / np.maximum(total, 1e-12), 1.0).astype(np.float32)


def _depth_image(image: np.ndarray, depth: np.ndarray, resolution: int) -> np.ndarray:
    """Depth image (resolution^2,): largest ``depth`` (N,) per pixel; empty pixels take their largest neighbor."""
    from scipy.ndimage import maximum_filter

    nearest = np.full(resolution**2, -np.inf, dtype=np.float32)
    np.maximum.at(nearest, _pixel(image, resolution), depth)
    square = nearest.reshape(resolution, resolution)
    return np.where(np.isinf(square), maximum_filter(square, 3), square).ravel()


def _pixel(image: np.ndarray, resolution: int) -> np.ndarray:
    place = np.clip((image + 0.5 * resolution).astype(np.int64), 0, resolution - 1)
    return place[:, 0] * resolution + place[:, 1]


def _fibonacci(count: int) -> np.ndarray:
    """Unit vectors (count, 3) float32, spread evenly over the sphere."""
    index = np.arange(count) + 0.5
    z = 1.0 - 2.0 * index / count
    angle = math.pi * (1.0 + math.sqrt(5.0)) * index
    ring = np.sqrt(1.0 - z * z)
    return np.stack([ring * np.cos(angle), ring * np.sin(angle), z], axis=1).astype(np.float32)


def _across(direction: np.ndarray) -> np.ndarray:
    """Two unit vectors, as columns (3, 2), orthogonal to ``direction`` and to each other."""
    one = np.cross(direction, np.eye(3, dtype=np.float32)[np.abs(direction).argmin()])
    one /= np.linalg.norm(one)
    return np.stack([one, np.cross(direction, one)], axis=1).astype(np.float32)

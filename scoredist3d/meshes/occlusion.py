"""How much ambient light reaches points of a surface."""

from __future__ import annotations

import math

import numpy as np

from scoredist3d.meshes.mesh import Mesh

_OFFSET = 3.0  # pixels along the normal, so that a surface does not shadow itself
_SAMPLES_PER_PIXEL = 8


def ambient_occlusion(
    mesh: Mesh, points: np.ndarray, normals: np.ndarray, *, directions: int = 96, resolution: int = 192
) -> np.ndarray:
    """Share of the light of an even sky that arrives, cosine-weighted over each point's hemisphere.

    A depth image of the mesh from each of ``directions`` evenly spread directions tells which points see the sky there.
    Details below about 3 pixels of these images cast no shadow.

    Args:
        mesh: What occludes.
        points: (N, 3), on the surface.
        normals: (N, 3), unit.
        directions: On the whole sphere (a Fibonacci lattice, so the result is not random).
        resolution: Pixels across the mesh in the depth images.

    Returns:
        (N,) float32 in [0, 1], 1 where nothing is in the way.
    """
    low, high = mesh.bounds
    center = 0.5 * (low + high)
    radius = max(float(np.linalg.norm(mesh.vertices - center, axis=1).max()), 1e-12)
    scale = (0.5 * resolution - 2.0) / radius  # pixels per unit
    occluders = (_sampled(mesh, _SAMPLES_PER_PIXEL * resolution**2) - center).astype(np.float32) * np.float32(scale)
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
    """(resolution^2,) largest depth (N,) of the points at (N, 2) pixel coordinates, gaps closed by their neighbours."""
    from scipy.ndimage import maximum_filter

    nearest = np.full(resolution**2, -np.inf, dtype=np.float32)
    np.maximum.at(nearest, _pixel(image, resolution), depth)
    square = nearest.reshape(resolution, resolution)
    return np.where(np.isinf(square), maximum_filter(square, 3), square).ravel()


def _pixel(image: np.ndarray, resolution: int) -> np.ndarray:
    place = np.clip((image + 0.5 * resolution).astype(np.int64), 0, resolution - 1)
    return place[:, 0] * resolution + place[:, 1]


def _sampled(mesh: Mesh, count: int) -> np.ndarray:
    """(count, 3) points, evenly over the area; always the same ones."""
    rng = np.random.default_rng(0)
    areas = mesh.face_areas
    face = np.searchsorted(np.cumsum(areas), (np.arange(count) + 0.5) / count * areas.sum()).clip(0, len(areas) - 1)
    a, b = rng.random((2, count))
    turned = a + b > 1
    a, b = np.where(turned, 1 - a, a)[:, None], np.where(turned, 1 - b, b)[:, None]
    first, second, third = (mesh.vertices[mesh.faces[face, k]] for k in range(3))
    points: np.ndarray = first + a * (second - first) + b * (third - first)
    return points


def _fibonacci(count: int) -> np.ndarray:
    """(count, 3) float32 unit vectors, evenly over the sphere."""
    index = np.arange(count) + 0.5
    z = 1.0 - 2.0 * index / count
    angle = math.pi * (1.0 + math.sqrt(5.0)) * index
    ring = np.sqrt(1.0 - z * z)
    return np.stack([ring * np.cos(angle), ring * np.sin(angle), z], axis=1).astype(np.float32)


def _across(direction: np.ndarray) -> np.ndarray:
    """(3, 2) two unit vectors orthogonal to ``direction`` and to each other."""
    one = np.cross(direction, np.eye(3, dtype=np.float32)[np.abs(direction).argmin()])
    one /= np.linalg.norm(one)
    return np.stack([one, np.cross(direction, one)], axis=1).astype(np.float32)

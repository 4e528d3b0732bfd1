"""Rasterization of meshes in texture space: the face and the surface point of each texel."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from scoredist3d.meshes.mesh import Mesh

# Texels up to this distance, in texels, outside their triangle are baked too: bilinear filtering at seams reads them.
GUTTER = 1.5
_CANDIDATES_PER_PASS = 4_000_000
_INSIDE = 0.01  # texels; centers on an edge that two faces share count as inside neither


@dataclass(frozen=True)
class Texels:
    """Texels that are assigned to faces.

    Attributes:
        index: (M,) int64, row * size + column, unique; row 0 is the top of the image.
        face: (M,) int64, face of each texel.
        barycentric: (M, 3) float32, weights of the corners of the face, non-negative, with sum 1. For texels in the
            gutter they describe a nearby point of the face.
    """

    index: np.ndarray
    face: np.ndarray
    barycentric: np.ndarray

    def mask(self, size: int) -> np.ndarray:
        """(size, size) bool, whether a texel is among these."""
        covered = np.zeros(size * size, dtype=bool)
        covered[self.index] = True
        return covered.reshape(size, size)


def texel_points(mesh: Mesh, texels: Texels) -> np.ndarray:
    """World-space surface points (M, 3) of the texels."""
    corners = mesh.vertices[mesh.faces[texels.face]]
    points: np.ndarray = np.einsum("mk,mkc->mc", texels.barycentric, corners)
    return points


def rasterize(mesh: Mesh, size: int) -> Texels:
    """Assign each texel to the face whose UV triangle contains its center or is within :data:`GUTTER` of it.

    Triangles that contain the center take precedence, then the nearest triangle.

    Raises:
        ValueError: The mesh has no texture coordinates.
    """
    index, face, barycentric, outside = _all_candidates(mesh, size)
    return _resolve(index, face, barycentric, outside.clip(0.0, None), size)


def overlap(mesh: Mesh, size: int) -> float:
    """Fraction, in [0, 1], of the used texels whose centers are inside several faces.

    Raises:
        ValueError: The mesh has no texture coordinates.
    """
    index, _, _, outside = _all_candidates(mesh, size)
    faces_of = np.bincount(index[outside < -_INSIDE], minlength=size * size)
    return float((faces_of > 1).sum() / max(1, (faces_of > 0).sum()))


def _all_candidates(mesh: Mesh, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Results of :func:`_candidates` for all faces, computed in passes of limited size."""
    if mesh.uvs is None or mesh.uv_faces is None:
        raise ValueError("the mesh has no texture coordinates: unwrap it first")
    pixels = np.stack([mesh.uvs[:, 0] * size, (1.0 - mesh.uvs[:, 1]) * size], axis=1).astype(np.float32)
    triangles = pixels[mesh.uv_faces]
    # Texel columns and rows whose centers are in the bounding box enlarged by the gutter.
    first = np.clip(np.ceil(triangles.min(axis=1) - GUTTER - 0.5), 0, size).astype(np.int64)
    last = np.clip(np.floor(triangles.max(axis=1) + GUTTER - 0.5), -1, size - 1).astype(np.int64)
    extent = np.maximum(last - first + 1, 0)
    totals = np.cumsum(extent.prod(axis=1))
    parts, start = [], 0
    while start < len(triangles):
        done = totals[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(totals, done + _CANDIDATES_PER_PASS, side="right")))
        parts.append(_candidates(triangles[start:stop], first[start:stop], extent[start:stop], start, size))
        start = stop
    index, face, barycentric, outside = (np.concatenate(column) for column in zip(*parts, strict=True))
    return index, face, barycentric, outside


def _candidates(
    triangles: np.ndarray, first: np.ndarray, extent: np.ndarray, offset: int, size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Candidate texels of the triangles (n, 3, 2): those whose centers are inside or near a triangle.

    All lengths and triangle corners are in units of texels.

    Returns:
        Texel index, face, clamped barycentric weights, and distance to the triangle (negative inside).
    """
    counts = extent.prod(axis=1)
    face = np.repeat(np.arange(len(triangles)), counts)
    local = np.arange(len(face)) - np.repeat(np.cumsum(counts) - counts, counts)
    width = extent[face, 0]
    column, row = first[face, 0] + local % width, first[face, 1] + local // width
    # Barycentric weights as affine functions of the texel center.
    a, b, c = triangles[:, 0], triangles[:, 1], triangles[:, 2]
    area = (b[:, 0] - a[:, 0]) * (c[:, 1] - a[:, 1]) - (b[:, 1] - a[:, 1]) * (c[:, 0] - a[:, 0])
    flat = np.abs(area) < 1e-9
    area = np.where(flat, 1.0, area)
    x, y = column.astype(np.float32) + np.float32(0.5), row.astype(np.float32) + np.float32(0.5)
    weights = np.empty((len(face), 3), dtype=np.float32)
    outside = np.full(len(face), -np.inf, dtype=np.float32)
    for k, (p, q) in enumerate(((b, c), (c, a), (a, b))):
        along = q - p
        length = np.maximum(np.linalg.norm(along, axis=1), 1e-12)
        weight = (along[face, 0] * (y - p[face, 1]) - along[face, 1] * (x - p[face, 0])) / area[face]
        weights[:, k] = weight
        np.maximum(outside, -weight * (np.abs(area) / length)[face], out=outside)
    keep = (outside <= GUTTER) & ~flat[face]
    clamped = weights[keep].clip(0.0, None)
    clamped /= clamped.sum(axis=1, keepdims=True)
    return (row * size + column)[keep], face[keep] + offset, clamped, outside[keep]


def _resolve(index: np.ndarray, face: np.ndarray, barycentric: np.ndarray, outside: np.ndarray, size: int) -> Texels:
    """Choose the candidate face with the smallest distance for each texel."""
    gutter = np.flatnonzero(outside > 0)
    order = np.concatenate([gutter[np.argsort(-outside[gutter], kind="stable")], np.flatnonzero(outside == 0)])
    winner = np.full(size * size, -1, dtype=np.int64)
    winner[index[order]] = order  # for repeated indices, the last assignment wins
    texel = np.flatnonzero(winner >= 0)
    chosen = winner[texel]
    return Texels(index=texel, face=face[chosen], barycentric=barycentric[chosen])


def fill_uncovered(texture: np.ndarray, index: np.ndarray) -> np.ndarray:
    """Copy of a texture (H, W, C) whose uncovered texels are filled.

    ``index`` (M,) are the flat indices of the covered texels; all others take the value of the nearest covered texel.
    """
    from scipy.ndimage import distance_transform_edt

    covered = np.zeros(texture.shape[0] * texture.shape[1], dtype=bool)
    covered[index] = True
    nearest = distance_transform_edt(~covered.reshape(texture.shape[:2]), return_distances=False, return_indices=True)
    filled: np.ndarray = texture[nearest[0], nearest[1]]
    return filled

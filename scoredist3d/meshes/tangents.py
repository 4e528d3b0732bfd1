"""Tangent frames of unwrapped meshes, for normal maps."""

from __future__ import annotations

import numpy as np

from scoredist3d.meshes.mesh import Mesh


def corner_tangents(mesh: Mesh) -> np.ndarray:
    """Tangents (F, 3, 4) float32 of all face corners: a unit vector along +u, then the sign of the frame.

    As in MikkTSpace, the tangent of a corner is the angle-weighted mean of the +u directions of the adjacent faces that
    share its vertex, texture coordinate and handedness, each projected onto the tangent plane of the vertex. The
    bitangent is sign * cross(normal, tangent) and points along +v, upwards in the image.

    Raises:
        ValueError: The mesh has no texture coordinates.
    """
    if mesh.uvs is None or mesh.uv_faces is None:
        raise ValueError("the mesh has no texture coordinates: unwrap it first")
    points, uvs = mesh.vertices[mesh.faces].astype(np.float64), mesh.uvs[mesh.uv_faces].astype(np.float64)
    along, across = points[:, 1] - points[:, 0], points[:, 2] - points[:, 0]
    (du1, dv1), (du2, dv2) = (uvs[:, 1] - uvs[:, 0]).T, (uvs[:, 2] - uvs[:, 0]).T
    area = du1 * dv2 - du2 * dv1
    sign = np.where(area < 0, -1.0, 1.0)
    # Not divided by the area, since only the direction matters.
    direction = sign[:, None] * (along * dv2[:, None] - across * dv1[:, None])
    normals = mesh.vertex_normals().astype(np.float64)[mesh.faces]
    flat = np.abs(area) <= 1e-14
    weighted = _on_plane(np.repeat(direction[:, None], 3, axis=1), normals) * _angles(points)[..., None]
    weighted[flat] = 0.0
    group = frame_groups(mesh, sign)
    sums = np.stack([np.bincount(group, weighted[..., axis].ravel()) for axis in range(3)], axis=1)
    tangents = _on_plane(sums[group].reshape(-1, 3, 3), normals)
    lost = np.linalg.norm(tangents, axis=2) < 0.5
    tangents[lost] = _any_on_plane(normals[lost])
    signs = np.repeat(sign[:, None, None], 3, axis=1)
    return np.concatenate([tangents, signs], axis=2).astype(np.float32)


def frame_groups(mesh: Mesh, sign: np.ndarray) -> np.ndarray:
    """Frame index (3F,) of each corner; corners with the same vertex, texture coordinate and ``sign`` share a frame."""
    assert mesh.uvs is not None and mesh.uv_faces is not None
    keys = (mesh.faces * len(mesh.uvs) + mesh.uv_faces) * 2 + (sign < 0)[:, None]
    return np.unique(keys.ravel(), return_inverse=True)[1].ravel()


def _on_plane(vectors: np.ndarray, normals: np.ndarray) -> np.ndarray:
    """``vectors`` projected onto the planes orthogonal to ``normals`` and normalized; 0 where the projection is 0."""
    flat = vectors - (vectors * normals).sum(axis=-1, keepdims=True) * normals
    length = np.linalg.norm(flat, axis=-1, keepdims=True)
    return np.where(length > 1e-20, flat / np.maximum(length, 1e-20), 0.0)


def _any_on_plane(normals: np.ndarray) -> np.ndarray:
    axis = np.eye(3)[np.abs(normals).argmin(axis=-1)]
    return _on_plane(axis, normals)


def _angles(points: np.ndarray) -> np.ndarray:
    """Interior angles (F, 3) of triangles (F, 3, 3), radians."""
    towards = np.roll(points, -1, axis=1) - points
    length = np.maximum(np.linalg.norm(towards, axis=2, keepdims=True), 1e-20)
    unit = towards / length
    return np.arccos(np.clip(-(unit * np.roll(unit, 1, axis=1)).sum(axis=2), -1.0, 1.0))

"""Normals of triangle meshes and regularization losses, differentiable in the vertices.

Faces are counter-clockwise seen from outside. The losses of a mesh without faces are 0 with zero gradient, so that
training continues while a shape is empty. Degenerate faces have the normal 0 with zero gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from scoredist3d.ops.mesh.topology import EdgeFaces, check_faces, edge_faces

# Twice the area of a face over its squared longest edge; below this value its normal is dominated by rounding.
_DEGENERATE = 1e-6


def face_normals(vertices: Tensor, faces: Tensor) -> Tensor:
    """Unit normals (F, 3) of ``faces`` (F, 3) with ``vertices`` (V, 3); 0 for degenerate faces."""
    normals, longest = _scaled_normals(vertices, faces)
    return _normalize(normals, _DEGENERATE * longest)


def vertex_normals(vertices: Tensor, faces: Tensor) -> Tensor:
    """Unit vertex normals (V, 3): normalized area-weighted sums over adjacent faces; 0 where the sum vanishes."""
    normals, longest = _scaled_normals(vertices, faces)
    corners = faces.reshape(-1).to(torch.int64)
    total = torch.zeros_like(vertices).index_add(0, corners, normals.repeat_interleave(3, dim=0))
    scale = longest.new_zeros(len(vertices)).index_add(0, corners, longest.repeat_interleave(3))
    return _normalize(total, _DEGENERATE * scale)


def normal_consistency(vertices: Tensor, faces: Tensor, *, adjacency: EdgeFaces | None = None) -> Tensor:
    """Mean of 1 - cos(angle between normals) over all pairs of adjacent faces; 0 for flat meshes, at most 2.

    Args:
        vertices: (V, 3).
        faces: (F, 3).
        adjacency: ``edge_faces(faces)``; computed if not given.

    Returns:
        A scalar. Pairs with a degenerate face are ignored.
    """
    first, second = _adjacent_normals(vertices, faces, adjacency)
    return _mean(1 - (first * second).sum(dim=1), vertices)


def normal_variation(
    vertices: Tensor, faces: Tensor, *, tau: float = 0.05, adjacency: EdgeFaces | None = None
) -> Tensor:
    """Mean of sqrt(||n_a - n_b||^2 + tau^2) - tau over all pairs of adjacent faces with unit normals n_a and n_b.

    Total variation of the normals: a sharp crease costs about as much as a rounded one, so creases are kept.

    Args:
        vertices: (V, 3).
        faces: (F, 3).
        tau: Difference below which the penalty is quadratic; positive.
        adjacency: ``edge_faces(faces)``; computed if not given.

    Returns:
        A scalar. Pairs with a degenerate face are ignored.
    """
    first, second = _adjacent_normals(vertices, faces, adjacency)
    return _mean(((first - second).square().sum(dim=1) + tau * tau).sqrt() - tau, vertices)


def laplacian(vertices: Tensor, faces: Tensor, *, adjacency: EdgeFaces | None = None) -> Tensor:
    """Mean squared length of the uniform Laplacian, (mean of the neighbors) - vertex, over all used vertices.

    Args:
        vertices: (V, 3).
        faces: (F, 3).
        adjacency: ``edge_faces(faces)``; computed if not given.

    Returns:
        A scalar, scene units squared.
    """
    edges = (adjacency or edge_faces(faces)).edges
    start, end = edges.unbind(1)
    ends = torch.cat((start, end))
    neighbors = torch.cat((end, start))
    degree = vertices.new_zeros(len(vertices)).index_add(0, ends, vertices.new_ones(len(ends)))
    # Summing differences is more accurate than averaging absolute positions.
    difference = torch.zeros_like(vertices).index_add(0, ends, vertices[neighbors] - vertices[ends])
    used = degree > 0
    return _mean((difference[used] / degree[used, None]).square().sum(dim=1), vertices)


def edge_length(vertices: Tensor, faces: Tensor, *, target: float = 0.0, adjacency: EdgeFaces | None = None) -> Tensor:
    """Mean of (length - target)^2 over all edges.

    Args:
        vertices: (V, 3).
        faces: (F, 3).
        target: Target length, scene units.
        adjacency: ``edge_faces(faces)``; computed if not given.

    Returns:
        A scalar, scene units squared.
    """
    start, end = (adjacency or edge_faces(faces)).edges.unbind(1)
    squared = (vertices[end] - vertices[start]).square().sum(dim=1)
    if target == 0:
        return _mean(squared, vertices)
    proper = squared > 0
    lengths = torch.where(proper, torch.where(proper, squared, 1.0).sqrt(), 0.0)
    return _mean((lengths - target).square(), vertices)


def _scaled_normals(vertices: Tensor, faces: Tensor) -> tuple[Tensor, Tensor]:
    """Normals (F, 3) with length twice the face area, and squared longest edges (F,), the latter without gradient."""
    check_faces(faces)
    if vertices.ndim != 2 or vertices.shape[1] != 3:
        raise ValueError(f"mesh: vertices must be (V, 3), got {tuple(vertices.shape)}")
    a, b, c = vertices[faces.to(torch.int64)].unbind(1)
    ab, ac = b - a, c - a
    sides = torch.stack((ab, ac, c - b)).detach()
    return torch.linalg.cross(ab, ac), sides.square().sum(dim=-1).amax(dim=0)


def _normalize(vectors: Tensor, threshold: Tensor) -> Tensor:
    """Normalized vectors; 0 with zero gradient where the length does not exceed ``threshold``."""
    squared = vectors.square().sum(dim=-1, keepdim=True)
    proper = squared > threshold.square().unsqueeze(-1)
    proper = proper & (squared > 0)
    return torch.where(proper, vectors / torch.where(proper, squared, 1.0).sqrt(), 0.0)


def _adjacent_normals(vertices: Tensor, faces: Tensor, adjacency: EdgeFaces | None) -> tuple[Tensor, Tensor]:
    """Unit normals (P, 3) of both faces of all adjacent pairs; pairs with a degenerate face are left out."""
    pairs = (adjacency or edge_faces(faces)).faces
    first, second = pairs[pairs[:, 1] >= 0].unbind(1)
    normals = face_normals(vertices, faces)
    proper = normals.detach().square().sum(dim=1) > 0
    keep = proper[first] & proper[second]
    return normals[first[keep]], normals[second[keep]]


def _mean(values: Tensor, vertices: Tensor) -> Tensor:
    """Mean of ``values`` or, if there are none, a 0 that is connected to ``vertices`` in the autograd graph."""
    return values.mean() if len(values) else vertices.sum() * 0

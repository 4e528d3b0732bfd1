"""Connectivity of triangle meshes: edges, adjacent faces, closedness and Euler characteristic."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class EdgeFaces:
    """Edges of a mesh and their adjacent faces.

    Attributes:
        edges: (E, 2) int64, vertex indices of the unique edges, the smaller first, in ascending order.
        faces: (E, 2) int64, adjacent faces of each edge, the smaller index first; the second one is -1 for boundary
            edges. For non-manifold edges (more than two faces) these are the two smallest.
        counts: (E,) int64, number of adjacent faces: 1 for boundary edges, 2 inside a manifold.
    """

    edges: Tensor
    faces: Tensor
    counts: Tensor


def edge_faces(faces: Tensor) -> EdgeFaces:
    """Unique edges of ``faces`` (F, 3) and their adjacent faces.

    Raises:
        ValueError: ``faces`` is not an integer tensor (F, 3).
    """
    check_faces(faces)
    keys, _ = _directed_edges(faces)
    unique, inverse, counts = torch.unique(keys, return_inverse=True, return_counts=True)
    # Occurrences are grouped by edge and, because the sort is stable, ordered by face within a group.
    owner = torch.argsort(inverse, stable=True) // 3
    first = counts.cumsum(0) - counts
    second = torch.where(counts > 1, owner[(first + 1).clamp(max=max(len(owner) - 1, 0))], -1)
    stride = _stride(faces)
    edges = torch.stack((unique // stride, unique % stride), dim=1)
    return EdgeFaces(edges, torch.stack((owner[first], second), dim=1), counts)


def is_closed(faces: Tensor) -> bool:
    """Whether ``faces`` (F, 3) is a closed, consistently oriented edge manifold.

    This means that every edge has exactly two faces, which traverse it in opposite directions. A mesh without faces
    counts as closed.
    """
    check_faces(faces)
    keys, forward = _directed_edges(faces)
    _, inverse, counts = torch.unique(keys, return_inverse=True, return_counts=True)
    balance = torch.zeros_like(counts).index_add_(0, inverse, forward.to(counts.dtype) * 2 - 1)
    return bool(((counts == 2) & (balance == 0)).all())


def euler_characteristic(faces: Tensor) -> int:
    """Euler characteristic V - E + F over all used vertices; each sphere contributes 2, each torus 0."""
    check_faces(faces)
    keys, _ = _directed_edges(faces)
    return len(faces.unique()) - len(keys.unique()) + len(faces)


def check_faces(faces: Tensor) -> None:
    """Raise ValueError unless ``faces`` is an integer tensor (F, 3)."""
    if faces.ndim != 2 or faces.shape[1] != 3 or faces.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"mesh: faces must be an integer tensor (F, 3), got {faces.dtype} {tuple(faces.shape)}")


def _stride(faces: Tensor) -> int:
    return int(faces.max()) + 1 if len(faces) else 1


def _directed_edges(faces: Tensor) -> tuple[Tensor, Tensor]:
    """Direction-independent key (3F,) of each edge of each face, and whether the edge starts at its smaller vertex."""
    faces = faces.to(torch.int64)
    start, end = faces.reshape(-1), faces.roll(-1, dims=1).reshape(-1)
    return torch.minimum(start, end) * _stride(faces) + torch.maximum(start, end), start < end

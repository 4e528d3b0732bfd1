"""Connectivity of triangle meshes: which faces meet at which edge, and what that says about the surface."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class EdgeFaces:
    """The edges of a mesh and the faces on either side.

    Attributes:
        edges: (E, 2) int64 vertex ids, the lower first, in ascending order; every edge once.
        faces: (E, 2) int64 ids of the faces that have the edge, the lower first; -1 where a border edge has no second
            face. Of an edge with more than two faces (not a manifold) the two lowest are given.
        counts: (E,) int64 number of faces that have the edge: 1 at a border, 2 inside a manifold.
    """

    edges: Tensor
    faces: Tensor
    counts: Tensor


def edge_faces(faces: Tensor) -> EdgeFaces:
    """The unique edges of ``faces`` (F, 3) and their one or two faces.

    Raises:
        ValueError: If ``faces`` is not an integer tensor (F, 3).
    """
    check_faces(faces)
    keys, _ = _directed_edges(faces)
    unique, inverse, counts = torch.unique(keys, return_inverse=True, return_counts=True)
    # Occurrences grouped by edge, in each group by face, since the sort is stable and the faces come in order.
    owner = torch.argsort(inverse, stable=True) // 3
    first = counts.cumsum(0) - counts
    second = torch.where(counts > 1, owner[(first + 1).clamp(max=max(len(owner) - 1, 0))], -1)
    stride = _stride(faces)
    edges = torch.stack((unique // stride, unique % stride), dim=1)
    return EdgeFaces(edges, torch.stack((owner[first], second), dim=1), counts)


def is_closed(faces: Tensor) -> bool:
    """Whether ``faces`` (F, 3) is a closed, consistently oriented edge manifold.

    Every edge then has exactly two faces, which run through it in opposite directions. A mesh without faces is closed.
    """
    check_faces(faces)
    keys, forward = _directed_edges(faces)
    _, inverse, counts = torch.unique(keys, return_inverse=True, return_counts=True)
    balance = torch.zeros_like(counts).index_add_(0, inverse, forward.to(counts.dtype) * 2 - 1)
    return bool(((counts == 2) & (balance == 0)).all())


def euler_characteristic(faces: Tensor) -> int:
    """V - E + F over the vertices that faces use: 2 for each sphere, 0 for each torus."""
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
    """Of each face's three edges a key (3F,) without direction, and whether it runs from the lower vertex up."""
    faces = faces.to(torch.int64)
    start, end = faces.reshape(-1), faces.roll(-1, dims=1).reshape(-1)
    return torch.minimum(start, end) * _stride(faces) + torch.maximum(start, end), start < end

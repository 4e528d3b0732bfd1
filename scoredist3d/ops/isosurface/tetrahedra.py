"""Tetrahedral lattices that fill a cube, generated at first use and cached in files."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import lru_cache

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from scoredist3d.ops import cache
from scoredist3d.reasons import reason

logger = logging.getLogger("scoredist3d")

# The vertices of a tetrahedron's six edges, in the order of TetrahedralGrid.tet_edges.
TET_EDGES = ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))
# Part of the file name: increase it when the lattice or the layout of the file changes.
_FORMAT = 1
_SUFFIX = ".safetensors"
_FIELDS = ("vertices", "tets", "edges", "tet_edges")
# Largest distance from a point to the nearest vertex, in spacings: the circumradius of a tetrahedron, sqrt(5) / 2.
_COVERING_RADIUS = 1.12


@dataclass(frozen=True)
class TetrahedralGrid:
    """Tetrahedral mesh of [-1, 1]^3, or of the part of it that covers a ball.

    Attributes:
        vertices: (V, 3) float32.
        tets: (T, 4) int32, vertex indices; all tetrahedra have positive volume: (b - a) x (c - a) . (d - a) > 0.
        edges: (E, 2) int32, vertex indices of the unique edges, the smaller first.
        tet_edges: (T, 6) int32, edge indices, in the order of ``TET_EDGES``.
        spacing: Distance between adjacent layers of vertices along an axis.
    """

    vertices: Tensor
    tets: Tensor
    edges: Tensor
    tet_edges: Tensor
    spacing: float

    def to(self, device: torch.device | str) -> TetrahedralGrid:
        """Copy on ``device``."""
        tensors = {name: getattr(self, name).to(device) for name in _FIELDS}
        return TetrahedralGrid(**tensors, spacing=self.spacing)


@lru_cache(maxsize=4)
def tetrahedral_grid(resolution: int, radius: float | None = None) -> TetrahedralGrid:
    """Body-centered cubic lattice of [-1, 1]^3 with ``resolution`` steps between layers of vertices along an axis.

    Its vertices are the corners and centers of cubes with a side of 2 spacings. Two cubes that share a face give four
    tetrahedra, each formed by the two centers and an edge of the face (Labelle and Shewchuk 2007, "Isosurface
    stuffing", section 2). At the boundary the center of the face replaces the missing cube center, which halves the
    tetrahedra. All inner tetrahedra are congruent, with dihedral angles of 60 and 90 degrees, and the lattice has all
    symmetries of the cube. Kuhn's subdivision of a cube into six tetrahedra gives thinner ones (45 degrees) that share
    one of the four diagonals, which causes ripples along that direction in surfaces. A grid has about
    ``resolution``^3 / 4 vertices and 1.5 ``resolution``^3 tetrahedra: 0.56 and 3.2 million for 128, half of them in the
    unit ball.

    The grid is cached in memory and in a file in the user's cache folder; a damaged file is regenerated.

    Args:
        resolution: An even number; the spacing is 2 / resolution.
        radius: If given, the tetrahedra that do not intersect the ball of this radius around the origin are omitted
            (a few of them are kept). A ball of radius 1 needs half of the cube.

    Returns:
        The grid, on the CPU. It is shared between callers: do not modify it.

    Raises:
        ValueError: ``resolution`` is not an even number from 2 to 512, or ``radius`` is not positive.
    """
    if resolution < 2 or resolution % 2 or resolution > 512:
        raise ValueError(f"tetrahedral grid: resolution must be an even number from 2 to 512, got {resolution}")
    if radius is not None and not radius > 0:
        raise ValueError(f"tetrahedral grid: radius must be positive, got {radius}")
    stem = _stem(resolution, radius)
    tensors = _load(stem)
    if tensors is None:
        tensors = generate(resolution, radius)
        _save(stem, tensors)
    return TetrahedralGrid(**tensors, spacing=2 / resolution)


def generate(resolution: int, radius: float | None = None) -> dict[str, Tensor]:
    """Tensors of ``tetrahedral_grid(resolution, radius)``, generated without the cache."""
    tets = _lattice_tets(resolution)
    side = resolution + 1
    if radius is not None:
        near = _positions(torch.arange(side**3, dtype=torch.int32), resolution).norm(dim=1)
        near = near < radius + _COVERING_RADIUS * 2 / resolution
        tets = tets[near[tets.long()].any(dim=1)]
    if not len(tets):
        raise ValueError(
            f"tetrahedral grid: radius {radius} is too small for resolution {resolution}: no tetrahedron is left; "
            "increase the radius"
        )
    used = torch.zeros(side**3, dtype=torch.bool)
    used[tets.reshape(-1).long()] = True
    codes = used.nonzero()[:, 0].to(torch.int32)
    tets = (used.cumsum(0, dtype=torch.int32) - 1)[tets.long()]
    edges, tet_edges = _unique_edges(tets, _coordinates(codes, resolution))
    return {"vertices": _positions(codes, resolution), "tets": tets, "edges": edges, "tet_edges": tet_edges}


def _coordinates(codes: Tensor, resolution: int) -> Tensor:
    """Integer coordinates (N, 3), in spacings, of lattice points with the flat indices ``codes`` (N,)."""
    side = resolution + 1
    return torch.stack((codes // side**2, codes // side % side, codes % side), dim=1)


def _positions(codes: Tensor, resolution: int) -> Tensor:
    return _coordinates(codes, resolution).float() * (2 / resolution) - 1


def _lattice_tets(resolution: int) -> Tensor:
    """Flat indices (T, 4) int32 of lattice points: four tetrahedra at each face of the cubes of side 2."""
    cubes = resolution // 2
    side = resolution + 1
    plane, across = torch.arange(0, resolution + 1, 2), torch.arange(1, resolution, 2)
    parts = []
    for axis in range(3):
        strides = [side ** (2 - (axis + k) % 3) for k in range(3)]  # of this axis and, cyclically, of the other two
        i, j, k = torch.meshgrid(plane, across, across, indexing="ij")
        below = (i - 1).clamp(min=0) * strides[0] + j * strides[1] + k * strides[2]
        above = (i + 1).clamp(max=resolution) * strides[0] + j * strides[1] + k * strides[2]
        corners = [
            i * strides[0] + (j + dj) * strides[1] + (k + dk) * strides[2]
            for dj, dk in ((-1, -1), (1, -1), (1, 1), (-1, 1))
        ]
        around = [torch.stack((below, above, corners[m], corners[(m + 1) % 4]), dim=-1) for m in range(4)]
        parts.append(torch.stack(around, dim=-2).reshape(-1, 4).to(torch.int32))
    assert sum(map(len, parts)) == 12 * cubes**2 * (cubes + 1)
    return torch.cat(parts)


def _unique_edges(tets: Tensor, coordinates: Tensor) -> tuple[Tensor, Tensor]:
    """Unique edges (E, 2) and the edges of the tetrahedra (T, 6), as int32 indices.

    An edge is identified by its smaller vertex and its direction. Since there are few directions, a table of all pairs
    replaces sorting all edges.
    """
    starts, ends = (tets[:, [pair[end] for pair in TET_EDGES]] for end in (0, 1))
    lower, higher = torch.minimum(starts, ends), torch.maximum(starts, ends)
    code = coordinates @ torch.tensor([25, 5, 1], dtype=torch.int32)  # offsets of -2 to 2 along an axis
    directions = code[higher.long()] - code[lower.long()]
    present = directions.reshape(-1).bincount(minlength=63).nonzero()[:, 0]
    index = torch.zeros(63, dtype=torch.int32)
    index[present] = torch.arange(len(present), dtype=torch.int32)
    slots = (lower.long() * len(present)).add_(index[directions.long()])
    used = torch.zeros(len(coordinates) * len(present), dtype=torch.bool)
    used[slots.reshape(-1)] = True
    rank = used.cumsum(0, dtype=torch.int32) - 1
    tet_edges = rank[slots]
    edges = torch.empty(int(rank[-1]) + 1, 2, dtype=torch.int32)
    flat = tet_edges.reshape(-1).long()
    edges[flat, 0], edges[flat, 1] = lower.reshape(-1), higher.reshape(-1)
    return edges, tet_edges


def _stem(resolution: int, radius: float | None) -> str:
    ball = "" if radius is None else f"-ball-{radius:g}"
    return f"tetrahedra-{_FORMAT}-{resolution}{ball}"


def _load(stem: str) -> dict[str, Tensor] | None:
    """Tensors of a cache file; None if there is no readable one."""
    path = cache.find(stem, _SUFFIX)
    if path is None:
        return None
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            return {name: file.get_tensor(name) for name in _FIELDS}
    except (OSError, safetensors.SafetensorError) as error:
        logger.warning("tetrahedral grid: the cache file %s cannot be read (%s) and is regenerated", path, error)
        return None


def _save(stem: str, tensors: dict[str, Tensor]) -> None:
    """Write the cache file; a failure is logged, since the cache only saves time."""
    try:
        cache.store(stem, _SUFFIX, lambda path: safetensors.torch.save_file(tensors, path))
    except (OSError, safetensors.SafetensorError) as error:
        logger.warning("tetrahedral grid: no cache file is written (%s); the run continues without it", reason(error))

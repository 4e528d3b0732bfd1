"""Tetrahedral lattices that fill a cube, made here and kept in the user's cache."""

from __future__ import annotations

import json
import logging
import os
import tempfile
import zlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from scoredist3d.ops import native

logger = logging.getLogger("scoredist3d")

# The vertices of a tetrahedron's six edges, in the order of TetrahedralGrid.tet_edges.
TET_EDGES = ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))
# Part of the file name: raise it when the lattice or the file's layout changes.
_FORMAT = 1
_FIELDS = ("vertices", "tets", "edges", "tet_edges")
# No point of the lattice is further from a vertex than this, in spacings: the circumradius of a tetrahedron, sqrt(5)/2.
_COVERING_RADIUS = 1.12


@dataclass(frozen=True)
class TetrahedralGrid:
    """A tetrahedral mesh of [-1, 1]^3 (or of what surrounds a ball in it).

    Attributes:
        vertices: (V, 3) float32.
        tets: (T, 4) int32 vertex ids; every tetrahedron has a positive volume: (b - a) x (c - a) . (d - a) > 0.
        edges: (E, 2) int32 vertex ids, the lower first; every edge once.
        tet_edges: (T, 6) int32 edge ids, in the order of ``TET_EDGES``.
        spacing: Distance of neighbouring layers of vertices along an axis.
    """

    vertices: Tensor
    tets: Tensor
    edges: Tensor
    tet_edges: Tensor
    spacing: float

    def to(self, device: torch.device | str) -> TetrahedralGrid:
        """The same grid on ``device``."""
        tensors = {name: getattr(self, name).to(device) for name in _FIELDS}
        return TetrahedralGrid(**tensors, spacing=self.spacing)


@lru_cache(maxsize=4)
def tetrahedral_grid(resolution: int, radius: float | None = None) -> TetrahedralGrid:
    """The body-centred cubic lattice of [-1, 1]^3 with ``resolution`` steps between layers of vertices along an axis.

    Its vertices are the corners and the centres of the cubes of side 2 spacing. Two cubes that share a face give four
    tetrahedra, each of the two centres and an edge of the face (Labelle and Shewchuk 2007, "Isosurface stuffing",
    section 2); at the sides of the box the face's own centre takes the place of the missing one, which halves them.
    All inner tetrahedra are congruent, with dihedral angles of 60 and 90 degrees, and the lattice has all symmetries of
    the cube. Kuhn's six tetrahedra of a cube are thinner (45 degrees) and share one of its four diagonals, which shows
    in surfaces as ripples along that direction. A grid has about ``resolution``^3 / 4 vertices and 1.5
    ``resolution``^3 tetrahedra: 0.56 and 3.2 million at 128, half of them in the unit ball.

    Kept in memory and as a file in the user's cache folder; a damaged file is made anew.

    Args:
        resolution: Even; the spacing is 2 / resolution.
        radius: If given, tetrahedra without a point in the ball of this radius around the origin are left out (and a
            few with one are kept): a ball of radius 1 needs half of the cube.

    Returns:
        The grid, on the CPU. It is shared: do not write into it.

    Raises:
        ValueError: If ``resolution`` is not even and positive or above 512, or ``radius`` not positive.
    """
    if resolution < 2 or resolution % 2 or resolution > 512:
        raise ValueError(f"tetrahedral grid: resolution must be an even number from 2 to 512, got {resolution}")
    if radius is not None and not radius > 0:
        raise ValueError(f"tetrahedral grid: radius must be positive, got {radius}")
    path = native.cache_folder() / _file_name(resolution, radius)
    tensors = _load(path) if path.exists() else None
    if tensors is None:
        tensors = generate(resolution, radius)
        _save(path, tensors)
    return TetrahedralGrid(**tensors, spacing=2 / resolution)


def generate(resolution: int, radius: float | None = None) -> dict[str, Tensor]:
    """The tensors of ``tetrahedral_grid(resolution, radius)``, made without a cache."""
    tets = _lattice_tets(resolution)
    side = resolution + 1
    if radius is not None:
        near = _positions(torch.arange(side**3, dtype=torch.int32), resolution).norm(dim=1)
        near = near < radius + _COVERING_RADIUS * 2 / resolution
        tets = tets[near[tets.long()].any(dim=1)]
    if not len(tets):
        raise ValueError(f"tetrahedral grid: radius {radius} leaves nothing at resolution {resolution}; make it larger")
    used = torch.zeros(side**3, dtype=torch.bool)
    used[tets.reshape(-1).long()] = True
    codes = used.nonzero()[:, 0].to(torch.int32)
    tets = (used.cumsum(0, dtype=torch.int32) - 1)[tets.long()]
    edges, tet_edges = _unique_edges(tets, _coordinates(codes, resolution))
    return {"vertices": _positions(codes, resolution), "tets": tets, "edges": edges, "tet_edges": tet_edges}


def _coordinates(codes: Tensor, resolution: int) -> Tensor:
    """(N, 3) int32 positions in spacings of the lattice points with the raster numbers ``codes`` (N,)."""
    side = resolution + 1
    return torch.stack((codes // side**2, codes // side % side, codes % side), dim=1)


def _positions(codes: Tensor, resolution: int) -> Tensor:
    return _coordinates(codes, resolution).float() * (2 / resolution) - 1


def _lattice_tets(resolution: int) -> Tensor:
    """(T, 4) int32 raster numbers of lattice points: four tetrahedra about each face of the cubes of side 2."""
    cubes = resolution // 2
    side = resolution + 1
    plane, across = torch.arange(0, resolution + 1, 2), torch.arange(1, resolution, 2)
    parts = []
    for axis in range(3):
        strides = [side ** (2 - (axis + k) % 3) for k in range(3)]  # of this axis and, cyclically, the other two
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
    """Unique edges (E, 2) and the tetrahedra's edge ids (T, 6), int32.

    An edge is known by its lower vertex and its direction. There are few directions, so a table of all pairs takes the
    place of a sort of all edges.
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


def _file_name(resolution: int, radius: float | None) -> str:
    ball = "" if radius is None else f"-ball-{radius:g}"
    return f"tetrahedra-{_FORMAT}-{resolution}{ball}.safetensors"


def _checksums(tensors: dict[str, Tensor]) -> str:
    return json.dumps({name: zlib.crc32(tensors[name].numpy().data) for name in _FIELDS})


def _load(path: Path) -> dict[str, Tensor] | None:
    """The tensors of a cache file, or None if it is damaged."""
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in _FIELDS}
            expected = (file.metadata() or {}).get("crc32")
    except (OSError, safetensors.SafetensorError) as error:
        logger.warning("tetrahedral grid: the cache file %s cannot be read (%s); it is made anew", path, error)
        return None
    if _checksums(tensors) != expected:
        logger.warning("tetrahedral grid: the cache file %s is damaged; it is made anew", path)
        return None
    return tensors


def _save(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write the cache file as a whole or not at all; a cache that cannot be written costs time, nothing else."""
    temporary = None
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}.", suffix=".tmp")
        os.close(handle)
        temporary = Path(name)
        safetensors.torch.save_file(tensors, temporary, metadata={"crc32": _checksums(tensors)})
        os.replace(temporary, path)
    except (OSError, safetensors.SafetensorError) as error:
        logger.warning("tetrahedral grid: cannot write the cache file %s (%s)", path, error)
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)

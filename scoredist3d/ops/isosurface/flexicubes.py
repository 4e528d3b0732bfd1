"""FlexiCubes (Shen et al. 2023, arXiv 2308.05371): dual marching cubes with optimizable weights.

A cube has one vertex per loop of its marching cubes surface (Nielson 2004, "Dual marching cubes"). Each grid edge with
a sign change has a quad, which connects vertices of the four cubes around it. Unlike in marching tetrahedra, vertices
can move freely inside their cubes, so that sharp edges and well-shaped triangles can be learned.

Cube corners are numbered 4 dx + 2 dy + dz. Cube edges are numbered 4 axis + 2 p + q, where p and q are the offsets of
the edge along the two axes that follow ``axis`` cyclically. Cube faces are numbered 2 axis + side.

Signed distances are negative inside; a value of exactly zero is outside.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from scoredist3d.ops.isosurface.marching_tetrahedra import check_field, zero_crossings


@dataclass(frozen=True)
class VoxelGrid:
    """Grid of ``resolution``^3 cubes that fill [-1, 1]^3.

    Attributes:
        vertices: (V, 3) float32, V = (resolution + 1)^3, with z varying fastest; cubes are in the same order.
        resolution: Number of cubes along an axis.
    """

    vertices: Tensor
    resolution: int

    @property
    def num_cubes(self) -> int:
        """Number of cubes, C."""
        return self.resolution**3

    @property
    def spacing(self) -> float:
        """Side length of a cube."""
        return 2 / self.resolution

    def to(self, device: torch.device | str) -> VoxelGrid:
        """Copy on ``device``."""
        return VoxelGrid(self.vertices.to(device), self.resolution)


def voxel_grid(resolution: int) -> VoxelGrid:
    """Create a grid of ``resolution``^3 cubes over [-1, 1]^3, on the CPU.

    Raises:
        ValueError: ``resolution`` is not in the range 1 to 512.
    """
    if not 1 <= resolution <= 512:
        raise ValueError(f"voxel grid: resolution must be from 1 to 512, got {resolution}")
    axis = torch.arange(resolution + 1) * (2 / resolution) - 1
    return VoxelGrid(torch.cartesian_prod(axis, axis, axis), resolution)


class FlexiWeights(NamedTuple):
    """Positive weights of K cubes (section 4.2 of the paper).

    Attributes:
        alpha: (K, 8), factors on the signed distances at the corners, which shift the zero crossings along the edges.
        beta: (K, 12), weights of the zero crossings in the weighted mean that defines a dual vertex.
        gamma: (K,), weights that determine the diagonals along which quads are split.
    """

    alpha: Tensor
    beta: Tensor
    gamma: Tensor


def flexi_weights(raw: Tensor, *, scale: float = 0.99) -> FlexiWeights:
    """Weights from unconstrained parameters (K, 21): 1 + scale tanh for alpha and beta, a sigmoid for gamma.

    Zero parameters give alpha = beta = 1 and gamma = 1/2. A ``scale`` below 1 bounds all weights away from zero.
    """
    factors = 1 + scale * torch.tanh(raw[:, :20])
    gamma = scale * torch.sigmoid(raw[:, 20]) + (1 - scale) / 2
    return FlexiWeights(factors[:, :8], factors[:, 8:], gamma)


class FlexiMesh(NamedTuple):
    """Triangle mesh extracted by FlexiCubes.

    Attributes:
        vertices: (M, 3), the dual vertices, followed by the centers of the quads if quads are subdivided.
        faces: (F, 3) int64, counter-clockwise seen from outside.
        deviation: (D,), for each dual vertex, the mean absolute deviation of its distances to its zero crossings. Their
            mean is the regularizer L_dev of the paper.
    """

    vertices: Tensor
    faces: Tensor
    deviation: Tensor


def flexicubes(
    vertices: Tensor,
    sdf: Tensor,
    grid: VoxelGrid,
    raw_weights: Tensor | None = None,
    *,
    subdivide: bool = False,
) -> FlexiMesh:
    """Extract the surface sdf = 0 as a mesh, differentiable in vertices, sdf and raw_weights.

    Zero crossings are u = (s_j alpha_j x_i - s_i alpha_i x_j) / (s_j alpha_j - s_i alpha_i) (eq. 4 of the paper); a
    dual vertex is the mean of the crossings of a loop, weighted by beta (eq. 3). A quad is split along the diagonal
    with the larger product of gammas or, with ``subdivide``, into four triangles around the point
    (g_02 (v_0 + v_2) / 2 + g_13 (v_1 + v_3) / 2) / (g_02 + g_13) with g_ij = gamma_i gamma_j, which is differentiable.

    The mesh is an oriented manifold. It is closed if the zero level set is inside the grid; edges on the boundary of
    the grid have no quad. If two cubes would have two mesh edges between the same two vertices, both cubes connect the
    inner corners of their common ambiguous face instead of separating them.

    Args:
        vertices: (V, 3) float, vertices of the grid, possibly displaced by less than half a spacing.
        sdf: (V,) float, finite.
        grid: The grid.
        raw_weights: (C, 21), unconstrained parameters of the cubes (8 alpha, 12 beta, 1 gamma), see
            :func:`flexi_weights`; only cubes with a sign change use them. None means zeros (dual marching cubes).
        subdivide: Split each quad into four triangles, for training, instead of two.

    Raises:
        ValueError: A shape is wrong or a value is not finite.
    """
    check_field("flexicubes", vertices, sdf, (grid.resolution + 1) ** 3)
    if raw_weights is not None and raw_weights.shape != (grid.num_cubes, 21):
        shape = tuple(raw_weights.shape)
        raise ValueError(f"flexicubes: raw_weights must be ({grid.num_cubes}, 21) for this grid, got {shape}")
    inside = (sdf.detach() < 0).view(3 * (grid.resolution + 1,))
    cubes = _surface_cubes(inside)
    raw = sdf.new_zeros(1, 21).expand(len(cubes.cube), -1) if raw_weights is None else raw_weights[cubes.cube]
    weights = flexi_weights(raw)
    points, deviation = _dual_vertices(vertices, sdf, cubes, weights)
    quads, quad_rows = _quads(inside, cubes)
    points, faces = _triangulate(points, quads, weights.gamma[quad_rows], subdivide=subdivide)
    return FlexiMesh(points, faces, deviation)


def _triangulate(points: Tensor, quads: Tensor, gamma: Tensor, *, subdivide: bool) -> tuple[Tensor, Tensor]:
    """Vertices, including quad centers with ``subdivide``, and triangles of the quads."""
    gamma_02, gamma_13 = gamma[:, 0] * gamma[:, 2], gamma[:, 1] * gamma[:, 3]
    if not subdivide:
        along_02, along_13 = quads[:, [0, 1, 2, 0, 2, 3]], quads[:, [0, 1, 3, 1, 2, 3]]
        return points, torch.where((gamma_02 >= gamma_13)[:, None], along_02, along_13).view(-1, 3)
    corners = points[quads]
    share = (gamma_02 / (gamma_02 + gamma_13))[:, None]
    centers = share * (corners[:, 0] + corners[:, 2]) / 2 + (1 - share) * (corners[:, 1] + corners[:, 3]) / 2
    center_ids = torch.arange(len(quads), device=quads.device)[:, None].expand(-1, 4) + len(points)
    faces = torch.stack((quads, quads.roll(-1, dims=1), center_ids), dim=-1).view(-1, 3)
    return torch.cat((points, centers)), faces


class _Cubes(NamedTuple):
    """The K cubes that the surface intersects."""

    resolution: int
    cube: Tensor  # (K,) index of the cube
    loops: Tensor  # (K, 12) loop of the cube that crosses each edge, -1 if none does
    first: Tensor  # (K,) first dual vertex of the cube
    row: Tensor  # (C,) row of a cube in the tensors above, -1 if the surface does not intersect it
    num_vertices: int


def _surface_cubes(inside: Tensor) -> _Cubes:
    """Find the cubes with corners of both signs; ``inside`` is a bool tensor over the grid vertices."""
    resolution, device = inside.shape[0] - 1, inside.device
    tables = _tables(device)
    signs = inside.view(torch.uint8)
    case = torch.zeros(3 * (resolution,), dtype=torch.uint8, device=device)
    for corner, (x, y, z) in enumerate(product(range(2), repeat=3)):
        case |= signs[x : x + resolution, y : y + resolution, z : z + resolution] << corner
    case = case.view(-1)
    index = ((case != 0) & (case != 255)).nonzero()[:, 0]
    row = torch.full((resolution**3,), -1, dtype=torch.int64, device=device)
    row[index] = torch.arange(len(index), device=device)
    case = case[index].long()
    joined = _joins_face(case, index, row, resolution).long()
    counts = tables.num_loops[joined, case]
    ends = counts.cumsum(0)
    total = int(ends[-1]) if len(ends) else 0
    return _Cubes(resolution, index, tables.loops[joined, case], ends - counts, row, total)


def _joins_face(case: Tensor, index: Tensor, row: Tensor, resolution: int) -> Tensor:
    """(K,) bool, whether a cube and its neighbor both have one loop through all four edges of their common face."""
    tables = _tables(case.device)
    face = tables.pinched_face[case]
    axis, step = face // 2, face % 2 * 2 - 1
    strides = torch.tensor([resolution**2, resolution, 1], device=case.device)
    place = (index[:, None] // strides % resolution).gather(1, axis.clamp(min=0)[:, None])[:, 0] + step
    valid = (face >= 0) & (place >= 0) & (place < resolution)
    neighbor = row[torch.where(valid, index + step * strides[axis.clamp(min=0)], index)]
    return valid & (tables.pinched_face[case[neighbor]] == face ^ 1)


def _dual_vertices(vertices: Tensor, sdf: Tensor, cubes: _Cubes, weights: FlexiWeights) -> tuple[Tensor, Tensor]:
    """Dual vertices (D, 3) and their deviations (D,), see :class:`FlexiMesh`."""
    tables = _tables(sdf.device)
    row, edge = (cubes.loops >= 0).nonzero().unbind(1)
    dual = cubes.first[row] + cubes.loops[row, edge]
    cube = cubes.cube[row]
    n = cubes.resolution
    side = n + 1
    low_corner = (cube // n**2 * side + cube // n % n) * side + cube % n
    corner_offsets = torch.tensor([(x * side + y) * side + z for x, y, z in product(range(2), repeat=3)]).to(sdf.device)
    ends = [tables.edge_corners[edge, end] for end in (0, 1)]
    ids = [low_corner + corner_offsets[corner] for corner in ends]
    values = [sdf[i] * weights.alpha[row, corner] for i, corner in zip(ids, ends, strict=True)]
    crossings = zero_crossings(vertices[ids[0]], vertices[ids[1]], values[0], values[1])
    beta = weights.beta[row, edge]
    total = beta.new_zeros(cubes.num_vertices).index_add(0, dual, beta)
    share = beta / total[dual]
    points = crossings.new_zeros(cubes.num_vertices, 3).index_add(0, dual, share[:, None] * crossings)
    return points, _mean_absolute_deviation(_length(points[dual] - crossings), dual, cubes.num_vertices)


def _mean_absolute_deviation(values: Tensor, group: Tensor, num_groups: int) -> Tensor:
    """Mean absolute deviation from the mean, per group (num_groups,)."""
    counts = values.new_zeros(num_groups).index_add(0, group, torch.ones_like(values))
    mean = values.new_zeros(num_groups).index_add(0, group, values) / counts
    return values.new_zeros(num_groups).index_add(0, group, (values - mean[group]).abs()) / counts


def _length(vectors: Tensor) -> Tensor:
    """Lengths (N,) of vectors, with zero gradient where the length is 0."""
    squared = vectors.square().sum(dim=1)
    positive = squared > 0
    return torch.where(positive, torch.where(positive, squared, 1.0).sqrt(), 0.0)


def _quads(inside: Tensor, cubes: _Cubes) -> tuple[Tensor, Tensor]:
    """Dual vertices (Q, 4) around each inner grid edge with a sign change, and the rows (Q, 4) of their cubes."""
    n = cubes.resolution
    parts, part_rows = [], []
    for axis in range(3):
        strides = [n ** (2 - (axis + k) % 3) for k in range(3)]
        inner = inside.permute([(axis + k) % 3 for k in range(3)])[:, 1:-1, 1:-1]
        low, high = inner[:-1], inner[1:]
        i, j, k = (low != high).nonzero().unbind(1)  # j, k: indices of the cube on the lower side along both other axes
        # Counter-clockwise around the axis.
        around = ((0, 0), (1, 0), (1, 1), (0, 1))
        cube = torch.stack([i * strides[0] + (j + p) * strides[1] + (k + q) * strides[2] for p, q in around], dim=1)
        edge = torch.tensor([4 * axis + 2 * (1 - p) + (1 - q) for p, q in around], device=inside.device)
        row = cubes.row[cube]
        quad = cubes.first[row] + cubes.loops[row, edge]
        outward = low[i, j, k][:, None]
        parts.append(torch.where(outward, quad, quad.flip(1)))
        part_rows.append(torch.where(outward, row, row.flip(1)))
    return torch.cat(parts), torch.cat(part_rows)


class _Tables(NamedTuple):
    """Surface of a cube for each of the 256 sets of inside corners (bit k for corner k)."""

    loops: Tensor  # (2, 256, 12) loop of each edge or -1; entry 1: with the pinched face joined
    num_loops: Tensor  # (2, 256)
    pinched_face: Tensor  # (256,) ambiguous face with all four edges in one loop, or -1
    edge_corners: Tensor  # (12, 2)


@lru_cache(maxsize=8)
def _tables(device: torch.device) -> _Tables:
    """Build the tables by connecting the edge crossings across each face.

    On an ambiguous face (inside corners diagonally opposite) the inside corners are separated, for both cubes of the
    face, so that their surfaces match. In some cubes one loop then crosses such a face twice. If this happens on both
    sides of the face, the two dual vertices would share two edges; joining the inside corners of that face splits both
    loops. A cube has at most one such face, and joining it creates no other (a test covers all 256 cases).
    """
    loops = torch.full((2, 256, 12), -1, dtype=torch.int64)
    pinched = torch.full((256,), -1, dtype=torch.int64)
    for case in range(256):
        names = cube_loops(case)
        loops[0, case] = torch.tensor(names)
        face = next(iter(pinched_faces(case, names)), -1)
        pinched[case] = face
        loops[1, case] = torch.tensor(cube_loops(case, joined_face=face))
    corners = torch.tensor(_EDGE_CORNERS)
    return _Tables(*(table.to(device) for table in (loops, loops.amax(dim=2) + 1, pinched, corners)))


def cube_loops(case: int, *, joined_face: int = -1) -> list[int]:
    """Loop numbers of the 12 edges of a cube, starting at 0; -1 for edges that are not crossed."""
    parent = list(range(12))

    def root(edge: int) -> int:
        while parent[edge] != edge:
            edge = parent[edge]
        return edge

    for face in range(6):
        for first, second in _face_segments(case, face, joined=face == joined_face):
            parent[root(first)] = root(second)
    crossed = [edge for edge, (a, b) in enumerate(_EDGE_CORNERS) if (case >> a ^ case >> b) & 1]
    names = {name: number for number, name in enumerate(dict.fromkeys(root(edge) for edge in crossed))}
    return [names[root(edge)] if edge in crossed else -1 for edge in range(12)]


def pinched_faces(case: int, loops: list[int]) -> list[int]:
    """Ambiguous faces of a cube whose four edges are in one loop."""
    ambiguous = [face for face in range(6) if len(_face_segments(case, face, joined=False)) == 2]
    return [face for face in ambiguous if len({loops[edge] for edge in _FACE_EDGES[face]}) == 1]


def _face_segments(case: int, face: int, *, joined: bool) -> list[tuple[int, int]]:
    """Pairs of edges that the surface connects across a face."""
    corners, edges = _FACE_CORNERS[face], _FACE_EDGES[face]
    inner = [bool(case >> corner & 1) for corner in corners]
    crossed = [k for k in range(4) if inner[k] != inner[(k + 1) % 4]]
    if len(crossed) == 4:
        # Separate each inside corner, or each outside corner if the inside corners are joined.
        return [(edges[k - 1], edges[k]) for k in range(4) if inner[k] != joined]
    return [(edges[crossed[0]], edges[crossed[1]])] if crossed else []


def _corner(axis: int, along: int, p: int, q: int) -> int:
    """Corner at offset ``along`` on the axis and (p, q) on the two axes that follow cyclically."""
    return along << (2 - axis) | p << (2 - (axis + 1) % 3) | q << (2 - (axis + 2) % 3)


_EDGE_CORNERS = [
    (_corner(axis, 0, p, q), _corner(axis, 1, p, q)) for axis, p, q in product(range(3), range(2), range(2))
]
# Corners of each face in cyclic order; edge k connects corners k and k + 1.
_FACE_CORNERS = [
    [_corner(axis, side, p, q) for p, q in ((0, 0), (1, 0), (1, 1), (0, 1))]
    for axis, side in product(range(3), range(2))
]
_FACE_EDGES = [
    [_EDGE_CORNERS.index((min(a, b), max(a, b))) for a, b in zip(face, face[1:] + face[:1], strict=True)]
    for face in _FACE_CORNERS
]

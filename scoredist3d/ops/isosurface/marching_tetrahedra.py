"""Marching tetrahedra: the zero level of a field on a tetrahedral grid as a mesh, differentiable in field and grid.

Signed distances are negative inside; a value of exactly zero is outside. Faces are counter-clockwise seen from outside.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from scoredist3d.ops.isosurface.tetrahedra import TET_EDGES, TetrahedralGrid


def marching_tetrahedra(vertices: Tensor, sdf: Tensor, grid: TetrahedralGrid) -> tuple[Tensor, Tensor]:
    """The surface sdf = 0 by marching tetrahedra (DMTet, Shen et al. 2021, arXiv 2111.04276, section 3.2).

    A mesh vertex lies on each grid edge whose ends a, b have different signs, where linear interpolation vanishes:
    (v_a s_b - v_b s_a) / (s_b - s_a). Each tetrahedron with both signs holds one triangle or two. The faces share their
    vertices, and the mesh is an oriented manifold, closed wherever the zero level does not leave the grid. Values of
    exactly zero are no exception: the vertices then fall together with the grid's and some triangles have no area.

    Args:
        vertices: (V, 3) float; the grid's, or these moved by less than half a spacing. Differentiable.
        sdf: (V,) float, finite. Differentiable.
        grid: Its connectivity, on the same device.

    Returns:
        Vertices (M, 3) in the order of their grid edges, and faces (F, 3) int64. Both empty if the sign never changes.

    Raises:
        ValueError: On a wrong shape or device, or values that are not finite.
    """
    check_field("marching tetrahedra", vertices, sdf, len(grid.vertices))
    if grid.tets.device != sdf.device:
        raise ValueError(f"marching tetrahedra: the grid is on {grid.tets.device}, the sdf on {sdf.device}; move one")
    edge_ids = _surface_triangles(sdf.detach() < 0, grid)
    crossed = torch.zeros(len(grid.edges), dtype=torch.bool, device=sdf.device)
    crossed[edge_ids.reshape(-1)] = True
    crossing = crossed.nonzero()[:, 0]
    rank = torch.empty(len(grid.edges), dtype=torch.int64, device=sdf.device)
    rank[crossing] = torch.arange(len(crossing), device=sdf.device)
    start, end = grid.edges[crossing].long().unbind(1)
    return zero_crossings(vertices[start], vertices[end], sdf[start], sdf[end]), rank[edge_ids]


def sign_change_loss(sdf: Tensor, edges: Tensor) -> Tensor:
    """Cross entropy that makes neighbours of different sign agree (Munkberg et al. 2022, arXiv 2111.12503, eq. 2).

    Removes floating pieces that no image sees: over the edges whose ends differ in sign, the mean of
    H(sigmoid(s_a), sign s_b) + H(sigmoid(s_b), sign s_a).

    Args:
        sdf: (V,) float.
        edges: (E, 2) integer vertex ids, for example ``grid.edges``.

    Returns:
        A scalar; zero if no edge changes sign.
    """
    inside = sdf.detach() < 0
    first, second = edges.unbind(1)
    crossing = (inside[first] != inside[second]).nonzero()[:, 0]
    if not len(crossing):
        return sdf.sum() * 0
    start, end = edges[crossing].long().unbind(1)
    outside = (~inside).to(sdf.dtype)
    entropy = F.binary_cross_entropy_with_logits
    return entropy(sdf[start], outside[end]) + entropy(sdf[end], outside[start])


def zero_crossings(start: Tensor, end: Tensor, value_at_start: Tensor, value_at_end: Tensor) -> Tensor:
    """(N, 3) points of the segments from ``start`` to ``end`` (N, 3) where the linear field with these values is 0."""
    fraction = value_at_start / (value_at_start - value_at_end)
    return start + fraction[:, None] * (end - start)


def check_field(name: str, vertices: Tensor, sdf: Tensor, count: int) -> None:
    """Raise ValueError unless ``vertices`` (count, 3) and ``sdf`` (count,) fit and the sdf is finite."""
    if vertices.shape != (count, 3) or sdf.shape != (count,):
        shapes = f"{tuple(vertices.shape)} and {tuple(sdf.shape)}"
        raise ValueError(f"{name}: vertices and sdf must be ({count}, 3) and ({count},) on this grid, got {shapes}")
    if not bool(torch.isfinite(sdf.detach()).all()):
        bad = int((~torch.isfinite(sdf.detach())).sum())
        raise ValueError(f"{name}: {bad} of the {count} sdf values are not finite; the field has diverged")


def _surface_triangles(inside: Tensor, grid: TetrahedralGrid) -> Tensor:
    """(F, 3) int64: the grid edges whose crossings are the corners of the triangles."""
    # Four bytes of 0 or 1 read as one number: the mixed tetrahedra are found without a sum over each.
    corners = inside.view(torch.uint8).index_select(0, grid.tets.view(-1))
    signs = corners.view(torch.int32)
    mixed = ((signs != 0) & (signs != 0x01010101)).nonzero()[:, 0]
    bits = torch.tensor([1, 2, 4, 8], device=inside.device)
    case = (corners.view(-1, 4)[mixed] * bits).sum(dim=1)
    local = _triangle_table(inside.device)[case]
    edges = grid.tet_edges[mixed].long().gather(1, local.clamp(min=0))
    return edges.view(-1, 2, 3)[local.view(-1, 2, 3)[:, :, 0] >= 0]


@lru_cache(maxsize=8)
def _triangle_table(device: torch.device) -> Tensor:
    """(16, 6) int64: the edges of up to two triangles for each set of inner corners (bit k for corner k), else -1."""
    table = torch.full((16, 6), -1, dtype=torch.int64)
    for case in range(1, 15):
        polygon = _case_polygon(case)
        triangles = [(polygon[0], polygon[k], polygon[k + 1]) for k in range(1, len(polygon) - 1)]
        flat = [edge for triangle in triangles for edge in triangle]
        table[case, : len(flat)] = torch.tensor(flat)
    return table.to(device)


def _case_polygon(case: int) -> list[int]:
    """Edges whose crossings bound the surface in a tetrahedron, counter-clockwise seen from outside."""
    inner = [corner for corner in range(4) if case >> corner & 1]
    outer = [corner for corner in range(4) if not case >> corner & 1]
    if len(inner) == 2:
        pairs = [(inner[0], outer[0]), (inner[0], outer[1]), (inner[1], outer[1]), (inner[1], outer[0])]
    else:
        pairs = [(i, o) for i in inner for o in outer]
    corners = torch.cat((torch.zeros(1, 3), torch.eye(3)))  # a tetrahedron of positive volume
    points = torch.stack([corners[i] + corners[o] for i, o in pairs])
    normal = torch.linalg.cross(points[1] - points[0], points[2] - points[0])
    outward = corners[outer].mean(dim=0) - corners[inner].mean(dim=0)
    polygon = [TET_EDGES.index((min(pair), max(pair))) for pair in pairs]
    return polygon if float(normal @ outward) > 0 else polygon[::-1]

"""Marching tetrahedra: differentiable extraction of the zero level set of a field on a tetrahedral grid.

Signed distances are negative inside; a value of exactly zero is outside. Faces are counter-clockwise seen from outside.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from scoredist3d.ops.isosurface.tetrahedra import TET_EDGES, TetrahedralGrid


def marching_tetrahedra(vertices: Tensor, sdf: Tensor, grid: TetrahedralGrid) -> tuple[Tensor, Tensor]:
    """Extract the surface sdf = 0 by marching tetrahedra (DMTet, Shen et al. 2021, arXiv 2111.04276, section 3.2).

    Each grid edge whose ends a, b have different signs has a mesh vertex at the zero of the linear interpolation,
    (v_a s_b - v_b s_a) / (s_b - s_a). Each tetrahedron with both signs has one or two triangles. The faces share their
    vertices, and the mesh is an oriented manifold, closed if the zero level set is inside the grid. This also holds for
    values of exactly zero: mesh vertices then coincide with grid vertices and some triangles are degenerate.

    Args:
        vertices: (V, 3) float, vertices of the grid, possibly displaced by less than half a spacing. Differentiable.
        sdf: (V,) float, finite. Differentiable.
        grid: The grid, whose connectivity is used; on the same device.

    Returns:
        Vertices (M, 3) in the order of their grid edges, and faces (F, 3) int64; both are empty if the sign is
        constant.

    Raises:
        ValueError: A shape or device is wrong, or a value is not finite.
    """
    check_field("marching tetrahedra", vertices, sdf, len(grid.vertices))
    if grid.tets.device != sdf.device:
        raise ValueError(
            f"marching tetrahedra: the grid is on {grid.tets.device} and the sdf on {sdf.device}; "
            "move them to the same device"
        )
    edge_ids = _surface_triangles(sdf.detach() < 0, grid)
    crossed = torch.zeros(len(grid.edges), dtype=torch.bool, device=sdf.device)
    crossed[edge_ids.reshape(-1)] = True
    crossing = crossed.nonzero()[:, 0]
    rank = torch.empty(len(grid.edges), dtype=torch.int64, device=sdf.device)
    rank[crossing] = torch.arange(len(crossing), device=sdf.device)
    start, end = grid.edges[crossing].long().unbind(1)
    return zero_crossings(vertices[start], vertices[end], sdf[start], sdf[end]), rank[edge_ids]


def sign_change_loss(sdf: Tensor, edges: Tensor) -> Tensor:
    """Cross entropy that penalizes sign changes of the SDF (Munkberg et al. 2022, arXiv 2111.12503, eq. 2).

    It is the mean of H(sigmoid(s_a), sign s_b) + H(sigmoid(s_b), sign s_a) over the edges whose ends differ in sign,
    and removes floating components that are not visible in any image.

    Args:
        sdf: (V,) float.
        edges: (E, 2), integer vertex indices, for example ``grid.edges``.

    Returns:
        A scalar, 0 if no edge has a sign change.
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
    """Zeros (N, 3) of the linear functions with the given values at ``start`` and ``end`` (N, 3)."""
    fraction = value_at_start / (value_at_start - value_at_end)
    return start + fraction[:, None] * (end - start)


def check_field(name: str, vertices: Tensor, sdf: Tensor, count: int) -> None:
    """Raise ValueError unless ``vertices`` is (count, 3), ``sdf`` is (count,), and all of ``sdf`` is finite."""
    if vertices.shape != (count, 3) or sdf.shape != (count,):
        shapes = f"{tuple(vertices.shape)} and {tuple(sdf.shape)}"
        raise ValueError(f"{name}: vertices and sdf must be ({count}, 3) and ({count},) for this grid, got {shapes}")
    if not bool(torch.isfinite(sdf.detach()).all()):
        bad = int((~torch.isfinite(sdf.detach())).sum())
        raise ValueError(f"{name}: {bad} of the {count} sdf values are not finite; the field has diverged")


def _surface_triangles(inside: Tensor, grid: TetrahedralGrid) -> Tensor:
    """Grid edges (F, 3) int64 whose zero crossings are the corners of the triangles."""
    # The four signs of a tetrahedron, one byte each, are compared as one 32-bit integer.
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
    """Edges of up to two triangles, padded with -1, per set of inside corners (bit k for corner k); (16, 6) int64."""
    table = torch.full((16, 6), -1, dtype=torch.int64)
    for case in range(1, 15):
        polygon = _case_polygon(case)
        triangles = [(polygon[0], polygon[k], polygon[k + 1]) for k in range(1, len(polygon) - 1)]
        flat = [edge for triangle in triangles for edge in triangle]
        table[case, : len(flat)] = torch.tensor(flat)
    return table.to(device)


def _case_polygon(case: int) -> list[int]:
    """Edges whose crossings are the corners of the surface in a tetrahedron, counter-clockwise seen from outside."""
    inner = [corner for corner in range(4) if case >> corner & 1]
    outer = [corner for corner in range(4) if not case >> corner & 1]
    if len(inner) == 2:
        pairs = [(inner[0], outer[0]), (inner[0], outer[1]), (inner[1], outer[1]), (inner[1], outer[0])]
    else:
        pairs = [(i, o) for i in inner for o in outer]
    corners = torch.cat((torch.zeros(1, 3), torch.eye(3)))  # a tetrahedron with positive volume
    points = torch.stack([corners[i] + corners[o] for i, o in pairs])
    normal = torch.linalg.cross(points[1] - points[0], points[2] - points[0])
    outward = corners[outer].mean(dim=0) - corners[inner].mean(dim=0)
    polygon = [TET_EDGES.index((min(pair), max(pair))) for pair in pairs]
    return polygon if float(normal @ outward) > 0 else polygon[::-1]

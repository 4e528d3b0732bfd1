"""Visible triangles and silhouettes in plain torch, the reference for the other backends.

All arithmetic is float64, in an order that the C and Triton kernels reproduce, so that all backends find the same
triangle at every pixel. Homogeneous edge functions (Olano & Greer 1997) need no clipping: for vertices
``v_i = (x_i, y_i, w_i)`` in pixels times w, ``e_i = v_j x v_k`` is a linear function of the pixel position. Its sign
equals that of ``det(v_0, v_1, v_2)`` exactly where the weight of corner i is positive and the surface is in front of
the camera. Two triangles compute exactly opposite values for their common edge, which makes the tie break watertight.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Bounding-box pixels per chunk; each needs about 1.5 kB while it is tested.
_CHUNK = 1 << 18
_EMPTY = torch.iinfo(torch.int64).max
_MAX_WALK = 64


class Setup(NamedTuple):
    """Edge functions, depth planes and bounding boxes of the triangles of ``B`` images.

    Attributes:
        edges: (B, F, 3, 3) float64, coefficients (a, b, c) of the three edge functions, positive inside.
        edge_included: (B, F, 3) bool, whether pixel centers on the edge belong to the triangle.
        depth: (B, F, 3) float64, ``z / w = depth . (x, y, 1)``.
        first: (B, F, 2) int64, first column and row of the bounding box.
        size: (B, F, 2) int64, columns and rows of the bounding box; 0 if the triangle is invisible.
    """

    edges: Tensor
    edge_included: Tensor
    depth: Tensor
    first: Tensor
    size: Tensor


def screen_positions(clip: Tensor, height: int, width: int) -> Tensor:
    """Screen coordinates (..., 4) float64: x and y in pixels from the top left corner, times w; z; w."""
    x, y, z, w = clip.double().unbind(-1)
    return torch.stack(((x + w) * (0.5 * width), (w - y) * (0.5 * height), z, w), dim=-1)


def set_up(clip: Tensor, faces: Tensor, height: int, width: int) -> Setup:
    """Compute edge functions, depth planes and bounding boxes."""
    v = screen_positions(clip, height, width)[:, faces.long()]  # (B, F, 3, 4)
    x, y, z, w = v.unbind(-1)
    p, q = v.roll(-1, 2), v.roll(-2, 2)
    a = p[..., 1] * q[..., 3] - p[..., 3] * q[..., 1]
    b = p[..., 3] * q[..., 0] - p[..., 0] * q[..., 3]
    c = p[..., 0] * q[..., 1] - p[..., 1] * q[..., 0]
    determinant = (a[..., 0] * x[..., 0] + b[..., 0] * y[..., 0]) + c[..., 0] * w[..., 0]
    edges = torch.stack((a, b, c), dim=-1) * torch.where(determinant > 0, 1.0, -1.0)[..., None, None]
    weighted = edges * z[..., None]
    depth = ((weighted[..., 0, :] + weighted[..., 1, :]) + weighted[..., 2, :]) / determinant.abs()[..., None]
    included = (edges[..., 0] > 0) | ((edges[..., 0] == 0) & (edges[..., 1] > 0))
    first, size = _boxes(x, y, w, height, width)
    drawable = (determinant.abs() > 0) & ~determinant.isinf()
    return Setup(edges, included, depth, first, size * drawable[..., None])


def _boxes(x: Tensor, y: Tensor, w: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """First pixel and size of the bounding boxes; the whole image if a corner is not in front of the camera."""
    limits = w.new_tensor([width, height])
    screen = torch.stack((x / w, y / w), dim=-1)  # (B, F, 3, 2)
    low = (screen.amin(dim=2) - 0.5 - 1e-6).ceil()
    high = (screen.amax(dim=2) - 0.5 + 1e-6).floor() + 1.0
    everywhere = ~(w.amin(dim=2) > 0)[..., None]
    low = torch.where(everywhere, 0.0, low.clamp(min=0.0).minimum(limits))
    high = torch.where(everywhere, limits, high.clamp(min=0.0).minimum(limits))
    seen = (w.amax(dim=2) > 0)[..., None] & (high > low).all(dim=-1, keepdim=True)
    size = torch.where(seen, high - low, 0.0)
    return low.long(), size.long()


def quantize(depth: Tensor) -> Tensor:
    """Quantize depth in [-1, 1] to an integer below 2^32."""
    return ((depth + 1.0) * 2147483648.0).long().clamp(max=4294967295)


def visible_triangles(clip: Tensor, faces: Tensor, height: int, width: int) -> Tensor:
    """Index + 1 of the nearest triangle at each pixel center, 0 if there is none; (B, H, W) int32.

    Of triangles with equal depth, the first is chosen.
    """
    batch, count = clip.shape[0], faces.shape[0]
    setup = set_up(clip, faces, height, width)
    keys = torch.full((batch * height * width,), _EMPTY, dtype=torch.int64, device=clip.device)
    boxes = setup.size.prod(dim=-1).reshape(-1)
    ends = boxes.cumsum(0)
    total = int(ends[-1]) if ends.numel() else 0
    for first in range(0, total, _CHUNK):
        pair = torch.arange(first, min(first + _CHUNK, total), device=clip.device)
        item = torch.searchsorted(ends, pair, right=True)
        place, key, drawn = _test_pixels(setup, item, pair - (ends - boxes)[item], item % count, height, width)
        keys.scatter_reduce_(0, place[drawn], key[drawn], "amin")
    triangle = torch.where(keys == _EMPTY, 0, (keys & 0x7FFFFFFF) + 1)
    return triangle.to(torch.int32).reshape(batch, height, width)


def _test_pixels(
    setup: Setup, item: Tensor, offset: Tensor, triangle: Tensor, height: int, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Flat index, key (depth, then triangle) and coverage of the pixels ``offset`` in the bounding boxes ``item``."""
    flat = [part.flatten(0, 1)[item] for part in setup]
    edges, included, depth, box, size = flat
    column = box[:, 0] + offset % size[:, 0]
    row = box[:, 1] + offset // size[:, 0]
    x, y = column.double() + 0.5, row.double() + 0.5
    value = edges[..., 0] * x[:, None] + (edges[..., 1] * y[:, None] + edges[..., 2])
    inside = ((value > 0) | ((value == 0) & included)).all(dim=1)
    z = depth[:, 0] * x + (depth[:, 1] * y + depth[:, 2])
    drawn = inside & (z >= -1.0) & (z <= 1.0)
    image = item // (setup.size.shape[1])
    return (image * height + row) * width + column, quantize(torch.where(drawn, z, 0.0)) * 2**31 + triangle, drawn


class _Line(NamedTuple):
    """Lines through pairs of points (u, v, w), as the coefficients of u, v and w."""

    u: Tensor
    v: Tensor
    w: Tensor

    @staticmethod
    def through(p: Tensor, q: Tensor) -> _Line:
        """Lines through the points p and q, (K, 3) each."""
        return _Line(
            p[:, 1] * q[:, 2] - q[:, 1] * p[:, 2],
            p[:, 2] * q[:, 0] - p[:, 0] * q[:, 2],
            p[:, 0] * q[:, 1] - p[:, 1] * q[:, 0],
        )

    def side(self, p: Tensor) -> Tensor:
        """Signed value (K,) of the line equation at points p (K, 3)."""
        return (self.u * p[:, 0] + self.v * p[:, 1]) + self.w * p[:, 2]


class _Walks:
    """K walks over a mesh, in the image plane, each from a pixel center to an adjacent one.

    Points have the coordinates (u, v, w): along and across the walk, in pixels from its start times w, and w.
    """

    def __init__(
        self, screen: Tensor, faces: Tensor, image: Tensor, start: Tensor, direction: Tensor, vertical: bool
    ) -> None:
        self.screen = screen  # (B, V, 4)
        self.faces = faces
        self.image = image
        self.start = start  # (K, 2), x and y
        self.direction = direction
        self.vertical = vertical

    def keep(self, chosen: Tensor) -> _Walks:
        """Subset ``chosen`` of the walks."""
        start, direction = self.start[chosen], self.direction[chosen]
        return _Walks(self.screen, self.faces, self.image[chosen], start, direction, self.vertical)

    def see(self, vertex: Tensor) -> Tensor:
        """Coordinates (K, 3) of one vertex per walk."""
        p = self.screen[self.image, vertex.long()]
        w = p[:, 3]
        x, y = p[:, 0] - self.start[:, 0] * w, p[:, 1] - self.start[:, 1] * w
        along, across = (y, x) if self.vertical else (x, y)
        return torch.stack((self.direction * along, across, w), dim=1)

    def move_inside(self, points: list[Tensor]) -> list[Tensor]:
        """Shift the lines of the walks by a millionth of the distance to the centers of their first triangles.

        The shifted lines pass through the triangles even if rounding places the pixel center outside, and they rarely
        run exactly along an edge. ``points`` are the three corners (K, 3); returns them relative to the shifted lines.
        """
        (_, v0, w0), (_, v1, w1), (_, v2, w2) = (point.unbind(1) for point in points)
        shift = 1e-6 * (((v0 + v1) + v2) / ((w0 + w1) + w2))
        shift = torch.where(torch.minimum(torch.minimum(w0, w1), w2) > 0, shift, 0.0)
        self.start[:, 0 if self.vertical else 1] += shift
        return [torch.stack((u, v - shift * w, w), dim=1) for u, v, w in (point.unbind(1) for point in points)]

    def leave(self, face: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Half-edges (K,) through which walks leave their triangles (-1: none), and both vertices (v <= 0, v > 0)."""
        corners = self.faces[face]
        points = self.move_inside([self.see(corners[:, k]) for k in range(3)])
        found = torch.full_like(face, -1)
        minus, plus = corners[:, 0].clone(), corners[:, 0].clone()
        for e in range(3):
            i, j = (e + 1) % 3, (e + 2) % 3
            upper = points[i][:, 1] > 0
            low = torch.where(upper[:, None], points[j], points[i])
            high = torch.where(upper[:, None], points[i], points[j])
            line = _Line.through(low, high)
            crossed = upper != (points[j][:, 1] > 0)
            taken = (found < 0) & crossed & (line.u < 0) & (line.side(points[e]) > 0)
            found = torch.where(taken, 3 * face + e, found)
            minus = torch.where(taken, torch.where(upper, corners[:, j], corners[:, i]), minus)
            plus = torch.where(taken, torch.where(upper, corners[:, i], corners[:, j]), plus)
        return found, minus, plus


def silhouettes(clip: Tensor, faces: Tensor, across: Tensor, triangle: Tensor, depth: Tensor) -> Tensor:
    """Find the silhouette edge between each pixel and its neighbors.

    For two pixels that show different triangles, a walk over the mesh goes from the nearer triangle towards the other
    pixel. It ends at an edge where the surface folds back or ends, or at the center of the other pixel.

    Args:
        clip: (B, V, 4).
        faces: (F, 3) int32.
        across: (F, 3) int32, see ``EdgeTopology``.
        triangle, depth: (B, H, W), fields of ``Fragments``.

    Returns:
        (B, 2, H, W) int64, for the neighbors to the right and below: 0 if there is no silhouette, otherwise
        ``1 + 2 * half_edge``, plus 1 if the nearer surface is that of the neighbor. Edges that are closer to the
        direction of the walk than to its normal are ignored.
    """
    batch, height, width = triangle.shape
    screen = screen_positions(clip, height, width)
    out = torch.zeros(batch, 2, height, width, dtype=torch.int64, device=clip.device)
    for vertical in (False, True):
        a = triangle[:, :-1] if vertical else triangle[..., :-1]
        b = triangle[:, 1:] if vertical else triangle[..., 1:]
        image, row, column = (a != b).nonzero(as_tuple=True)
        first, second = a[image, row, column].long(), b[image, row, column].long()
        nearer = depth[image, row + vertical, column + (not vertical)] < depth[image, row, column]
        swapped = (first == 0) | ((second != 0) & nearer)
        start = torch.stack((column + (swapped & (not vertical)), row + (swapped & vertical)), dim=1).double() + 0.5
        walks = _Walks(screen, faces, image, start, torch.where(swapped, -1.0, 1.0).double(), vertical)
        edge = _walk(walks, torch.where(swapped, second, first) - 1, across)
        out[image, int(vertical), row, column] = torch.where(edge >= 0, 1 + 2 * edge + swapped, 0)
    return out


def _walk(walks: _Walks, face: Tensor, across: Tensor) -> Tensor:
    """Half-edge (K,) at which each walk reaches a silhouette, or -1."""
    result = torch.full_like(face, -1)
    edge, minus, plus = walks.leave(face)
    active = (edge >= 0).nonzero()[:, 0]
    edge, minus, plus, walks = edge[active], minus[active], plus[active], walks.keep(active)
    for _ in range(_MAX_WALK):
        if active.numel() == 0:
            break
        line = _Line.through(walks.see(minus), walks.see(plus))
        reached = (line.u < 0) & (line.w + line.u <= 0)
        beyond = across.reshape(-1)[edge].long()
        vertex = walks.faces.reshape(-1)[beyond.clamp(min=0)]
        point = walks.see(vertex)
        ends = (beyond < 0) | (line.side(point) > 0)
        slope = line.u.abs() - line.v.abs()
        counts = slope > 0 if walks.vertical else slope >= 0
        result[active] = torch.where(reached & ends & counts, edge, -1)
        upper = point[:, 1] > 0
        dropped = torch.where(upper, plus, minus)
        minus, plus = torch.where(upper, minus, vertex), torch.where(upper, vertex, plus)
        base = beyond.clamp(min=0) // 3 * 3
        second, third = base + (beyond + 1) % 3, base + (beyond + 2) % 3
        edge = torch.where(walks.faces.reshape(-1)[second] == dropped, second, third)
        on = reached & ~ends
        active, edge, minus, plus, walks = active[on], edge[on], minus[on], plus[on], walks.keep(on)
    return result

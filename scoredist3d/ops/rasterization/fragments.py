"""Fragments: the visible triangle of each pixel, with differentiable barycentric coordinates and depth.

Screen coordinates: the pixel in row i and column j has its center at (j + 0.5, i + 0.5) from the top left corner. A
clip-space point (X, Y, Z, w) has the screen coordinates ``x = (X / w + 1) W / 2``, ``y = (1 - Y / w) H / 2``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from scoredist3d.ops import backends
from scoredist3d.ops.gather import gather_rows

BACKENDS = ("torch", "native", "triton")


@dataclass(frozen=True)
class Fragments:
    """Visible triangle of each pixel of ``B`` images.

    Attributes:
        triangle: (B, H, W) int32, index of the triangle + 1; 0 if there is none.
        barycentric: (B, H, W, 2), perspective-correct weights (u, v) of corners 0 and 1 of the triangle; corner 2 has
            the weight 1 - u - v. Differentiable in the clip positions; 0 if there is no triangle.
        depth: (B, H, W), Z / w in [-1, 1], differentiable in the clip positions; 1 (far plane) if there is no triangle.
    """

    triangle: Tensor
    barycentric: Tensor
    depth: Tensor

    @cached_property
    def hit_pixels(self) -> Tensor:
        """(P,) int64, flat indices of the covered pixels, ascending."""
        return self.triangle.reshape(-1).nonzero()[:, 0]

    @cached_property
    def hit_triangles(self) -> Tensor:
        """(P,) int64, triangles at the covered pixels."""
        return self.triangle.reshape(-1)[self.hit_pixels].long() - 1

    @cached_property
    def hit_images(self) -> Tensor:
        """(P,) int64, images of the covered pixels."""
        return self.hit_pixels // (self.triangle.shape[1] * self.triangle.shape[2])

    @property
    def mask(self) -> Tensor:
        """(B, H, W) bool, whether a triangle covers each pixel."""
        return self.triangle > 0


def shade_hits(clip: Tensor, faces: Tensor, triangle: Tensor, *, backend: str = "auto") -> Fragments:
    """Barycentric coordinates and depth of given visible triangles, differentiable in ``clip``.

    With the origin moved to the pixel center (x, y), ``p_i = (X_i - x w_i, Y_i - y w_i)``, the perspective-correct
    weights are ``b_i = p_j x p_k`` divided by their sum. Moving the origin first keeps the cross products accurate in
    single precision.

    Args:
        clip: (B, V, 4), vertices in clip space.
        faces: (F, 3).
        triangle: (B, H, W) int32, index + 1 of the visible triangle; 0 if there is none.
        backend: auto, torch (differentiable to any order), native (torch, but gathers rows in C) or triton
            (differentiable once).
    """
    name = backends.choose("shading", backend, clip.device, BACKENDS, clip.dtype)
    if name == "triton":
        from scoredist3d.ops.rasterization import fragments_triton

        return Fragments(triangle, *fragments_triton.shade(clip, faces, triangle))
    found = Fragments(triangle, clip.new_empty(0), clip.new_empty(0))
    pixels = found.hit_pixels
    index = faces.long()[found.hit_triangles] + (found.hit_images * clip.shape[1])[:, None]
    corners = gather_rows(clip.reshape(-1, 4), index, backend=name)  # (P, 3, 4)
    x, y = pixel_centers(pixels, triangle.shape[1], triangle.shape[2], clip.dtype)
    px, py, z, w = corners.permute(2, 1, 0).contiguous()  # (3, P) each; long rows are faster
    px, py = px - x * w, py - y * w
    qx, qy, rx, ry = px.roll(-1, 0), py.roll(-1, 0), px.roll(-2, 0), py.roll(-2, 0)
    area = qx * ry - qy * rx  # b_0, b_1, b_2 before the division
    weights = area / area.sum(dim=0)
    depth = (weights * z).sum(dim=0) / (weights * w).sum(dim=0)
    barycentric = put_rows(weights[:2].T, pixels, triangle.numel()).reshape(*triangle.shape, 2)
    depths = torch.ones_like(triangle, dtype=clip.dtype).reshape(-1).index_copy(0, pixels, depth)
    return Fragments(triangle, barycentric, depths.reshape(triangle.shape))


def pixel_centers(pixels: Tensor, height: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Normalized device coordinates (x right, y up) of pixels, given by flat indices in (B, H, W)."""
    column, row = pixels % width, pixels // width % height
    return (2 * column + 1).to(dtype) / width - 1, 1 - (2 * row + 1).to(dtype) / height


def put_rows(rows: Tensor, places: Tensor, count: int) -> Tensor:
    """(count, C) tensor with ``rows`` (P, C) at ``places`` (P,) and zeros elsewhere."""
    return rows.new_zeros(count, rows.shape[1]).index_copy_(0, places, rows)

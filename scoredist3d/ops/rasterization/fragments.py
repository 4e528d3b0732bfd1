"""What a rasteriser finds at each pixel, and the differentiable maths that all its backends share.

Screen: pixel (row i, column j) has its centre at (j + 0.5, i + 0.5) from the top left corner. A clip-space point
(X, Y, Z, w) lies at ``x = (X / w + 1) W / 2``, ``y = (1 - Y / w) H / 2``.
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
    """The visible triangle of each pixel of ``B`` images.

    Attributes:
        triangle: (B, H, W) int32, index of the triangle + 1; 0 where there is none.
        barycentric: (B, H, W, 2), perspective-correct weights (u, v) of the triangle's corners 0 and 1; corner 2 has
            1 - u - v. Differentiable with respect to the clip positions; 0 where there is no triangle.
        depth: (B, H, W), z/w in [-1, 1], differentiable too; 1 (the far plane) where there is no triangle.
    """

    triangle: Tensor
    barycentric: Tensor
    depth: Tensor

    @cached_property
    def hit_pixels(self) -> Tensor:
        """(P,) int64, flat indices of the pixels that show a triangle, ascending."""
        return self.triangle.reshape(-1).nonzero()[:, 0]

    @cached_property
    def hit_triangles(self) -> Tensor:
        """(P,) int64, the triangles there."""
        return self.triangle.reshape(-1)[self.hit_pixels].long() - 1

    @cached_property
    def hit_images(self) -> Tensor:
        """(P,) int64, the images they are in."""
        return self.hit_pixels // (self.triangle.shape[1] * self.triangle.shape[2])

    @property
    def mask(self) -> Tensor:
        """(B, H, W) bool, where there is a triangle."""
        return self.triangle > 0


def shade_hits(clip: Tensor, faces: Tensor, triangle: Tensor, *, backend: str = "auto") -> Fragments:
    """Barycentrics and depth of known visible triangles, differentiable with respect to ``clip``.

    With the pixel's centre moved to the origin, ``p_i = (X_i - x w_i, Y_i - y w_i)``, the perspective-correct weights
    are ``b_i = p_j x p_k`` divided by their sum. The move comes first because it keeps the cross products accurate in
    single precision.

    Args:
        clip: (B, V, 4).
        faces: (F, 3).
        triangle: (B, H, W) int32, index + 1 or 0.
        backend: auto, torch (any order of derivatives), native (the gradient's scatter in C) or triton (two kernels,
            differentiable once).
    """
    name = backends.choose("shading", backend, clip.device, BACKENDS, clip.dtype)
    if name == "triton":
        from scoredist3d.ops.rasterization import fragments_triton

        return Fragments(triangle, *fragments_triton.shade(clip, faces, triangle))
    found = Fragments(triangle, clip.new_empty(0), clip.new_empty(0))
    pixels = found.hit_pixels
    index = faces.long()[found.hit_triangles] + (found.hit_images * clip.shape[1])[:, None]
    corners = gather_rows(clip.reshape(-1, 4), index, backend=name)  # (P, 3, 4)
    x, y = pixel_centres(pixels, triangle.shape[1], triangle.shape[2], clip.dtype)
    px, py, z, w = corners.permute(2, 1, 0).contiguous()  # (3, P) each, long rows for speed
    px, py = px - x * w, py - y * w
    qx, qy, rx, ry = px.roll(-1, 0), py.roll(-1, 0), px.roll(-2, 0), py.roll(-2, 0)
    area = qx * ry - qy * rx  # b_0, b_1, b_2 before the division
    weights = area / area.sum(dim=0)
    depth = (weights * z).sum(dim=0) / (weights * w).sum(dim=0)
    barycentric = put_rows(weights[:2].T, pixels, triangle.numel()).reshape(*triangle.shape, 2)
    depths = torch.ones_like(triangle, dtype=clip.dtype).reshape(-1).index_copy(0, pixels, depth)
    return Fragments(triangle, barycentric, depths.reshape(triangle.shape))


def pixel_centres(pixels: Tensor, height: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Normalised device coordinates (x right, y up) of flat pixel indices over (B, H, W)."""
    column, row = pixels % width, pixels // width % height
    return (2 * column + 1).to(dtype) / width - 1, 1 - (2 * row + 1).to(dtype) / height


def put_rows(rows: Tensor, places: Tensor, count: int) -> Tensor:
    """(count, C), zero but for ``rows`` (P, C) at ``places`` (P,)."""
    return rows.new_zeros(count, rows.shape[1]).index_copy_(0, places, rows)

"""Silhouette antialiasing in Triton: CUDA, float32 (also in Triton's interpreter, for the tests).

One kernel finds the silhouettes and blends colors across them; another computes the gradients of colors and clip
positions. Each program handles pairs of adjacent pixels: horizontal pairs in the first half of the grid, vertical pairs
in the second half. As in the reference, the search is in float64 without contraction into FMA, and the crossings are
in float32.
"""

# mypy: disallow-untyped-defs=False, check-untyped-defs=False

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from scoredist3d.ops.rasterization.common_triton import OPTIONS, add_position_gradient

_PAIRS = 128
_MAX_WALK: tl.constexpr = tl.constexpr(64)


@triton.jit
def _see(clip, vertex, mask, x, y, half_width, half_height, direction, vertical):
    """Coordinates (u, v, w) of vertices: along and across the walk (pixels from its start, times w), and w."""
    address = clip + vertex * 4
    px = tl.load(address, mask=mask, other=0.0).to(tl.float64)
    py = tl.load(address + 1, mask=mask, other=0.0).to(tl.float64)
    w = tl.load(address + 3, mask=mask, other=1.0).to(tl.float64)
    dx = (px + w) * half_width - x * w
    dy = (w - py) * half_height - y * w
    return direction * tl.where(vertical, dy, dx), tl.where(vertical, dx, dy), w


@triton.jit
def _line(mu, mv, mw, pu, pv, pw):
    """Coefficients of the lines through pairs of points."""
    return mv * pw - pv * mw, mw * pu - mu * pw, mu * pv - mv * pu


@triton.jit
def _leave(iu, iv, iw, ju, jv, jw, ku, kv, kw):
    """Whether a walk leaves its triangle through the edge (i, j) opposite to k."""
    upper = iv > 0.0
    crossed = upper != (jv > 0.0)
    mu, mv, mw = tl.where(upper, ju, iu), tl.where(upper, jv, iv), tl.where(upper, jw, iw)
    pu, pv, pw = tl.where(upper, iu, ju), tl.where(upper, iv, jv), tl.where(upper, iw, jw)
    lu, lv, lw = _line(mu, mv, mw, pu, pv, pw)
    return crossed & (lu < 0.0) & ((lu * ku + lv * kv) + lw * kw > 0.0)


@triton.jit
def _pick(by0, by1, for0, for1, for2):
    """Select the value that belongs to the edge through which the walk leaves."""
    return tl.where(by0, for0, tl.where(by1, for1, for2))


@triton.jit
def _start(clip, faces, face, base, active, x, y, half_width, half_height, direction, vertical):
    """First edge that each walk crosses.

    Returns the offset that shifts the line of the walk toward the center of its first triangle, whether the line leaves
    that triangle through an edge, the corner opposite to that edge, and the two vertices of the edge. A vertex is
    (index, u, v, w); the first has v <= 0, the second has v > 0.
    """
    i0 = tl.load(faces + face * 3, mask=active, other=0).to(tl.int64)
    i1 = tl.load(faces + face * 3 + 1, mask=active, other=0).to(tl.int64)
    i2 = tl.load(faces + face * 3 + 2, mask=active, other=0).to(tl.int64)
    u0, v0, w0 = _see(clip, base + i0, active, x, y, half_width, half_height, direction, vertical)
    u1, v1, w1 = _see(clip, base + i1, active, x, y, half_width, half_height, direction, vertical)
    u2, v2, w2 = _see(clip, base + i2, active, x, y, half_width, half_height, direction, vertical)
    # Shift by a millionth of the distance to the center of the triangle, see ``move_inside`` in the reference.
    shift = 1e-6 * (((v0 + v1) + v2) / ((w0 + w1) + w2))
    shift = tl.where(tl.minimum(tl.minimum(w0, w1), w2) > 0.0, shift, 0.0)
    v0, v1, v2 = v0 - shift * w0, v1 - shift * w1, v2 - shift * w2
    by0 = _leave(u1, v1, w1, u2, v2, w2, u0, v0, w0)
    by1 = _leave(u2, v2, w2, u0, v0, w0, u1, v1, w1) & ~by0
    by2 = _leave(u0, v0, w0, u1, v1, w1, u2, v2, w2) & ~by0 & ~by1
    i, iu, iv, iw = _pick(by0, by1, i1, i2, i0), _pick(by0, by1, u1, u2, u0), _pick(by0, by1, v1, v2, v0), _pick(by0, by1, w1, w2, w0)  # fmt: skip # noqa: E501
    j, ju, jv, jw = _pick(by0, by1, i2, i0, i1), _pick(by0, by1, u2, u0, u1), _pick(by0, by1, v2, v0, v1), _pick(by0, by1, w2, w0, w1)  # fmt: skip # noqa: E501
    upper = iv > 0.0
    minus, mu, mv, mw = _choose(upper, j, ju, jv, jw, i, iu, iv, iw)
    plus, pu, pv, pw = _choose(upper, i, iu, iv, iw, j, ju, jv, jw)
    corner = tl.where(by0, 0, tl.where(by1, 1, 2))
    return shift, active & (by0 | by1 | by2), corner, minus, mu, mv, mw, plus, pu, pv, pw


@triton.jit
def _choose(condition, i, iu, iv, iw, j, ju, jv, jw):
    """First vertex where ``condition`` holds, otherwise the second."""
    return tl.where(condition, i, j), tl.where(condition, iu, ju), tl.where(condition, iv, jv), tl.where(condition, iw, jw)  # fmt: skip # noqa: E501


@triton.jit
def _pair(triangle, depth, here, there, paired):
    """Whether two pixels show different triangles, whether the second is nearer, and the nearer triangle."""
    a = tl.load(triangle + here, mask=paired, other=0).to(tl.int64)
    b = tl.load(triangle + there, mask=paired, other=0).to(tl.int64)
    nearer = tl.load(depth + there, mask=paired, other=1.0) < tl.load(depth + here, mask=paired, other=1.0)
    active = paired & (a != b)
    swapped = (a == 0) | ((b != 0) & nearer)
    return active, swapped, tl.where(active, tl.where(swapped, b, a) - 1, 0)


@triton.jit
def _find(
    clip, faces, across, triangle, depth, here, column, row, image, mask, vertical, num_vertices, height, width,
    half_width, half_height, PAIRS: tl.constexpr,
):  # fmt: skip
    """Codes of the silhouettes between pixels and their neighbors: 0 or 1 + 2 * half_edge + (neighbor is nearer)."""
    there = here + tl.where(vertical, width, 1)
    paired = mask & tl.where(vertical, row + 1 < height, column + 1 < width)
    active, swapped, face = _pair(triangle, depth, here, there, paired)
    direction = tl.where(swapped, -1.0, 1.0).to(tl.float64)
    x = (column + tl.where(vertical, 0, swapped.to(tl.int64))).to(tl.float64) + 0.5
    y = (row + tl.where(vertical, swapped.to(tl.int64), 0)).to(tl.float64) + 0.5
    base = image * num_vertices
    shift, active, corner, minus, mu, mv, mw, plus, pu, pv, pw = _start(
        clip, faces, face, base, active, x, y, half_width, half_height, direction, vertical
    )
    x, y = tl.where(vertical, x + shift, x), tl.where(vertical, y, y + shift)
    edge = face * 3 + corner
    result = tl.zeros((PAIRS,), dtype=tl.int64)
    step = 0
    while (step < _MAX_WALK) & (tl.max(active.to(tl.int32), axis=0) > 0):
        lu, lv, lw = _line(mu, mv, mw, pu, pv, pw)
        active = active & (lu < 0.0) & (lw + lu <= 0.0)
        beyond = tl.load(across + edge, mask=active, other=-1).to(tl.int64)
        inner = active & (beyond >= 0)
        q = tl.load(faces + beyond, mask=inner, other=0).to(tl.int64)
        qu, qv, qw = _see(clip, base + q, inner, x, y, half_width, half_height, direction, vertical)
        ends = active & ((beyond < 0) | ((lu * qu + lv * qv) + lw * qw > 0.0))
        slope = tl.abs(lu) - tl.abs(lv)
        counts = (slope > 0.0) | ((slope == 0.0) & (vertical == 0))
        result = tl.where(ends & counts, 1 + 2 * edge + swapped.to(tl.int64), result)
        active = active & ~ends
        upper = qv > 0.0
        dropped = tl.where(upper, plus, minus)
        minus, mu, mv, mw = _choose(upper, minus, mu, mv, mw, q, qu, qv, qw)
        plus, pu, pv, pw = _choose(upper, q, qu, qv, qw, plus, pu, pv, pw)
        beyond = tl.where(active, beyond, 0)
        first = beyond // 3 * 3
        second, third = first + (beyond + 1) % 3, first + (beyond + 2) % 3
        edge = tl.where(tl.load(faces + second, mask=active, other=0).to(tl.int64) == dropped, second, third)
        step += 1
    return result


@triton.jit
def _crossing_end(clip, vertex, crossed, x, y, half_width, half_height, direction, vertical):
    """Coordinates (u, v, w), as in :func:`_see`, of one end of each edge, relative to the center of the near pixel."""
    px = tl.load(clip + vertex * 4, mask=crossed, other=0.0)
    py = tl.load(clip + vertex * 4 + 1, mask=crossed, other=0.0)
    w = tl.load(clip + vertex * 4 + 3, mask=crossed, other=1.0)
    right, down = (px - x * w) * half_width, (y * w - py) * half_height
    return tl.where(vertical, down, right) * direction, tl.where(vertical, right, down), w


@triton.jit
def _crossing(
    clip, faces, code, here, column, row, image, vertical, num_vertices, height, width, half_width, half_height
):  # fmt: skip
    """Crossings decoded from ``code``: both pixels, edge ends, and terms of the quotient in ``antialias._way``."""
    crossed = code > 0
    code = tl.where(crossed, code - 1, 0)
    swapped, edge = code % 2, code // 2
    there = here + tl.where(vertical, width, 1)
    near, far = tl.where(swapped == 1, there, here), tl.where(swapped == 1, here, there)
    column += tl.where(vertical, 0, swapped)
    row += tl.where(vertical, swapped, 0)
    x = tl.div_rn((2 * column + 1).to(tl.float32), 2.0 * half_width) - 1.0
    y = 1.0 - tl.div_rn((2 * row + 1).to(tl.float32), 2.0 * half_height)
    direction = tl.where(swapped == 1, -1.0, 1.0)
    corner, face = edge % 3, edge // 3
    p = image * num_vertices + tl.load(faces + face * 3 + (corner + 1) % 3, mask=crossed, other=0)
    q = image * num_vertices + tl.load(faces + face * 3 + (corner + 2) % 3, mask=crossed, other=0)
    pu, pv, pw = _crossing_end(clip, p, crossed, x, y, half_width, half_height, direction, vertical)
    qu, qv, qw = _crossing_end(clip, q, crossed, x, y, half_width, half_height, direction, vertical)
    over = tl.where(crossed, pw * qv - pv * qw, 1.0)
    way = tl.div_rn(pu * qv - pv * qu, over)
    return crossed, near, far, x, y, direction, p, q, pu, pv, pw, qu, qv, qw, over, way


@triton.jit(do_not_specialize=["num_vertices"])
def _silhouette_kernel(
    clip, faces, across, triangle, depth, image, codes, smooth, num_pixels, num_vertices, num_channels, height, width,
    half_width, half_height, BLEND: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """Find silhouettes; with BLEND also blend colors of ``image`` into its copy ``smooth``."""
    here = tl.program_id(0).to(tl.int64) * PAIRS + tl.arange(0, PAIRS)
    vertical = tl.program_id(1) == 1
    mask = here < num_pixels
    column, row, view = here % width, here // width % height, here // width // height
    code = _find(
        clip, faces, across, triangle, depth, here, column, row, view, mask, vertical, num_vertices, height, width,
        half_width, half_height, PAIRS,
    )  # fmt: skip
    tl.store(codes + ((view * 2 + vertical.to(tl.int64)) * height + row) * width + column, code, mask=mask)
    if BLEND:  # noqa: SIM102 (a compile-time condition)
        if tl.max(code, axis=0) > 0:
            crossed, near, far, _, _, _, _, _, _, _, _, _, _, _, _, way = _crossing(
                clip, faces, code, here, column, row, view, vertical, num_vertices, height, width, half_width,
                half_height,
            )  # fmt: skip
            share = way - 0.5
            target = tl.where(share > 0.0, far, near) * num_channels
            channel = 0
            while channel < num_channels:
                a = tl.load(image + near * num_channels + channel, mask=crossed, other=0.0)
                b = tl.load(image + far * num_channels + channel, mask=crossed, other=0.0)
                tl.atomic_add(smooth + target + channel, share * (a - b), mask=crossed, sem="relaxed")
                channel += 1


@triton.jit
def _add_end(gradient, vertex, crossed, x, y, half_width, half_height, direction, vertical, by_u, by_v, by_w):
    """Add the gradient of the coordinates (u, v, w) of an end to the gradient of its vertex."""
    by_u *= direction
    by_x = tl.where(vertical, by_v, by_u) * half_width
    by_y = -tl.where(vertical, by_u, by_v) * half_height
    add_position_gradient(gradient, vertex, crossed, x, y, by_x, by_y, by_w)


@triton.jit(do_not_specialize=["num_vertices"])
def _silhouette_gradient_kernel(
    clip, faces, codes, image, upstream, by_image, by_clip, num_pixels, num_vertices, num_channels, height, width,
    half_width, half_height, WITH_IMAGE: tl.constexpr, WITH_CLIP: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """Add the gradients of the crossings to ``by_image``, a copy of the upstream gradient, and to ``by_clip``."""
    here = tl.program_id(0).to(tl.int64) * PAIRS + tl.arange(0, PAIRS)
    vertical = tl.program_id(1) == 1
    mask = here < num_pixels
    column, row, view = here % width, here // width % height, here // width // height
    place = ((view * 2 + vertical.to(tl.int64)) * height + row) * width + column
    code = tl.load(codes + place, mask=mask, other=0)
    if tl.max(code, axis=0) > 0:
        crossed, near, far, x, y, direction, p, q, pu, pv, pw, qu, qv, qw, over, way = _crossing(
            clip, faces, code, here, column, row, view, vertical, num_vertices, height, width, half_width, half_height
        )
        share = way - 0.5
        target = tl.where(share > 0.0, far, near) * num_channels
        by_way = tl.zeros((PAIRS,), dtype=tl.float32)
        channel = 0
        while channel < num_channels:
            given = tl.load(upstream + target + channel, mask=crossed, other=0.0)
            a = tl.load(image + near * num_channels + channel, mask=crossed, other=0.0)
            b = tl.load(image + far * num_channels + channel, mask=crossed, other=0.0)
            by_way += given * (a - b)
            if WITH_IMAGE:
                tl.atomic_add(by_image + near * num_channels + channel, share * given, mask=crossed, sem="relaxed")
                tl.atomic_add(by_image + far * num_channels + channel, -share * given, mask=crossed, sem="relaxed")
            channel += 1
        if WITH_CLIP:
            # way = (pu qv - pv qu) / (pw qv - pv qw)
            top = tl.div_rn(by_way, over)
            bottom = -top * way
            _add_end(by_clip, p, crossed, x, y, half_width, half_height, direction, vertical,
                     top * qv, -top * qu - bottom * qw, bottom * qv)  # fmt: skip
            _add_end(by_clip, q, crossed, x, y, half_width, half_height, direction, vertical,
                     -top * pv, top * pu + bottom * pw, -bottom * pv)  # fmt: skip


def silhouettes(clip: Tensor, faces: Tensor, across: Tensor, triangle: Tensor, depth: Tensor) -> Tensor:
    """Encoded silhouette edges between adjacent pixels, (B, 2, H, W) int64, as in ``torch_backend.silhouettes``."""
    return _search(clip, faces, across, triangle, depth, None, None)


def antialias(image: Tensor, clip: Tensor, faces: Tensor, across: Tensor, triangle: Tensor, depth: Tensor) -> Tensor:
    """Blended image (B, H, W, C) float32; differentiable once, in ``image`` and ``clip``."""
    smooth: Tensor = _Antialias.apply(image, clip, faces, across, triangle, depth.detach())
    return smooth


def _search(
    clip: Tensor,
    faces: Tensor,
    across: Tensor,
    triangle: Tensor,
    depth: Tensor,
    image: Tensor | None,
    smooth: Tensor | None,
) -> Tensor:
    """Codes of the silhouettes; if ``image`` is given, also blend its colors into its copy ``smooth``."""
    batch, height, width = triangle.shape
    codes = torch.empty(batch, 2, height, width, dtype=torch.int64, device=clip.device)
    tensors = [tensor.contiguous() for tensor in (clip, faces, across, triangle, depth)]
    colors = (clip, codes, clip) if image is None or smooth is None else (image, codes, smooth)
    channels = 0 if image is None else image.shape[-1]
    sizes = (triangle.numel(), clip.shape[1], channels, height, width, 0.5 * width, 0.5 * height)
    with torch.cuda.device_of(clip):
        _silhouette_kernel[(triton.cdiv(triangle.numel(), _PAIRS), 2)](
            *tensors, *colors, *sizes, BLEND=image is not None, PAIRS=_PAIRS, **OPTIONS
        )
    return codes


class _Antialias(torch.autograd.Function):
    """Antialiased image as a function of image and clip positions."""

    @staticmethod
    def forward(
        ctx: Any, image: Tensor, clip: Tensor, faces: Tensor, across: Tensor, triangle: Tensor, depth: Tensor
    ) -> Tensor:
        image, clip = image.contiguous(), clip.contiguous()
        smooth = image.clone()
        codes = _search(clip, faces, across, triangle, depth, image, smooth)
        ctx.save_for_backward(image, clip, faces, codes)
        return smooth

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        image, clip, faces, codes = ctx.saved_tensors
        upstream = upstream.contiguous()
        with_image, with_clip = ctx.needs_input_grad[:2]
        by_image = upstream.clone() if with_image else None
        by_clip = torch.zeros_like(clip) if with_clip else None
        height, width, channels = image.shape[1:]
        pixels = codes.numel() // 2
        sizes = (pixels, clip.shape[1], channels, height, width, 0.5 * width, 0.5 * height)
        with torch.cuda.device_of(clip):
            _silhouette_gradient_kernel[(triton.cdiv(pixels, _PAIRS), 2)](
                clip, faces, codes, image, upstream, upstream if by_image is None else by_image,
                clip if by_clip is None else by_clip, *sizes,
                WITH_IMAGE=with_image, WITH_CLIP=with_clip, PAIRS=_PAIRS, **OPTIONS,
            )  # fmt: skip
        return by_image, by_clip, None, None, None, None

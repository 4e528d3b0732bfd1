"""Triangle visibility and silhouettes in Triton: CUDA, float32 (also in Triton's interpreter, for the tests).

A z-buffer of 64-bit keys (depth, then triangle) updated by an atomic minimum, so the result does not depend on the
order of the triangles. The triangles are set up by the torch reference; bounding boxes are cut into chunks of pixels,
which keeps the programs equally long whatever the sizes of the triangles. Arithmetic in float64 without contraction, as
in the reference.
"""

# mypy: disallow-untyped-defs=False, check-untyped-defs=False

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from scoredist3d.ops import rasterize_torch

_CHUNKS = 16  # chunks of a program
_PIXELS = 32  # pixels of a chunk
_PAIRS = 128
_EMPTY = torch.iinfo(torch.int64).max
_MAX_WALK: tl.constexpr = tl.constexpr(64)
_OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}


@triton.jit
def _edge(edges, included, item, mask, k: tl.constexpr, x, y):
    """Whether pixels are inside edge k of their triangles."""
    a = tl.load(edges + item * 9 + 3 * k, mask=mask, other=0.0)
    b = tl.load(edges + item * 9 + 3 * k + 1, mask=mask, other=0.0)
    c = tl.load(edges + item * 9 + 3 * k + 2, mask=mask, other=0.0)
    tie = tl.load(included + item * 3 + k, mask=mask, other=0) != 0
    value = a[:, None] * x + (b[:, None] * y + c[:, None])
    return (value > 0.0) | ((value == 0.0) & tie[:, None])


@triton.jit
def _draw_kernel(
    edges, included, depth, first, size, items, starts, keys, num_chunks, num_triangles, height, width,
    CHUNKS: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0).to(tl.int64) * CHUNKS + tl.arange(0, CHUNKS)
    mask = chunk < num_chunks
    item = tl.load(items + chunk, mask=mask, other=0)
    offset = tl.load(starts + chunk, mask=mask, other=0)[:, None] + tl.arange(0, PIXELS)[None, :]
    columns = tl.load(size + item * 2, mask=mask, other=1)[:, None]
    rows = tl.load(size + item * 2 + 1, mask=mask, other=0)[:, None]
    column = tl.load(first + item * 2, mask=mask, other=0)[:, None] + offset % columns
    row = tl.load(first + item * 2 + 1, mask=mask, other=0)[:, None] + offset // columns
    x, y = column.to(tl.float64) + 0.5, row.to(tl.float64) + 0.5
    inside = mask[:, None] & (offset < columns * rows)
    inside = inside & _edge(edges, included, item, mask, 0, x, y)
    inside = inside & _edge(edges, included, item, mask, 1, x, y)
    inside = inside & _edge(edges, included, item, mask, 2, x, y)
    by_x = tl.load(depth + item * 3, mask=mask, other=0.0)[:, None]
    by_y = tl.load(depth + item * 3 + 1, mask=mask, other=0.0)[:, None]
    z = by_x * x + (by_y * y + tl.load(depth + item * 3 + 2, mask=mask, other=0.0)[:, None])
    inside = inside & (z >= -1.0) & (z <= 1.0)
    quantised = ((tl.where(inside, z, 0.0) + 1.0) * 2147483648.0).to(tl.int64)
    quantised = tl.where(quantised > 4294967295, 4294967295, quantised)
    key = quantised * 2147483648 + (item % num_triangles)[:, None]
    image = (item // num_triangles)[:, None]
    tl.atomic_min(keys + (image * height + row) * width + column, key, mask=inside, sem="relaxed")


@triton.jit
def _see(clip, vertex, mask, x, y, half_width, half_height, direction, VERTICAL: tl.constexpr):
    """(u, v, w) of a vertex of each walk: along it, across it (pixels from its start, times w), w."""
    address = clip + vertex * 4
    px = tl.load(address, mask=mask, other=0.0).to(tl.float64)
    py = tl.load(address + 1, mask=mask, other=0.0).to(tl.float64)
    w = tl.load(address + 3, mask=mask, other=1.0).to(tl.float64)
    dx = (px + w) * half_width - x * w
    dy = (w - py) * half_height - y * w
    if VERTICAL:
        u, v = direction * dy, dx
    else:
        u, v = direction * dx, dy
    return u, v, w


@triton.jit
def _line(mu, mv, mw, pu, pv, pw):
    """Coefficients of the line through two points."""
    return mv * pw - pv * mw, mw * pu - mu * pw, mu * pv - mv * pu


@triton.jit
def _leave(iu, iv, iw, ju, jv, jw, ku, kv, kw):
    """Whether a walk leaves its triangle by the edge (i, j) opposite to k."""
    upper = iv > 0.0
    crossed = upper != (jv > 0.0)
    mu, mv, mw = tl.where(upper, ju, iu), tl.where(upper, jv, iv), tl.where(upper, jw, iw)
    pu, pv, pw = tl.where(upper, iu, ju), tl.where(upper, iv, jv), tl.where(upper, iw, jw)
    lu, lv, lw = _line(mu, mv, mw, pu, pv, pw)
    return crossed & (lu < 0.0) & ((lu * ku + lv * kv) + lw * kw > 0.0)


@triton.jit
def _pick(by0, by1, for0, for1, for2):
    return tl.where(by0, for0, tl.where(by1, for1, for2))


@triton.jit
def _start(
    clip, faces, face, base, active, x, y, half_width, half_height, direction, VERTICAL: tl.constexpr
):  # fmt: skip
    """Shift of the walk's line, whether it leaves its triangle, corner opposite to that edge, the edge's vertices.

    A vertex is (index, u, v, w); the first has v <= 0, the second v > 0.
    """
    i0 = tl.load(faces + face * 3, mask=active, other=0).to(tl.int64)
    i1 = tl.load(faces + face * 3 + 1, mask=active, other=0).to(tl.int64)
    i2 = tl.load(faces + face * 3 + 2, mask=active, other=0).to(tl.int64)
    u0, v0, w0 = _see(clip, base + i0, active, x, y, half_width, half_height, direction, VERTICAL)
    u1, v1, w1 = _see(clip, base + i1, active, x, y, half_width, half_height, direction, VERTICAL)
    u2, v2, w2 = _see(clip, base + i2, active, x, y, half_width, half_height, direction, VERTICAL)
    # A millionth of the way to the triangle's middle: see the reference.
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
    """One of two vertices."""
    return tl.where(condition, i, j), tl.where(condition, iu, ju), tl.where(condition, iv, jv), tl.where(condition, iw, jw)  # fmt: skip # noqa: E501


@triton.jit
def _pair(triangle, depth, here, there, paired):
    """Whether two pixels show different triangles, whether the second is the nearer, and the nearer triangle."""
    a = tl.load(triangle + here, mask=paired, other=0).to(tl.int64)
    b = tl.load(triangle + there, mask=paired, other=0).to(tl.int64)
    nearer = tl.load(depth + there, mask=paired, other=1.0) < tl.load(depth + here, mask=paired, other=1.0)
    active = paired & (a != b)
    swapped = (a == 0) | ((b != 0) & nearer)
    return active, swapped, tl.where(active, tl.where(swapped, b, a) - 1, 0)


@triton.jit
def _silhouette_kernel(
    clip, faces, across, triangle, depth, out, num_pixels, num_vertices, height, width, half_width, half_height,
    VERTICAL: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    here = tl.program_id(0).to(tl.int64) * PAIRS + tl.arange(0, PAIRS)
    mask = here < num_pixels
    column, row, image = here % width, here // width % height, here // width // height
    if VERTICAL:
        active, swapped, face = _pair(triangle, depth, here, here + width, mask & (row + 1 < height))
    else:
        active, swapped, face = _pair(triangle, depth, here, here + 1, mask & (column + 1 < width))
    direction = tl.where(swapped, -1.0, 1.0).to(tl.float64)
    x, y, base = column.to(tl.float64) + 0.5, row.to(tl.float64) + 0.5, image * num_vertices
    if VERTICAL:
        y += tl.where(swapped, 1.0, 0.0)
    else:
        x += tl.where(swapped, 1.0, 0.0)
    shift, active, corner, minus, mu, mv, mw, plus, pu, pv, pw = _start(
        clip, faces, face, base, active, x, y, half_width, half_height, direction, VERTICAL
    )
    if VERTICAL:
        x += shift
    else:
        y += shift
    edge = face * 3 + corner
    result = tl.zeros((PAIRS,), dtype=tl.int64)
    step = 0
    while (step < _MAX_WALK) & (tl.max(active.to(tl.int32), axis=0) > 0):
        lu, lv, lw = _line(mu, mv, mw, pu, pv, pw)
        active = active & (lu < 0.0) & (lw + lu <= 0.0)
        beyond = tl.load(across + edge, mask=active, other=-1).to(tl.int64)
        inner = active & (beyond >= 0)
        q = tl.load(faces + beyond, mask=inner, other=0).to(tl.int64)
        qu, qv, qw = _see(clip, base + q, inner, x, y, half_width, half_height, direction, VERTICAL)
        ends = active & ((beyond < 0) | ((lu * qu + lv * qv) + lw * qw > 0.0))
        slope = tl.abs(lu) - tl.abs(lv)
        counts = slope > 0.0
        if not VERTICAL:
            counts = slope >= 0.0
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
    plane = image * 2
    if VERTICAL:
        plane += 1
    tl.store(out + (plane * height + row) * width + column, result, mask=mask)


def visible_triangles(clip: Tensor, faces: Tensor, height: int, width: int) -> Tensor:
    """(B, H, W) int32, as in ``rasterize_torch``."""
    batch, count = clip.shape[0], faces.shape[0]
    setup = rasterize_torch.set_up(clip, faces, height, width)
    keys = torch.full((batch, height, width), _EMPTY, dtype=torch.int64, device=clip.device)
    chunks = (setup.size.prod(dim=-1).reshape(-1) + _PIXELS - 1) // _PIXELS
    items = torch.repeat_interleave(torch.arange(batch * count, device=clip.device), chunks)
    if items.numel() > 0:
        starts = (torch.arange(items.numel(), device=clip.device) - (chunks.cumsum(0) - chunks)[items]) * _PIXELS
        parts = (setup.edges, setup.edge_included.to(torch.uint8), setup.depth, setup.first, setup.size)
        tensors = [part.contiguous() for part in parts]
        sizes = (items.numel(), count, height, width)
        with torch.cuda.device_of(clip):
            _draw_kernel[(triton.cdiv(items.numel(), _CHUNKS),)](
                *tensors, items, starts, keys, *sizes, CHUNKS=_CHUNKS, PIXELS=_PIXELS, **_OPTIONS
            )
    return torch.where(keys == _EMPTY, 0, (keys & 0x7FFFFFFF) + 1).to(torch.int32)


def silhouettes(clip: Tensor, faces: Tensor, across: Tensor, triangle: Tensor, depth: Tensor) -> Tensor:
    """(B, 2, H, W) int64, as in ``rasterize_torch``."""
    batch, height, width = triangle.shape
    out = torch.empty(batch, 2, height, width, dtype=torch.int64, device=clip.device)
    tensors = [tensor.contiguous() for tensor in (clip, faces, across, triangle, depth)]
    sizes = (triangle.numel(), clip.shape[1], height, width)
    for vertical in (False, True):
        with torch.cuda.device_of(clip):
            _silhouette_kernel[(triton.cdiv(triangle.numel(), _PAIRS),)](
                *tensors, out, *sizes, 0.5 * width, 0.5 * height, VERTICAL=vertical, PAIRS=_PAIRS, **_OPTIONS
            )
    return out

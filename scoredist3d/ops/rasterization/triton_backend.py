"""Triangle visibility in Triton: CUDA, float32 (also in Triton's interpreter, for the tests).

The z-buffer has 64-bit keys (depth, then triangle) and is updated by an atomic minimum, so that the result does not
depend on the order of the triangles. Bounding boxes are divided into chunks of pixels, and a fixed number of programs
share the chunks of all triangles. All programs therefore take equally long, whatever the sizes of the triangles, and
the host does not synchronize. The arithmetic is float64 without contraction into FMA, in the order of the reference, so
that both find the same triangles. Loops are ``while`` loops because Triton's interpreter does not accept a tensor as
the bound of ``range``. Sizes that change during training are not specialized, to avoid recompilation.
"""

# mypy: disallow-untyped-defs=False, check-untyped-defs=False

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from scoredist3d.ops.rasterization.antialias_triton import silhouettes
from scoredist3d.ops.rasterization.common_triton import OPTIONS

__all__ = ["silhouettes", "visible_triangles"]

_BLOCK = 128  # triangles or pixels per program
_CHUNKS = 16  # chunks that a program tests at once
_PIXELS = 32  # pixels per chunk
_EMPTY = tl.constexpr(torch.iinfo(torch.int64).max)


@triton.jit
def _corner(clip, faces, base, face, mask, k: tl.constexpr, half_width, half_height):
    """Corner k of each triangle: x and y in pixels, times w; z; w."""
    vertex = base + tl.load(faces + face * 3 + k, mask=mask, other=0)
    x = tl.load(clip + vertex * 4, mask=mask, other=0.0).to(tl.float64)
    y = tl.load(clip + vertex * 4 + 1, mask=mask, other=0.0).to(tl.float64)
    z = tl.load(clip + vertex * 4 + 2, mask=mask, other=0.0).to(tl.float64)
    w = tl.load(clip + vertex * 4 + 3, mask=mask, other=1.0).to(tl.float64)
    return (x + w) * half_width, (w - y) * half_height, z, w


@triton.jit
def _cross(px, py, pw, qx, qy, qw):
    """Edge function through two corners."""
    return py * qw - pw * qy, pw * qx - px * qw, px * qy - py * qx


@triton.jit
def _extent(s0, s1, s2, everywhere, limit):
    """First pixel of the bounding boxes along one axis, and the pixel after the last."""
    low = tl.ceil(tl.minimum(tl.minimum(s0, s1), s2) - 0.5 - 1e-6)
    high = tl.floor(tl.maximum(tl.maximum(s0, s1), s2) - 0.5 + 1e-6) + 1.0
    low = tl.where(everywhere, 0.0, tl.minimum(tl.maximum(low, 0.0), limit))
    high = tl.where(everywhere, limit, tl.minimum(tl.maximum(high, 0.0), limit))
    return low, high


@triton.jit
def _store_edge(planes, box, item, k: tl.constexpr, a, b, c, mask):
    """Store an edge function, and whether pixel centers on the edge belong to the triangle."""
    tl.store(planes + item * 12 + 3 * k, a, mask=mask)
    tl.store(planes + item * 12 + 3 * k + 1, b, mask=mask)
    tl.store(planes + item * 12 + 3 * k + 2, c, mask=mask)
    tl.store(box + item * 8 + 3 + k, ((a > 0.0) | ((a == 0.0) & (b > 0.0))).to(tl.int32), mask=mask)


@triton.jit(do_not_specialize=["num_items", "num_triangles", "num_vertices"])
def _set_up_kernel(
    clip, faces, planes, box, chunks, num_items, num_triangles, num_vertices, height, width, half_width, half_height,
    PIXELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute edge functions and depth plane (12 values in ``planes``), bounding box and number of chunks.

    ``box`` holds the first column, the first row, the number of columns, whether pixel centers on each edge belong to
    the triangle, and the number of rows.
    """
    item = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = item < num_items
    base, face = item // num_triangles * num_vertices, item % num_triangles
    x0, y0, z0, w0 = _corner(clip, faces, base, face, mask, 0, half_width, half_height)
    x1, y1, z1, w1 = _corner(clip, faces, base, face, mask, 1, half_width, half_height)
    x2, y2, z2, w2 = _corner(clip, faces, base, face, mask, 2, half_width, half_height)
    a0, b0, c0 = _cross(x1, y1, w1, x2, y2, w2)
    a1, b1, c1 = _cross(x2, y2, w2, x0, y0, w0)
    a2, b2, c2 = _cross(x0, y0, w0, x1, y1, w1)
    determinant = (a0 * x0 + b0 * y0) + c0 * w0
    sign = tl.where(determinant > 0.0, 1.0, -1.0).to(tl.float64)
    a0, b0, c0, a1, b1, c1 = a0 * sign, b0 * sign, c0 * sign, a1 * sign, b1 * sign, c1 * sign
    a2, b2, c2 = a2 * sign, b2 * sign, c2 * sign
    size = tl.abs(determinant)
    drawable = mask & (size > 0.0) & (size < float("inf"))
    size = tl.where(drawable, size, 1.0)
    _store_edge(planes, box, item, 0, a0, b0, c0, mask)
    _store_edge(planes, box, item, 1, a1, b1, c1, mask)
    _store_edge(planes, box, item, 2, a2, b2, c2, mask)
    tl.store(planes + item * 12 + 9, ((a0 * z0 + a1 * z1) + a2 * z2) / size, mask=mask)
    tl.store(planes + item * 12 + 10, ((b0 * z0 + b1 * z1) + b2 * z2) / size, mask=mask)
    tl.store(planes + item * 12 + 11, ((c0 * z0 + c1 * z1) + c2 * z2) / size, mask=mask)
    before = drawable & (tl.minimum(tl.minimum(w0, w1), w2) > 0.0)
    seen = drawable & (tl.maximum(tl.maximum(w0, w1), w2) > 0.0)
    w0, w1, w2 = tl.where(before, w0, 1.0), tl.where(before, w1, 1.0), tl.where(before, w2, 1.0)
    left, right = _extent(x0 / w0, x1 / w1, x2 / w2, ~before, 2.0 * half_width)
    top, bottom = _extent(y0 / w0, y1 / w1, y2 / w2, ~before, 2.0 * half_height)
    seen = seen & (right > left) & (bottom > top)
    columns, rows = tl.where(seen, right - left, 1.0).to(tl.int32), tl.where(seen, bottom - top, 0.0).to(tl.int32)
    tl.store(box + item * 8, tl.where(seen, left, 0.0).to(tl.int32), mask=mask)
    tl.store(box + item * 8 + 1, tl.where(seen, top, 0.0).to(tl.int32), mask=mask)
    tl.store(box + item * 8 + 2, columns, mask=mask)
    tl.store(box + item * 8 + 6, rows, mask=mask)
    tl.store(chunks + item, (columns.to(tl.int64) * rows + PIXELS - 1) // PIXELS, mask=mask)


@triton.jit
def _edge(planes, box, item, mask, k: tl.constexpr, x, y):
    """Whether pixels are on the inner side of edge k of their triangles."""
    a = tl.load(planes + item * 12 + 3 * k, mask=mask, other=0.0)
    b = tl.load(planes + item * 12 + 3 * k + 1, mask=mask, other=0.0)
    c = tl.load(planes + item * 12 + 3 * k + 2, mask=mask, other=0.0)
    tie = tl.load(box + item * 8 + 3 + k, mask=mask, other=0) != 0
    value = a[:, None] * x + (b[:, None] * y + c[:, None])
    return (value > 0.0) | ((value == 0.0) & tie[:, None])


@triton.jit
def _draw(planes, box, item, offset, keys, mask, num_triangles, height, width):
    """Draw the covered pixels of one chunk per row: triangle ``item`` (CHUNKS,), pixels ``offset`` (CHUNKS, PIXELS).

    Offsets are row-major indices in the bounding box of the triangle.
    """
    columns = tl.load(box + item * 8 + 2, mask=mask, other=1)[:, None]
    rows = tl.load(box + item * 8 + 6, mask=mask, other=0)[:, None]
    column = tl.load(box + item * 8, mask=mask, other=0)[:, None] + offset % columns
    row = tl.load(box + item * 8 + 1, mask=mask, other=0)[:, None] + offset // columns
    x, y = column.to(tl.float64) + 0.5, row.to(tl.float64) + 0.5
    inside = mask[:, None] & (offset < columns.to(tl.int64) * rows)
    inside = inside & _edge(planes, box, item, mask, 0, x, y)
    inside = inside & _edge(planes, box, item, mask, 1, x, y)
    inside = inside & _edge(planes, box, item, mask, 2, x, y)
    by_x = tl.load(planes + item * 12 + 9, mask=mask, other=0.0)[:, None]
    by_y = tl.load(planes + item * 12 + 10, mask=mask, other=0.0)[:, None]
    z = by_x * x + (by_y * y + tl.load(planes + item * 12 + 11, mask=mask, other=0.0)[:, None])
    inside = inside & (z >= -1.0) & (z <= 1.0)
    quantized = ((tl.where(inside, z, 0.0) + 1.0) * 2147483648.0).to(tl.int64)
    quantized = tl.where(quantized > 4294967295, 4294967295, quantized)
    key = quantized * 2147483648 + (item % num_triangles)[:, None]
    image = (item // num_triangles)[:, None]
    tl.atomic_min(keys + (image * height + row) * width + column, key, mask=inside, sem="relaxed")


@triton.jit(do_not_specialize=["num_items", "num_triangles", "num_halvings"])
def _draw_kernel(
    planes, box, ends, keys, num_items, num_halvings, num_triangles, height, width,
    CHUNKS: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """Draw a strided subset of the chunks; ``ends`` is the cumulative number of chunks of the triangles."""
    total = tl.load(ends + num_items - 1)
    first = tl.program_id(0).to(tl.int64) * CHUNKS
    while first < total:
        chunk = first + tl.arange(0, CHUNKS)
        mask = chunk < total
        # The triangle of a chunk is the first one whose cumulative number of chunks exceeds the index of the chunk.
        item = tl.zeros((CHUNKS,), dtype=tl.int64)
        last = item + (num_items - 1)
        halving = 0
        while halving < num_halvings:
            middle = (item + last) // 2
            below = tl.load(ends + middle, mask=mask, other=0) <= chunk
            item, last = tl.where(below & mask, middle + 1, item), tl.where(below, last, middle)
            halving += 1
        start = tl.load(ends + item - 1, mask=mask & (item > 0), other=0)
        offset = ((chunk - start) * PIXELS)[:, None] + tl.arange(0, PIXELS)[None, :]
        _draw(planes, box, item, offset, keys, mask, num_triangles, height, width)
        first += tl.num_programs(0) * CHUNKS


@triton.jit
def _resolve_kernel(keys, triangle, num_pixels, BLOCK: tl.constexpr):
    """Convert keys to triangle indices + 1, or 0 where nothing was drawn."""
    pixel = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    key = tl.load(keys + pixel, mask=pixel < num_pixels, other=0)
    found = tl.where(key == _EMPTY, 0, (key & 0x7FFFFFFF) + 1)
    tl.store(triangle + pixel, found.to(tl.int32), mask=pixel < num_pixels)


def visible_triangles(clip: Tensor, faces: Tensor, height: int, width: int) -> Tensor:
    """Index + 1 of the visible triangle at each pixel, 0 if there is none; (B, H, W) int32, as in ``torch_backend``."""
    batch, count, device = clip.shape[0], faces.shape[0], clip.device
    items, pixels = batch * count, batch * height * width
    if items == 0:
        return torch.zeros(batch, height, width, dtype=torch.int32, device=device)
    planes = torch.empty(items, 12, dtype=torch.float64, device=device)
    box = torch.empty(items, 8, dtype=torch.int32, device=device)
    chunks = torch.empty(items, dtype=torch.int64, device=device)
    keys = torch.full((pixels,), _EMPTY.value, dtype=torch.int64, device=device)
    triangle = torch.empty(batch, height, width, dtype=torch.int32, device=device)
    with torch.cuda.device_of(clip):
        _set_up_kernel[(triton.cdiv(items, _BLOCK),)](
            clip.contiguous(), faces.contiguous(), planes, box, chunks, items, count, clip.shape[1], height, width,
            0.5 * width, 0.5 * height, PIXELS=_PIXELS, BLOCK=_BLOCK, **OPTIONS,
        )  # fmt: skip
        _draw_kernel[(_programs(device),)](
            planes, box, chunks.cumsum(0), keys, items, items.bit_length(), count, height, width,
            CHUNKS=_CHUNKS, PIXELS=_PIXELS, **OPTIONS,
        )  # fmt: skip
        _resolve_kernel[(triton.cdiv(pixels, _BLOCK),)](keys, triangle, pixels, BLOCK=_BLOCK)
    return triangle


@cache
def _programs(device: torch.device) -> int:
    """Number of programs that share the drawing: 16 per multiprocessor, 3 in the interpreter, which is sequential."""
    return 16 * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3

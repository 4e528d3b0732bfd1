"""Hash grid kernels in Triton: CUDA, float32 (also in Triton's interpreter, for the tests).

One program handles a block of points in one level. Gradients of the table are summed with atomics, so on a GPU their
last bits vary from run to run. Contraction into FMA is disabled, so that points fall into the same cells as in the
torch reference.
"""

# mypy: disallow-untyped-defs=False, check-untyped-defs=False

from __future__ import annotations

import struct
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from scoredist3d.ops.hash_grid.spec import HashGridSpec

_BLOCK = 256
_OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}


@triton.jit
def _level(meta, level):
    """Scale, resolution, size and first entry of a level, and whether it is hashed."""
    row = meta + level * 5
    scale = tl.load(row).to(tl.float32, bitcast=True)
    return scale, tl.load(row + 1), tl.load(row + 2), tl.load(row + 3), tl.load(row + 4)


@triton.jit
def _block(num_points, BLOCK: tl.constexpr):
    """Indices of the points of this program, and whether they are valid."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return i, i < num_points


@triton.jit
def _axis(pointer, index, mask, scale):
    """Lower corner (int32), position in the cell, and whether the coordinate is inside the cube, along one axis."""
    x = tl.load(pointer + index * 3, mask=mask, other=0.0)
    inside = (x >= 0.0) & (x <= 1.0)
    x = tl.where(x < 0.0, 0.0, tl.where(x > 1.0, 1.0, x))  # keeps NaN, which must propagate to the output
    position = x * scale + 0.5
    low = tl.where(position >= 0.0, position, 0.0).to(tl.int32)
    return low, position - low.to(tl.float32), inside


@triton.jit
def _locate(points, direction, i, mask, scale, DIRECTED: tl.constexpr):
    """Per axis: lower corner, position in the cell, whether a point is inside the cube, and direction in cells.

    Without DIRECTED the direction is undefined.
    """
    ix, fx, in_x = _axis(points, i, mask, scale)
    iy, fy, in_y = _axis(points + 1, i, mask, scale)
    iz, fz, in_z = _axis(points + 2, i, mask, scale)
    vx, vy, vz = fx, fy, fz
    if DIRECTED:
        vx = tl.where(in_x, tl.load(direction + i * 3, mask=mask, other=0.0) * scale, 0.0)
        vy = tl.where(in_y, tl.load(direction + i * 3 + 1, mask=mask, other=0.0) * scale, 0.0)
        vz = tl.where(in_z, tl.load(direction + i * 3 + 2, mask=mask, other=0.0) * scale, 0.0)
    return ix, iy, iz, fx, fy, fz, in_x, in_y, in_z, vx, vy, vz


@triton.jit
def _entry(x, y, z, resolution, size, hashed):
    """Index of the table entry of a grid vertex within its level."""
    if hashed:
        spatial = x.to(tl.uint32) ^ (y.to(tl.uint32) * 2654435761) ^ (z.to(tl.uint32) * 805459861)
        index = (spatial & (size - 1).to(tl.uint32)).to(tl.int32)
    else:
        index = x + (y + z * resolution) * resolution
        index = tl.where(index >= size, index - size, index)
    return index


@triton.jit
def _weight(corner: tl.constexpr, fx, fy, fz, vx, vy, vz, DIRECTED: tl.constexpr):
    """Trilinear weight of a corner, or its derivative along (vx, vy, vz)."""
    x = fx if corner & 1 else 1.0 - fx
    y = fy if corner & 2 else 1.0 - fy
    z = fz if corner & 4 else 1.0 - fz
    if DIRECTED:
        by_x = y * z if corner & 1 else -(y * z)
        by_y = x * z if corner & 2 else -(x * z)
        by_z = x * y if corner & 4 else -(x * y)
        weight = by_x * vx + by_y * vy + by_z * vz
    else:
        weight = x * y * z
    return weight


@triton.jit
def _encode_kernel(
    points, direction, table, out, meta, num_points, width,
    F: tl.constexpr, DIRECTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Features of BLOCK points in one level, or their derivative along the direction."""
    level = tl.program_id(1)
    i, mask = _block(num_points, BLOCK)
    scale, resolution, size, first, hashed = _level(meta, level)
    ix, iy, iz, fx, fy, fz, _, _, _, vx, vy, vz = _locate(points, direction, i, mask, scale, DIRECTED)
    feature = tl.arange(0, F)
    total = tl.zeros((BLOCK, F), dtype=tl.float32)
    for corner in tl.static_range(8):
        entry = _entry(ix + (corner & 1), iy + (corner >> 1 & 1), iz + (corner >> 2), resolution, size, hashed)
        address = table + (first + entry)[:, None].to(tl.int64) * F + feature[None, :]
        values = tl.load(address, mask=mask[:, None], other=0.0)
        total += _weight(corner, fx, fy, fz, vx, vy, vz, DIRECTED)[:, None] * values
    tl.store(out + i[:, None] * width + level * F + feature[None, :], total, mask=mask[:, None])


@triton.jit
def _table_gradient_kernel(
    points, direction, grad, out, meta, num_points, width,
    F: tl.constexpr, DIRECTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add the gradient of BLOCK points in one level to the table gradient."""
    level = tl.program_id(1)
    i, mask = _block(num_points, BLOCK)
    scale, resolution, size, first, hashed = _level(meta, level)
    ix, iy, iz, fx, fy, fz, _, _, _, vx, vy, vz = _locate(points, direction, i, mask, scale, DIRECTED)
    feature = tl.arange(0, F)
    upstream = tl.load(grad + i[:, None] * width + level * F + feature[None, :], mask=mask[:, None], other=0.0)
    for corner in tl.static_range(8):
        entry = _entry(ix + (corner & 1), iy + (corner >> 1 & 1), iz + (corner >> 2), resolution, size, hashed)
        address = out + (first + entry)[:, None].to(tl.int64) * F + feature[None, :]
        weight = _weight(corner, fx, fy, fz, vx, vy, vz, DIRECTED)
        tl.atomic_add(address, weight[:, None] * upstream, mask=mask[:, None], sem="relaxed")


@triton.jit
def _corner_product(table, upstream, entry, mask, F: tl.constexpr):
    """Dot product of a table entry and the upstream gradient."""
    feature = tl.arange(0, F)
    values = tl.load(table + entry[:, None] * F + feature[None, :], mask=mask[:, None], other=0.0)
    return tl.sum(values * upstream, axis=1)


@triton.jit
def _point_gradient_kernel(
    points, direction, table, grad, out, meta, num_points, width, levels,
    F: tl.constexpr, DIRECTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradient of BLOCK points, summed over the levels."""
    i, mask = _block(num_points, BLOCK)
    feature = tl.arange(0, F)
    sum_x = tl.zeros((BLOCK,), dtype=tl.float32)
    sum_y = tl.zeros((BLOCK,), dtype=tl.float32)
    sum_z = tl.zeros((BLOCK,), dtype=tl.float32)
    level = 0
    while level < levels:  # not range(): Triton's interpreter does not accept a tensor there with numpy 2.4
        scale, resolution, size, first, hashed = _level(meta, level)
        located = _locate(points, direction, i, mask, scale, DIRECTED)
        ix, iy, iz, x1, y1, z1, in_x, in_y, in_z, vx, vy, vz = located
        x0, y0, z0 = 1.0 - x1, 1.0 - y1, 1.0 - z1
        g = tl.load(grad + i[:, None] * width + level * F + feature[None, :], mask=mask[:, None], other=0.0)
        base = table + first.to(tl.int64) * F
        v0 = _corner_product(base, g, _entry(ix, iy, iz, resolution, size, hashed), mask, F)
        v1 = _corner_product(base, g, _entry(ix + 1, iy, iz, resolution, size, hashed), mask, F)
        v2 = _corner_product(base, g, _entry(ix, iy + 1, iz, resolution, size, hashed), mask, F)
        v3 = _corner_product(base, g, _entry(ix + 1, iy + 1, iz, resolution, size, hashed), mask, F)
        v4 = _corner_product(base, g, _entry(ix, iy, iz + 1, resolution, size, hashed), mask, F)
        v5 = _corner_product(base, g, _entry(ix + 1, iy, iz + 1, resolution, size, hashed), mask, F)
        v6 = _corner_product(base, g, _entry(ix, iy + 1, iz + 1, resolution, size, hashed), mask, F)
        v7 = _corner_product(base, g, _entry(ix + 1, iy + 1, iz + 1, resolution, size, hashed), mask, F)
        if DIRECTED:
            xy = (v3 - v2 - v1 + v0) * z0 + (v7 - v6 - v5 + v4) * z1
            xz = (v5 - v4 - v1 + v0) * y0 + (v7 - v6 - v3 + v2) * y1
            yz = (v6 - v4 - v2 + v0) * x0 + (v7 - v5 - v3 + v1) * x1
            by_x = vy * xy + vz * xz
            by_y = vx * xy + vz * yz
            by_z = vx * xz + vy * yz
        else:
            by_x = ((v1 - v0) * y0 + (v3 - v2) * y1) * z0 + ((v5 - v4) * y0 + (v7 - v6) * y1) * z1
            by_y = ((v2 - v0) * x0 + (v3 - v1) * x1) * z0 + ((v6 - v4) * x0 + (v7 - v5) * x1) * z1
            by_z = ((v4 - v0) * x0 + (v5 - v1) * x1) * y0 + ((v6 - v2) * x0 + (v7 - v3) * x1) * y1
        sum_x += tl.where(in_x, by_x * scale, 0.0)
        sum_y += tl.where(in_y, by_y * scale, 0.0)
        sum_z += tl.where(in_z, by_z * scale, 0.0)
        level += 1
    tl.store(out + i * 3, sum_x, mask=mask)
    tl.store(out + i * 3 + 1, sum_y, mask=mask)
    tl.store(out + i * 3 + 2, sum_z, mask=mask)


def encode(points: Tensor, table: Tensor, spec: HashGridSpec, levels: int, direction: Tensor | None = None) -> Tensor:
    """Features (N, L * F), or their derivative along ``direction`` (N, 3)."""
    shape = (points.shape[0], spec.output_dim)
    out = table.new_empty(shape) if levels == spec.num_levels else table.new_zeros(shape)
    arguments = (points, _or(direction, points), table, out, _meta(spec, points.device), len(points), spec.output_dim)
    _launch(_encode_kernel, (_blocks(points), levels), arguments, spec, direction)
    return out


def table_gradient(
    points: Tensor, grad: Tensor, spec: HashGridSpec, levels: int, direction: Tensor | None = None
) -> Tensor:
    """Gradient (num_entries, F) of ``sum(grad * encode(points, table, direction))``."""
    out = grad.new_zeros(spec.num_entries, spec.features_per_level)
    arguments = (points, _or(direction, points), grad, out, _meta(spec, points.device), len(points), spec.output_dim)
    _launch(_table_gradient_kernel, (_blocks(points), levels), arguments, spec, direction)
    return out


def point_gradient(
    points: Tensor, table: Tensor, grad: Tensor, spec: HashGridSpec, levels: int, direction: Tensor | None = None
) -> Tensor:
    """Gradient (N, 3) of ``sum(grad * encode(points, table, direction))``."""
    out = torch.empty_like(points)
    meta = _meta(spec, points.device)
    arguments = (points, _or(direction, points), table, grad, out, meta, len(points), spec.output_dim, levels)
    _launch(_point_gradient_kernel, (_blocks(points),), arguments, spec, direction)
    return out


def _launch(kernel: Any, grid: tuple[int, ...], arguments: tuple, spec: HashGridSpec, direction: Tensor | None) -> None:
    if 0 in grid:
        return
    with torch.cuda.device_of(arguments[0]):
        kernel[grid](*arguments, F=spec.features_per_level, DIRECTED=direction is not None, BLOCK=_BLOCK, **_OPTIONS)


def _or(direction: Tensor | None, points: Tensor) -> Tensor:
    """The direction or, if it is None, a valid tensor that the kernel does not read."""
    return points if direction is None else direction


def _blocks(points: Tensor) -> int:
    return triton.cdiv(len(points), _BLOCK)


@lru_cache(maxsize=64)
def _meta(spec: HashGridSpec, device: torch.device) -> Tensor:
    """Levels as (L, 5) int32: bits of the scale, resolution, size, first entry, and whether the level is hashed."""
    bits = [struct.unpack("<i", struct.pack("<f", scale))[0] for scale in spec.scales]
    rows = zip(bits, spec.resolutions, spec.sizes, spec.offsets[:-1], map(int, spec.hashed), strict=True)
    return torch.tensor(list(rows), dtype=torch.int32, device=device)

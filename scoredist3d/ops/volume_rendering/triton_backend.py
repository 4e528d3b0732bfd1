"""Ray marching and compositing kernels in Triton: CUDA, float32 (also in Triton's interpreter, for the tests).

One program handles a block of rays and processes their intervals in chunks. Loops are ``while`` loops because Triton's
interpreter does not accept a tensor as the bound of ``range`` with numpy 2.4.
"""

# mypy: disallow-untyped-defs=False, check-untyped-defs=False

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_RAYS = 16
_STEPS = 32
# Contraction is disabled, so that the intervals equal those of the torch reference.
_OPTIONS = {"RAYS": _RAYS, "STEPS": _STEPS, "num_warps": 4, "enable_fp_fusion": False}


@triton.jit
def _cell(origin, direction, middle, radius, cells_per_unit, last_cell):
    """Index, along one axis, of the grid cell at distance ``middle``."""
    cell = (origin[:, None] + direction[:, None] * middle + radius) * cells_per_unit
    return tl.minimum(tl.maximum(cell, 0.0), last_cell).to(tl.int32)


@triton.jit
def _march_kernel(
    origins, directions, near, far, jitter, occupancy, counts, offsets, ray_indices, starts, ends,
    num_rays, max_intervals, resolution, last_cell, step, radius, cells_per_unit,
    HAS_OCCUPANCY: tl.constexpr, FILL: tl.constexpr, RAYS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Count the intervals of each ray or, with FILL, write them."""
    ray = tl.program_id(0) * RAYS + tl.arange(0, RAYS)
    valid = ray < num_rays
    t_near = tl.load(near + ray, mask=valid, other=0.0)
    t_far = tl.load(far + ray, mask=valid, other=0.0)
    shift = tl.load(jitter + ray, mask=valid, other=0.0)
    ox = tl.load(origins + ray * 3, mask=valid, other=0.0)
    oy = tl.load(origins + ray * 3 + 1, mask=valid, other=0.0)
    oz = tl.load(origins + ray * 3 + 2, mask=valid, other=0.0)
    dx = tl.load(directions + ray * 3, mask=valid, other=0.0)
    dy = tl.load(directions + ray * 3 + 1, mask=valid, other=0.0)
    dz = tl.load(directions + ray * 3 + 2, mask=valid, other=0.0)
    count = tl.zeros((RAYS,), dtype=tl.int64)
    base = count
    if FILL:
        base = tl.load(offsets + ray, mask=valid, other=0)
    # Upper bound on the number of intervals of all rays; the exact test is the mask below.
    last = tl.minimum(tl.max((t_far - t_near) / step, axis=0).to(tl.int32) + 2, max_intervals)
    first = 0
    while first < last:
        k = first + tl.arange(0, STEPS)
        start = t_near[:, None] + (k.to(tl.float32)[None, :] + shift[:, None]) * step
        middle = start + 0.5 * step
        keep = (middle < t_far[:, None]) & (k < max_intervals)[None, :] & valid[:, None]
        if HAS_OCCUPANCY:
            x = _cell(ox, dx, middle, radius, cells_per_unit, last_cell)
            y = _cell(oy, dy, middle, radius, cells_per_unit, last_cell)
            z = _cell(oz, dz, middle, radius, cells_per_unit, last_cell)
            keep = keep & (tl.load(occupancy + (x * resolution + y) * resolution + z, mask=keep, other=0) != 0)
        ones = keep.to(tl.int32)
        if FILL:
            place = (base + count)[:, None] + tl.cumsum(ones, axis=1) - ones
            tl.store(ray_indices + place, tl.broadcast_to(ray[:, None], (RAYS, STEPS)).to(tl.int64), mask=keep)
            tl.store(starts + place, start, mask=keep)
            tl.store(ends + place, start + step, mask=keep)
        count += tl.sum(ones, axis=1)
        first += STEPS
    if not FILL:
        tl.store(counts + ray, count, mask=valid)


@triton.jit
def _intervals(offsets, ray, num_rays):
    """First interval and number of intervals of each ray, and the maximum of that number."""
    valid = ray < num_rays
    begin = tl.load(offsets + ray, mask=valid, other=0)
    count = tl.load(offsets + ray + 1, mask=valid, other=0) - begin
    return begin, count, tl.max(count, axis=0)


@triton.jit
def _chunk(first, begin, count, STEPS: tl.constexpr):
    """Mask and index (RAYS, STEPS) of STEPS intervals of each ray, starting at number ``first``."""
    k = first + tl.arange(0, STEPS)
    return k[None, :] < count[:, None], begin[:, None] + k[None, :]


@triton.jit
def _optical_depth(densities, starts, ends, place, keep, max_depth):
    """Length and optical depth (not clamped) of intervals."""
    length = tl.load(ends + place, mask=keep, other=0.0) - tl.load(starts + place, mask=keep, other=0.0)
    depth = tl.load(densities + place, mask=keep, other=0.0) * length
    return length, depth


@triton.jit
def _weights_kernel(
    densities, starts, ends, offsets, weights, num_rays, max_depth, RAYS: tl.constexpr, STEPS: tl.constexpr
):
    """Weight of each interval."""
    ray = tl.program_id(0) * RAYS + tl.arange(0, RAYS)
    begin, count, last = _intervals(offsets, ray, num_rays)
    before = tl.zeros((RAYS,), dtype=tl.float32)
    first = 0
    while first < last:
        keep, place = _chunk(first, begin, count, STEPS)
        _, depth = _optical_depth(densities, starts, ends, place, keep, max_depth)
        depth = tl.where(depth > max_depth, max_depth, depth)
        reached = before[:, None] + tl.cumsum(depth, axis=1) - depth
        tl.store(weights + place, tl.exp(-reached) * _opacity(depth), mask=keep)
        before += tl.sum(depth, axis=1)
        first += STEPS


@triton.jit
def _opacity(depth):
    """1 - exp(-depth), by a series where the difference would cancel (relative error below 1e-7)."""
    series = depth * (1.0 - depth * (0.5 - depth * (1.0 / 6.0 - depth * (1.0 / 24.0 - depth * (1.0 / 120.0)))))
    return tl.where(depth < 0.1, series, 1.0 - tl.exp(-depth))


@triton.jit
def _weights_gradient_kernel(
    grad, weights, densities, starts, ends, offsets, out, num_rays, max_depth,
    RAYS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Gradient of the densities: dt_i (g_i T_{i+1} - sum_{j>i} g_j w_j)."""
    ray = tl.program_id(0) * RAYS + tl.arange(0, RAYS)
    begin, count, last = _intervals(offsets, ray, num_rays)
    behind = tl.zeros((RAYS,), dtype=tl.float32)
    first = 0
    while first < last:
        keep, place = _chunk(first, begin, count, STEPS)
        product = tl.load(grad + place, mask=keep, other=0.0) * tl.load(weights + place, mask=keep, other=0.0)
        behind += tl.sum(product, axis=1)
        first += STEPS
    through = tl.zeros((RAYS,), dtype=tl.float32)
    first = 0
    while first < last:
        keep, place = _chunk(first, begin, count, STEPS)
        length, depth = _optical_depth(densities, starts, ends, place, keep, max_depth)
        cut = depth > max_depth
        depth = tl.where(cut, max_depth, depth)
        g = tl.load(grad + place, mask=keep, other=0.0)
        product = g * tl.load(weights + place, mask=keep, other=0.0)
        after = through[:, None] + tl.cumsum(depth, axis=1)
        value = length * (g * tl.exp(-after) - (behind[:, None] - tl.cumsum(product, axis=1)))
        tl.store(out + place, tl.where(cut, 0.0, value), mask=keep)
        through += tl.sum(depth, axis=1)
        behind -= tl.sum(product, axis=1)
        first += STEPS


@triton.jit
def _accumulate_kernel(
    weights, values, offsets, out, num_rays, channels,
    HAS_VALUES: tl.constexpr, RAYS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Sum of weights times values over each ray, for one channel."""
    ray, channel = tl.program_id(0) * RAYS + tl.arange(0, RAYS), tl.program_id(1)
    begin, count, last = _intervals(offsets, ray, num_rays)
    total = tl.zeros((RAYS,), dtype=tl.float32)
    first = 0
    while first < last:
        keep, place = _chunk(first, begin, count, STEPS)
        term = tl.load(weights + place, mask=keep, other=0.0)
        if HAS_VALUES:
            term *= tl.load(values + place * channels + channel, mask=keep, other=0.0)
        total += tl.sum(term, axis=1)
        first += STEPS
    tl.store(out + ray.to(tl.int64) * channels + channel, total, mask=ray < num_rays)


def march(
    origins: Tensor, directions: Tensor, t_near: Tensor, t_far: Tensor, jitter: Tensor,
    radius: float, step_size: float, occupancy: Tensor | None, max_intervals: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Ray indices, starts, ends (M,) and offsets (R + 1,).

    One launch counts the intervals and another writes them, with one synchronization in between.
    """
    num_rays = len(origins)
    offsets = torch.zeros(num_rays + 1, dtype=torch.int64, device=origins.device)
    grid = origins if occupancy is None else occupancy.view(torch.uint8)
    resolution = 1 if occupancy is None else occupancy.shape[0]
    rays = (origins, directions, t_near, t_far, jitter, grid)
    geometry = (float(resolution - 1), step_size, radius, resolution / (2 * radius))
    scalars = (num_rays, max_intervals, resolution, *geometry)
    has_occupancy = occupancy is not None
    counts = torch.empty(num_rays, dtype=torch.int64, device=origins.device)
    unused = (offsets, offsets, t_near, t_near)
    _launch(_march_kernel, num_rays, (*rays, counts, *unused, *scalars), HAS_OCCUPANCY=has_occupancy, FILL=False)
    torch.cumsum(counts, 0, out=offsets[1:])
    total = int(offsets[-1])
    ray_indices = torch.empty(total, dtype=torch.int64, device=origins.device)
    starts, ends = (torch.empty(total, device=origins.device) for _ in range(2))
    filled = (counts, offsets, ray_indices, starts, ends)
    if total:
        _launch(_march_kernel, num_rays, (*rays, *filled, *scalars), HAS_OCCUPANCY=has_occupancy, FILL=True)
    return ray_indices, starts, ends, offsets


def weights(densities: Tensor, starts: Tensor, ends: Tensor, offsets: Tensor, max_depth: float) -> Tensor:
    """Compositing weights (M,)."""
    out = torch.empty_like(densities)
    num_rays = len(offsets) - 1
    _launch(_weights_kernel, num_rays, (densities, starts, ends, offsets, out, num_rays, max_depth))
    return out


def weights_gradient(
    grad: Tensor, weights: Tensor, densities: Tensor, starts: Tensor, ends: Tensor, offsets: Tensor, max_depth: float
) -> Tensor:
    """Gradient (M,) of the densities."""
    out = torch.empty_like(densities)
    num_rays = len(offsets) - 1
    arguments = (grad, weights, densities, starts, ends, offsets, out, num_rays, max_depth)
    _launch(_weights_gradient_kernel, num_rays, arguments)
    return out


def accumulate(weights: Tensor, values: Tensor | None, offsets: Tensor) -> Tensor:
    """Sum over each ray of weights (M,) times values (M, C): (R, C)."""
    num_rays = len(offsets) - 1
    channels = 1 if values is None else values.shape[1]
    out = weights.new_empty(num_rays, channels)
    arguments = (weights, weights if values is None else values, offsets, out, num_rays, channels)
    _launch(_accumulate_kernel, num_rays, arguments, channels, HAS_VALUES=values is not None)
    return out


def _launch(kernel: Any, num_rays: int, arguments: tuple, columns: int = 1, **constants: bool) -> None:
    if num_rays == 0 or columns == 0:
        return
    with torch.cuda.device_of(arguments[0]):
        kernel[(triton.cdiv(num_rays, _RAYS), columns)](*arguments, **constants, **_OPTIONS)

"""Tile lists in Triton, with few launches: CUDA, float32 (also in Triton's interpreter, for the tests).

The lists equal those of ``tiles.assign_tiles``. One kernel finds the tiles of each Gaussian, a cumulative sum gives the
position of its first entry, one kernel writes an entry with the key (tile, depth) for each pair, one sort orders the
entries, and one kernel finds the first entry of each tile. The host synchronizes with the device once, to read the
number of entries, for which it allocates memory.
"""

# mypy: disallow-untyped-defs=False, check-untyped-defs=False

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from scoredist3d.ops.splatting.constants import MIN_ALPHA, REACH_SLACK, TILE
from scoredist3d.ops.splatting.types import Gaussians2D, ProjectedGaussians, TileLists

_BLOCK = 128  # Gaussians or entries per program
_MEASURE = {"BLOCK": _BLOCK, "TILE": TILE, "MIN_ALPHA": MIN_ALPHA, "SLACK": REACH_SLACK}
_FILL = {"BLOCK": _BLOCK}
_OPTIONS = {"num_warps": 4}
_DEPTH_BITS = tl.constexpr(32)


@triton.jit
def _tile_range(mean, half, tiles, TILE: tl.constexpr):
    """First and last (exclusive) tile of each Gaussian along one axis of the image."""
    limit = 1.0 * tiles
    low = tl.floor(tl.minimum(tl.maximum((mean - half - 0.5) / TILE, 0.0), limit)).to(tl.int32)
    high = tl.floor(tl.minimum(tl.maximum((mean + half - 0.5) / TILE, -1.0), limit)).to(tl.int32) + 1
    return low, tl.minimum(high, tiles)


@triton.jit(do_not_specialize=["total", "count", "camera_stride"])
def _measure_kernel(
    means, deviations, depths, visible, compensation, colors, opacities, alphas, features, spans, counts,
    total, count, camera_stride, channels, down, across,
    BLOCK: tl.constexpr, TILE: tl.constexpr, MIN_ALPHA: tl.constexpr, SLACK: tl.constexpr,
):  # fmt: skip
    """Opacity, features and tiles of BLOCK Gaussians; the Gaussians of all cameras are concatenated."""
    g = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask, camera = g < total, g // count
    n = g - camera * count
    alpha = tl.load(opacities + n, mask=mask, other=0.0)
    if compensation is not None:
        alpha *= tl.load(compensation + g, mask=mask, other=0.0)
    tl.store(alphas + g, alpha, mask=mask)
    source, target = colors + camera.to(tl.int64) * camera_stride + n * channels, features + g * (channels + 1)
    channel = 0
    while channel < channels:
        tl.store(target + channel, tl.load(source + channel, mask=mask, other=0.0), mask=mask)
        channel += 1
    tl.store(target + channels, tl.load(depths + g, mask=mask, other=0.0), mask=mask)
    seen = mask & (alpha >= MIN_ALPHA) & (tl.load(visible + g, mask=mask, other=0) != 0)
    reach = tl.sqrt(2.0 * tl.log(tl.where(seen, alpha / MIN_ALPHA, 1.0)) + SLACK) * 1.001
    half_x = tl.load(deviations + g * 2, mask=seen, other=0.0) * reach + 0.001
    half_y = tl.load(deviations + g * 2 + 1, mask=seen, other=0.0) * reach + 0.001
    left, right = _tile_range(tl.load(means + g * 2, mask=seen, other=0.0), half_x, across, TILE)
    top, bottom = _tile_range(tl.load(means + g * 2 + 1, mask=seen, other=0.0), half_y, down, TILE)
    wide, high = tl.maximum(right - left, 0), tl.maximum(bottom - top, 0)
    first = (camera * down + top) * across + left
    tl.store(spans + g * 2, first, mask=mask)
    tl.store(spans + g * 2 + 1, wide, mask=mask)
    # Shifted by one, so that the cumulative sum gives the first entry of each Gaussian.
    tl.store(counts + 1 + g, tl.where(seen, wide * high, 0).to(tl.int64), mask=mask)
    tl.store(counts + g, tl.zeros((BLOCK,), dtype=tl.int64), mask=g == 0)


@triton.jit(do_not_specialize=["total"])
def _fill_kernel(depths, spans, row_offsets, keys, owners, total, across, BLOCK: tl.constexpr):
    """Write the entries of BLOCK Gaussians: a positive key that sorts by tile and depth, and the Gaussian."""
    g = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = g < total
    row = tl.load(row_offsets + g, mask=mask, other=0)
    entries = (tl.load(row_offsets + g + 1, mask=mask, other=0) - row).to(tl.int32)
    first = tl.load(spans + g * 2, mask=mask, other=0)
    wide = tl.maximum(tl.load(spans + g * 2 + 1, mask=mask, other=1), 1)
    # Positive floats sort like their bit patterns read as integers.
    depth = tl.load(depths + g, mask=mask, other=0.0).to(tl.int32, bitcast=True).to(tl.int64)
    last, step = tl.max(entries, axis=0), 0
    while step < last:
        inside = step < entries
        tile = first + step // wide * across + step % wide
        tl.store(keys + row + step, (tile.to(tl.int64) << _DEPTH_BITS) | depth, mask=inside)
        tl.store(owners + row + step, g, mask=inside)
        step += 1


@triton.jit(do_not_specialize=["entries"])
def _finish_kernel(keys, rows, owners, gaussians, offsets, entries, tiles, BLOCK: tl.constexpr):
    """Gaussian of each sorted entry, and the first entry of each tile by bisection."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < entries
    owner = tl.load(owners + tl.load(rows + i, mask=mask, other=0), mask=mask, other=0)
    tl.store(gaussians + i, owner.to(tl.int64), mask=mask)
    mask = i <= tiles
    wanted = i.to(tl.int64) << _DEPTH_BITS
    low = tl.zeros((BLOCK,), dtype=tl.int32)
    high = tl.where(mask, entries, 0)
    while tl.max(high - low, axis=0) > 0:
        more = low < high
        middle = (low + high) // 2
        less = tl.load(keys + middle, mask=more, other=0) < wanted
        low = tl.where(more & less, middle + 1, low)
        high = tl.where(more & ~less, middle, high)
    tl.store(offsets + i, low.to(tl.int64), mask=mask)


@torch.no_grad()
def gaussians_and_lists(
    projected: ProjectedGaussians, colors: Tensor, opacities: Tensor, height: int, width: int
) -> tuple[Gaussians2D, TileLists]:
    """2D Gaussians to composite and their tile lists, without gradients; arguments as for ``splat.splat``."""
    batch, count = projected.depth.shape
    total, channels = batch * count, colors.shape[-1]
    down, across = -(-height // TILE), -(-width // TILE)
    tiles = batch * down * across
    depth, means, conics = (getattr(projected, name).contiguous() for name in ("depth", "means2d", "conics"))
    colors, compensation = colors.contiguous(), projected.compensation
    alphas, features = depth.new_empty(total), depth.new_empty(total, channels + 1)
    spans = torch.empty((total, 2), dtype=torch.int32, device=depth.device)
    counts = torch.empty(total + 1, dtype=torch.int64, device=depth.device)
    plane = (means, projected.stds.contiguous(), depth, projected.visible.contiguous())
    weights = (None if compensation is None else compensation.contiguous(), colors, opacities.contiguous())
    stride = count * channels if colors.ndim == 3 else 0
    sizes = (total, count, stride, channels, down, across)
    launch(
        _measure_kernel,
        (triton.cdiv(total, _BLOCK),),
        (*plane, *weights, alphas, features, spans, counts, *sizes),
        _MEASURE,
    )
    row_offsets = counts.cumsum(0) if total else torch.zeros_like(counts)
    entries = int(row_offsets[-1])
    keys = torch.empty(entries, dtype=torch.int64, device=depth.device)
    owners = torch.empty(entries, dtype=torch.int32, device=depth.device)
    arguments = (depth, spans, row_offsets, keys, owners, total, across)
    launch(_fill_kernel, (triton.cdiv(total, _BLOCK) if entries else 0,), arguments, _FILL)
    # The sort is stable: of two Gaussians at the same depth, the one with the smaller index is in front.
    keys, rows = torch.sort(keys, stable=True)
    gaussians, offsets = torch.empty_like(rows), rows.new_empty(tiles + 1)
    grid = (triton.cdiv(max(entries, tiles + 1), _BLOCK),)
    launch(_finish_kernel, grid, (keys, rows, owners, gaussians, offsets, entries, tiles), _FILL)
    gaussians2d = Gaussians2D(means.flatten(0, 1), conics.flatten(0, 1), features, alphas)
    return gaussians2d, TileLists(gaussians, rows, offsets, row_offsets, batch, height, width)


def launch(kernel: Any, grid: tuple[int, ...], arguments: tuple, constants: dict[str, Any]) -> None:
    """Run a kernel on the device of its first argument; do nothing if the grid is empty."""
    if 0 in grid:
        return
    with torch.cuda.device_of(arguments[0]):
        kernel[grid](*arguments, **constants, **_OPTIONS)

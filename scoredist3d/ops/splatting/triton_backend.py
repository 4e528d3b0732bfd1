"""Compositing of Gaussians in Triton: CUDA, float32 (also in Triton's interpreter, for the tests).

One autograd function maps projected Gaussians to images in few launches: with ten thousand Gaussians, a launch costs
more than the work of the kernel. In the forward pass one program composites a tile, Gaussian by Gaussian. The backward
pass processes several Gaussians at once and gets their transmittances from a scan, so that they share the reductions
over pixels. It writes one row per entry, then sums the rows of each Gaussian in order, and sums shared parameters over
the cameras; this needs no atomics and gives bit-identical results. Loops over a list are ``while`` loops because
Triton's interpreter does not accept a tensor as the bound of ``range`` with numpy 2.4.
"""

# mypy: disallow-untyped-defs=False, check-untyped-defs=False

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from scoredist3d.ops.splatting.constants import MAX_ALPHA, MIN_ALPHA, MIN_TRANSMITTANCE, MOMENTS, TILE
from scoredist3d.ops.splatting.tiles_triton import gaussians_and_lists, launch
from scoredist3d.ops.splatting.types import ProjectedGaussians, SplattedImages

# Gaussians of a list processed at a time, forward and backward; the fastest values on an H100.
_CHUNK, _GRADIENT_CHUNK = 4, 8
_CHANNELS = 4  # channels per program of the forward pass, so that RGB and depth take one program
_BLOCK = 128  # Gaussians per program of the row sums
_CONSTANTS = {"TILE": TILE, "MAX_ALPHA": MAX_ALPHA, "MIN_ALPHA": MIN_ALPHA}
_FORWARD = {**_CONSTANTS, "CHUNK": _CHUNK, "MIN_TRANSMITTANCE": MIN_TRANSMITTANCE, "CHANNELS": _CHANNELS}
_BACKWARD = {**_CONSTANTS, "CHUNK": _GRADIENT_CHUNK, "MOMENTS": MOMENTS}
_SUM = {"BLOCK": _BLOCK, "MOMENTS": MOMENTS}


@triton.jit
def _pixels(tile, height, width, down, across, TILE: tl.constexpr):
    """Index in (B, H, W), validity (inside the image) and center of the pixels of a tile."""
    lane = tl.arange(0, TILE * TILE)
    row = (tile // across) % down * TILE + lane // TILE
    column = tile % across * TILE + lane % TILE
    pixel = ((tile // (down * across)).to(tl.int64) * height + row) * width + column
    return pixel, (row < height) & (column < width), column.to(tl.float32) + 0.5, row.to(tl.float32) + 0.5


@triton.jit
def _gaussian(means, conics, opacities, index, mask):
    """Mean, conic and opacity of the Gaussians ``index`` (scalar or block)."""
    x = tl.load(means + index * 2, mask=mask, other=0.0)
    y = tl.load(means + index * 2 + 1, mask=mask, other=0.0)
    xx = tl.load(conics + index * 3, mask=mask, other=0.0)
    xy = tl.load(conics + index * 3 + 1, mask=mask, other=0.0)
    yy = tl.load(conics + index * 3 + 2, mask=mask, other=0.0)
    return x, y, xx, xy, yy, tl.load(opacities + index, mask=mask, other=0.0)


@triton.jit
def _alphas(dx, dy, xx, xy, yy, opacity, MAX_ALPHA: tl.constexpr, MIN_ALPHA: tl.constexpr):
    """Alpha (0 below MIN_ALPHA), and alpha before the clamp to MAX_ALPHA."""
    power = -0.5 * (xx * dx * dx + yy * dy * dy) - xy * dx * dy
    uncut = opacity * tl.exp(power)
    alpha = tl.minimum(uncut, MAX_ALPHA)
    return tl.where(alpha >= MIN_ALPHA, alpha, 0.0), uncut


@triton.jit
def _feature(features, index, channel, channels, mask):
    """One channel of a Gaussian."""
    return tl.load(features + index * channels + channel, mask=mask & (channel < channels), other=0.0)


@triton.jit
def _store_channel(color_image, depth_image, pixel, channel, channels, value, valid):
    """Store a channel of the image; the last channel goes to the depth image."""
    tl.store(color_image + pixel * (channels - 1) + channel, value, mask=valid & (channel < channels - 1))
    tl.store(depth_image + pixel, value, mask=valid & (channel == channels - 1))


@triton.jit
def _composite_kernel(
    means, conics, features, opacities, gaussians, offsets, color_image, opacity_image, depth_image, transmittance,
    last, height, width, down, across, channels,
    TILE: tl.constexpr, CHUNK: tl.constexpr, MAX_ALPHA: tl.constexpr, MIN_ALPHA: tl.constexpr,
    MIN_TRANSMITTANCE: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Composite CHANNELS channels of a tile; the program of channel 0 also stores what the backward pass needs."""
    tile, channel = tl.program_id(0), tl.program_id(1) * CHANNELS
    pixel, valid, x, y = _pixels(tile, height, width, down, across, TILE)
    first = tl.load(offsets + tile)
    count = (tl.load(offsets + tile + 1) - first).to(tl.int32)
    light = tl.full((TILE * TILE,), 1.0, dtype=tl.float32)
    live = valid
    drawn_last = tl.zeros((TILE * TILE,), dtype=tl.int32)
    c0 = tl.zeros((TILE * TILE,), dtype=tl.float32)
    c1, c2, c3 = c0, c0, c0
    start = 0
    while start < count:
        # Unrolled, so that loading the next Gaussians overlaps with compositing this one.
        for j in tl.static_range(CHUNK):
            inside = start + j < count
            index = tl.load(gaussians + first + start + j, mask=inside, other=0)
            mean_x, mean_y, xx, xy, yy, opacity = _gaussian(means, conics, opacities, index, inside)
            alpha, _ = _alphas(x - mean_x, y - mean_y, xx, xy, yy, opacity, MAX_ALPHA, MIN_ALPHA)
            after = light * (1.0 - alpha)
            seen = (alpha > 0.0) & live
            drawn = seen & (after > MIN_TRANSMITTANCE)
            live = live & ((after > MIN_TRANSMITTANCE) | (alpha <= 0.0))
            weight = tl.where(drawn, alpha * light, 0.0)
            light = tl.where(drawn, after, light)
            drawn_last = tl.where(drawn, start + j + 1, drawn_last)
            c0 += weight * _feature(features, index, channel, channels, inside)
            c1 += weight * _feature(features, index, channel + 1, channels, inside)
            c2 += weight * _feature(features, index, channel + 2, channels, inside)
            c3 += weight * _feature(features, index, channel + 3, channels, inside)
        start = tl.where(tl.max(live.to(tl.int32), axis=0) > 0, start + CHUNK, count)
    _store_channel(color_image, depth_image, pixel, channel, channels, c0, valid)
    _store_channel(color_image, depth_image, pixel, channel + 1, channels, c1, valid)
    _store_channel(color_image, depth_image, pixel, channel + 2, channels, c2, valid)
    _store_channel(color_image, depth_image, pixel, channel + 3, channels, c3, valid)
    if channel == 0:
        tl.store(opacity_image + pixel, 1.0 - light, mask=valid)
        tl.store(transmittance + pixel, light, mask=valid)
        tl.store(last + pixel, drawn_last, mask=valid)


@triton.jit
def _entry_gradient_kernel(
    means, conics, features, opacities, gaussians, rows, offsets, transmittance, last, of_color, of_opacity, of_depth,
    out, height, width, down, across, channels,
    TILE: tl.constexpr, CHUNK: tl.constexpr, MAX_ALPHA: tl.constexpr, MIN_ALPHA: tl.constexpr,
    MOMENTS: tl.constexpr,
):  # fmt: skip
    """Gradient of each entry of a tile, from the last Gaussian drawn to the first."""
    tile = tl.program_id(0)
    pixel, valid, x, y = _pixels(tile, height, width, down, across, TILE)
    first = tl.load(offsets + tile)
    light = tl.load(transmittance + pixel, mask=valid, other=1.0)  # transmittance behind the chunk
    drawn_last = tl.load(last + pixel, mask=valid, other=0)
    by_opacity = tl.load(of_opacity + pixel, mask=valid, other=0.0)
    by_depth = tl.load(of_depth + pixel, mask=valid, other=0.0)
    behind = tl.zeros((TILE * TILE,), dtype=tl.float32)  # sum of weights times values behind the chunk
    count = tl.max(drawn_last, axis=0)
    start = (count + CHUNK - 1) // CHUNK * CHUNK - CHUNK
    while start >= 0:
        position = start + tl.arange(0, CHUNK)
        mask = position < count
        index = tl.load(gaussians + first + position, mask=mask, other=0)
        mean_x, mean_y, xx, xy, yy, opacity = _gaussian(means, conics, opacities, index, mask)
        dx, dy = x[:, None] - mean_x[None, :], y[:, None] - mean_y[None, :]
        form = (xx[None, :], xy[None, :], yy[None, :])
        alpha, uncut = _alphas(dx, dy, form[0], form[1], form[2], opacity[None, :], MAX_ALPHA, MIN_ALPHA)
        alpha = tl.where(position[None, :] < drawn_last[:, None], alpha, 0.0)
        passed = tl.cumprod(1.0 - alpha, axis=1)
        light = light / tl.min(passed, axis=1)  # transmittance in front of the chunk
        before = light[:, None] * passed / (1.0 - alpha)
        weights = alpha * before
        row = out + tl.load(rows + first + position, mask=mask, other=0) * (MOMENTS + channels)
        depth = tl.load(features + index * channels + channels - 1, mask=mask, other=0.0)
        value = by_opacity[:, None] + depth[None, :] * by_depth[:, None]
        tl.store(row + MOMENTS + channels - 1, tl.sum(weights * by_depth[:, None], axis=0), mask=mask)
        channel = 0
        while channel < channels - 1:
            feature = tl.load(features + index * channels + channel, mask=mask, other=0.0)
            upstream = tl.load(of_color + pixel * (channels - 1) + channel, mask=valid, other=0.0)
            value += feature[None, :] * upstream[:, None]
            tl.store(row + MOMENTS + channel, tl.sum(weights * upstream[:, None], axis=0), mask=mask)
            channel += 1
        seen = weights * value
        hidden = behind[:, None] + tl.sum(seen, axis=1)[:, None] - tl.cumsum(seen, axis=1)
        slope = uncut * (before * value - hidden / (1.0 - alpha))
        slope = tl.where((alpha > 0.0) & (uncut <= MAX_ALPHA), slope, 0.0)
        by_x, by_y = tl.sum(slope * dx, axis=0), tl.sum(slope * dy, axis=0)
        tl.store(row, xx * by_x + xy * by_y, mask=mask)
        tl.store(row + 1, xy * by_x + yy * by_y, mask=mask)
        tl.store(row + 2, -0.5 * tl.sum(slope * dx * dx, axis=0), mask=mask)
        tl.store(row + 3, -tl.sum(slope * dx * dy, axis=0), mask=mask)
        tl.store(row + 4, -0.5 * tl.sum(slope * dy * dy, axis=0), mask=mask)
        tl.store(row + 5, tl.sum(slope, axis=0) / tl.where(mask, opacity, 1.0), mask=mask)
        behind += tl.sum(seen, axis=1)
        start -= CHUNK


@triton.jit(do_not_specialize=["count"])
def _sum_rows_kernel(
    rows, row_offsets, opacities, compensation,
    by_means, by_conics, by_depths, by_compensation, by_opacities, by_colors, count, batch, channels,
    BLOCK: tl.constexpr, MOMENTS: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    """Sum one column over the rows of BLOCK Gaussians; opacities and SHARED colors are also summed over cameras."""
    n, column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1)
    mask, width = n < count, MOMENTS + channels
    colored = (column >= MOMENTS) & (column < width - 1)
    everywhere = tl.zeros((BLOCK,), dtype=tl.float32)
    camera = 0
    while camera < batch:
        g = n.to(tl.int64) + camera * count
        row = tl.load(row_offsets + g, mask=mask, other=0)
        end = tl.load(row_offsets + g + 1, mask=mask, other=0)
        total = tl.zeros((BLOCK,), dtype=tl.float32)
        left = tl.max(end - row, axis=0)
        while left > 0:
            total += tl.load(rows + row * width + column, mask=mask & (row < end), other=0.0)
            row += 1
            left -= 1
        tl.store(by_means + g * 2 + column, total, mask=mask & (column < 2))
        tl.store(by_conics + g * 3 + column - 2, total, mask=mask & (column >= 2) & (column < 5))
        tl.store(by_depths + g, total, mask=mask & (column == width - 1))
        if compensation is not None:  # noqa: SIM102 (a compile-time condition; the other is not)
            if column == MOMENTS - 1:
                opacity = tl.load(opacities + n, mask=mask, other=0.0)
                tl.store(by_compensation + g, total * opacity, mask=mask)
                total *= tl.load(compensation + g, mask=mask, other=0.0)
        if not SHARED:
            tl.store(by_colors + g * (channels - 1) + column - MOMENTS, total, mask=mask & colored)
        everywhere += total
        camera += 1
    tl.store(by_opacities + n, everywhere, mask=mask & (column == MOMENTS - 1))
    if SHARED:
        tl.store(by_colors + n * (channels - 1) + column - MOMENTS, everywhere, mask=mask & colored)


def splat(projected: ProjectedGaussians, colors: Tensor, opacities: Tensor, height: int, width: int) -> SplattedImages:
    """Composite projected Gaussians; arguments as for ``splat.splat``."""
    inputs = (projected.means2d, projected.conics, projected.depth, projected.compensation, colors, opacities)
    return SplattedImages(*_Splat.apply(*inputs, projected, height, width))


class _Splat(torch.autograd.Function):
    """Color, opacity and depth images as a function of means2d, conics, depth, compensation, colors and opacities."""

    @staticmethod
    def forward(
        ctx: Any,
        means2d: Tensor,
        conics: Tensor,
        depths: Tensor,
        compensation: Tensor | None,
        colors: Tensor,
        opacities: Tensor,
        projected: ProjectedGaussians,
        height: int,
        width: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        gaussians, lists = gaussians_and_lists(projected, colors, opacities, height, width)
        size, channels = (lists.batch, height, width), gaussians.features.shape[1]
        color = means2d.new_empty(*size, channels - 1)
        opacity, depth, transmittance = (means2d.new_empty(*size, 1) for _ in range(3))
        last = torch.empty(size, dtype=torch.int32, device=color.device)
        grid = (lists.batch * lists.grid[0] * lists.grid[1], triton.cdiv(channels, _CHANNELS))
        outputs = (color, opacity, depth, transmittance, last)
        sizes = (height, width, *lists.grid, channels)
        launch(
            _composite_kernel, grid, (*gaussians.tensors, lists.gaussians, lists.offsets, *outputs, *sizes), _FORWARD
        )
        ctx.save_for_backward(*gaussians.tensors, transmittance, last, compensation, opacities)
        ctx.lists, ctx.colors_shape = lists, colors.shape
        return color, opacity, depth

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_color: Tensor, of_opacity: Tensor, of_depth: Tensor) -> tuple[Tensor | None, ...]:
        means, conics, features, alphas, transmittance, last, compensation, opacities = ctx.saved_tensors
        lists = ctx.lists
        channels, count = features.shape[1], opacities.shape[0]
        entries = means.new_zeros(len(lists), MOMENTS + channels)  # entries behind the last Gaussian drawn stay 0
        saved = (lists.gaussians, lists.rows, lists.offsets, transmittance, last)
        upstream = (of_color.contiguous(), of_opacity.contiguous(), of_depth.contiguous())
        sizes = (lists.height, lists.width, *lists.grid, channels)
        arguments = (means, conics, features, alphas, *saved, *upstream, entries, *sizes)
        launch(_entry_gradient_kernel, (lists.batch * lists.grid[0] * lists.grid[1],), arguments, _BACKWARD)
        by_depths = means.new_empty(lists.batch, count)
        by_compensation = None if compensation is None else torch.empty_like(by_depths)
        by_means, by_conics = by_depths.new_empty(*by_depths.shape, 2), by_depths.new_empty(*by_depths.shape, 3)
        by_opacities, by_colors = means.new_empty(count), means.new_empty(ctx.colors_shape)
        found = (by_means, by_conics, by_depths, by_compensation, by_opacities, by_colors)
        factors = (opacities.contiguous(), None if compensation is None else compensation.contiguous())
        arguments = (entries, lists.row_offsets, *factors, *found, count, lists.batch, channels)
        grid = (triton.cdiv(count, _BLOCK), MOMENTS + channels)
        launch(_sum_rows_kernel, grid, arguments, {**_SUM, "SHARED": by_colors.ndim == 2})
        return by_means, by_conics, by_depths, by_compensation, by_colors, by_opacities, None, None, None

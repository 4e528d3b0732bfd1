"""Splatting kernels in Triton: CUDA, float32 (also in Triton's interpreter, for the tests).

One program composites a tile, Gaussian by Gaussian. The gradient takes several Gaussians at once, the transmittance by
a scan along them, so that sums over the pixels are shared; it writes a row per entry and then sums a Gaussian's rows in
their order: no atomics, the same bits every time. Loops over a list are ``while`` loops because Triton's interpreter
cannot take a tensor as the bound of ``range`` with numpy 2.4.
"""

# mypy: disallow-untyped-defs=False, check-untyped-defs=False

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from scoredist3d.ops.splatting_tiles import (
    MAX_ALPHA,
    MIN_ALPHA,
    MIN_TRANSMITTANCE,
    MOMENTS,
    TILE,
    Scene,
    TileLists,
    by_input,
)

# Gaussians of the list handled at a time, forward and backward. From trials on an H100.
_CHUNK, _GRADIENT_CHUNK = 4, 8
_CHANNELS = 4  # channels a program of the forward pass blends: colours and a depth take one
_BLOCK = 128  # Gaussians whose rows a program sums
_CONSTANTS = {"TILE": TILE, "MAX_ALPHA": MAX_ALPHA, "MIN_ALPHA": MIN_ALPHA}
_FORWARD = {**_CONSTANTS, "CHUNK": _CHUNK, "MIN_TRANSMITTANCE": MIN_TRANSMITTANCE, "CHANNELS": _CHANNELS}
_BACKWARD = {**_CONSTANTS, "CHUNK": _GRADIENT_CHUNK, "MOMENTS": MOMENTS}
_OPTIONS = {"num_warps": 4}


@triton.jit
def _pixels(tile, height, width, down, across, TILE: tl.constexpr):
    """Index in (B, H, W), validity and centre of a tile's pixels."""
    lane = tl.arange(0, TILE * TILE)
    row = (tile // across) % down * TILE + lane // TILE
    column = tile % across * TILE + lane % TILE
    pixel = ((tile // (down * across)).to(tl.int64) * height + row) * width + column
    return pixel, (row < height) & (column < width), column.to(tl.float32) + 0.5, row.to(tl.float32) + 0.5


@triton.jit
def _gaussian(means, conics, opacities, index, mask):
    """Mean, conic and opacity of one Gaussian, or of several."""
    x = tl.load(means + index * 2, mask=mask, other=0.0)
    y = tl.load(means + index * 2 + 1, mask=mask, other=0.0)
    xx = tl.load(conics + index * 3, mask=mask, other=0.0)
    xy = tl.load(conics + index * 3 + 1, mask=mask, other=0.0)
    yy = tl.load(conics + index * 3 + 2, mask=mask, other=0.0)
    return x, y, xx, xy, yy, tl.load(opacities + index, mask=mask, other=0.0)


@triton.jit
def _alphas(dx, dy, xx, xy, yy, opacity, MAX_ALPHA: tl.constexpr, MIN_ALPHA: tl.constexpr):
    """Alpha, 0 where not seen, and alpha before it is cut."""
    power = -0.5 * (xx * dx * dx + yy * dy * dy) - xy * dx * dy
    uncut = opacity * tl.exp(power)
    alpha = tl.minimum(uncut, MAX_ALPHA)
    return tl.where(alpha >= MIN_ALPHA, alpha, 0.0), uncut


@triton.jit
def _feature(features, index, channel, channels, mask):
    """One channel of a Gaussian."""
    return tl.load(features + index * channels + channel, mask=mask & (channel < channels), other=0.0)


@triton.jit
def _composite_kernel(
    means, conics, features, opacities, gaussians, offsets, image, transmittance, last,
    height, width, down, across, channels,
    TILE: tl.constexpr, CHUNK: tl.constexpr, MAX_ALPHA: tl.constexpr, MIN_ALPHA: tl.constexpr,
    MIN_TRANSMITTANCE: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """A tile of the image, for CHANNELS channels; the first such program also writes what the gradient needs."""
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
        # Unrolled, so that the loads of the next Gaussians overlap with the work on this one.
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
    target = image + pixel * channels + channel
    tl.store(target, c0, mask=valid & (channel < channels))
    tl.store(target + 1, c1, mask=valid & (channel + 1 < channels))
    tl.store(target + 2, c2, mask=valid & (channel + 2 < channels))
    tl.store(target + 3, c3, mask=valid & (channel + 3 < channels))
    if channel == 0:
        tl.store(transmittance + pixel, light, mask=valid)
        tl.store(last + pixel, drawn_last, mask=valid)


@triton.jit
def _entry_gradient_kernel(
    means, conics, features, opacities, gaussians, rows, offsets, transmittance, last, of_image, of_opacity, out,
    height, width, down, across, channels,
    TILE: tl.constexpr, CHUNK: tl.constexpr, MAX_ALPHA: tl.constexpr, MIN_ALPHA: tl.constexpr,
    MOMENTS: tl.constexpr,
):  # fmt: skip
    """The gradient of each entry of a tile's list, from the last drawn to the first."""
    tile = tl.program_id(0)
    pixel, valid, x, y = _pixels(tile, height, width, down, across, TILE)
    first = tl.load(offsets + tile)
    light = tl.load(transmittance + pixel, mask=valid, other=1.0)  # what is left behind the chunk
    drawn_last = tl.load(last + pixel, mask=valid, other=0)
    by_opacity = tl.load(of_opacity + pixel, mask=valid, other=0.0)
    behind = tl.zeros((TILE * TILE,), dtype=tl.float32)  # sum of weight times value behind the chunk
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
        light = light / tl.min(passed, axis=1)  # in front of the chunk
        before = light[:, None] * passed / (1.0 - alpha)
        weights = alpha * before
        row = out + tl.load(rows + first + position, mask=mask, other=0) * (MOMENTS + channels)
        value = tl.zeros((TILE * TILE, CHUNK), dtype=tl.float32) + by_opacity[:, None]
        channel = 0
        while channel < channels:
            feature = tl.load(features + index * channels + channel, mask=mask, other=0.0)
            upstream = tl.load(of_image + pixel * channels + channel, mask=valid, other=0.0)
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


@triton.jit
def _sum_rows_kernel(rows, order, row_offsets, out, count, width, BLOCK: tl.constexpr):
    """One column of the sums of BLOCK Gaussians' rows."""
    j, column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1)
    mask = j < count
    row = tl.load(row_offsets + j, mask=mask, other=0)
    end = tl.load(row_offsets + j + 1, mask=mask, other=0)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    left = tl.max(end - row, axis=0)
    while left > 0:
        total += tl.load(rows + row * width + column, mask=mask & (row < end), other=0.0)
        row += 1
        left -= 1
    index = tl.load(order + j, mask=mask, other=0)
    tl.store(out + index * width + column, total, mask=mask)


def composite(scene: Scene, lists: TileLists) -> tuple[Tensor, Tensor, Tensor]:
    """Image (B, H, W, K), transmittance left (B, H, W) and what the gradient asks for (B, H, W) int32."""
    size, channels = (lists.batch, lists.height, lists.width), scene.features.shape[1]
    image = scene.means.new_empty(*size, channels)
    transmittance = scene.means.new_empty(size)
    last = torch.empty(size, dtype=torch.int32, device=image.device)
    down, across = lists.grid
    grid = (lists.batch * down * across, triton.cdiv(channels, _CHANNELS))
    arguments = (*_tensors(scene), lists.gaussians, lists.offsets, image, transmittance, last)
    sizes = (lists.height, lists.width, down, across, channels)
    _launch(_composite_kernel, grid, (*arguments, *sizes), _FORWARD)
    return image, transmittance, last


def composite_gradient(
    scene: Scene, lists: TileLists, transmittance: Tensor, last: Tensor, of_image: Tensor, of_opacity: Tensor
) -> Scene:
    """Gradients of the scene of ``sum(of_image * image) + sum(of_opacity * (1 - transmittance))``."""
    count, channels = scene.features.shape
    width = MOMENTS + channels
    entries = scene.means.new_zeros(len(lists), width)  # those behind the last Gaussian drawn stay zero
    down, across = lists.grid
    saved = (lists.gaussians, lists.rows, lists.offsets, transmittance, last, of_image, of_opacity)
    sizes = (lists.height, lists.width, down, across, channels)
    grid = (lists.batch * down * across,)
    _launch(_entry_gradient_kernel, grid, (*_tensors(scene), *saved, entries, *sizes), _BACKWARD)
    out = scene.means.new_empty(count, width)
    arguments = (entries, lists.order, lists.row_offsets, out, count, width)
    _launch(_sum_rows_kernel, (triton.cdiv(count, _BLOCK), width), arguments, {"BLOCK": _BLOCK})
    return by_input(out)


def _tensors(scene: Scene) -> tuple[Tensor, ...]:
    return scene.means, scene.conics, scene.features, scene.opacities


def _launch(kernel: Any, grid: tuple[int, ...], arguments: tuple, constants: dict[str, Any]) -> None:
    if 0 in grid:
        return
    with torch.cuda.device_of(arguments[0]):
        kernel[grid](*arguments, **constants, **_OPTIONS)

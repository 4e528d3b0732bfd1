"""Group normalization with an optional SiLU for channels-last images, as Triton kernels with a gradient.

PyTorch's own kernel converts channels-last images to the other layout and back, and saves the input of the SiLU as well
as that of the normalization. Here each pass reads a tensor once, and only the input of the normalization is saved.
"""

# mypy: disallow-untyped-defs=False, check-untyped-defs=False

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 4096  # elements per program


@triton.jit
def _silu_gradient(u):
    sigmoid = 1.0 / (1.0 + tl.exp(-u))
    return sigmoid * (1.0 + u * (1.0 - sigmoid))


@triton.jit
def _tile(pixels, channels, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Elements of the program's tile of ROWS pixels, as offsets and mask, and of its item's row of a table (N, C)."""
    item, tile = tl.program_id(0), tl.program_id(1)
    pixel = tile * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    inside = (pixel[:, None] < pixels) & (column[None, :] < channels)
    offset = item.to(tl.int64) * pixels * channels + pixel[:, None] * channels + column[None, :]
    return offset, inside, item * channels + column, column < channels


@triton.jit
def _store_sums(sums, first, second, channels, COLUMNS: tl.constexpr):
    """Write two sums per channel, each (ROWS, COLUMNS) values of the program's tile, to ``sums`` (N, tiles, 2, C)."""
    column = tl.arange(0, COLUMNS)
    target = sums + (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)) * 2 * channels + column
    tl.store(target, tl.sum(first, 0), mask=column < channels)
    tl.store(target + channels, tl.sum(second, 0), mask=column < channels)


@triton.jit
def _sums_kernel(x, sums, pixels, channels, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Sums of x and of its square over a tile of pixels."""
    offset, inside, _, _ = _tile(pixels, channels, ROWS, COLUMNS)
    value = tl.load(x + offset, mask=inside, other=0.0).to(tl.float32)
    _store_sums(sums, value, value * value, channels, COLUMNS)


@triton.jit
def _apply_kernel(
    x, scale, bias, out, pixels, channels, ACTIVATE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """x * scale + bias, with SiLU if ACTIVATE; ``scale`` and ``bias`` are (N, C)."""
    offset, inside, row, used = _tile(pixels, channels, ROWS, COLUMNS)
    a = tl.load(scale + row, mask=used, other=0.0)
    b = tl.load(bias + row, mask=used, other=0.0)
    u = tl.load(x + offset, mask=inside, other=0.0).to(tl.float32) * a[None, :] + b[None, :]
    if ACTIVATE:
        u = u / (1.0 + tl.exp(-u))
    tl.store(out + offset, u.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _gradient_sums_kernel(
    x, grad, scale, bias, sums, pixels, channels, ACTIVATE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Sums of g and of g * x over a tile of pixels, where g is the gradient of the normalization's output."""
    offset, inside, row, used = _tile(pixels, channels, ROWS, COLUMNS)
    value = tl.load(x + offset, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(grad + offset, mask=inside, other=0.0).to(tl.float32)
    if ACTIVATE:
        a = tl.load(scale + row, mask=used, other=0.0)
        b = tl.load(bias + row, mask=used, other=0.0)
        g = g * _silu_gradient(value * a[None, :] + b[None, :])
    _store_sums(sums, g, g * value, channels, COLUMNS)


@triton.jit
def _gradient_kernel(
    x, grad, scale, bias, slope, constant, out, pixels, channels,
    ACTIVATE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """g * scale + x * slope + constant; the four factors are (N, C)."""
    offset, inside, row, used = _tile(pixels, channels, ROWS, COLUMNS)
    value = tl.load(x + offset, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(grad + offset, mask=inside, other=0.0).to(tl.float32)
    a = tl.load(scale + row, mask=used, other=0.0)
    if ACTIVATE:
        b = tl.load(bias + row, mask=used, other=0.0)
        g = g * _silu_gradient(value * a[None, :] + b[None, :])
    p = tl.load(slope + row, mask=used, other=0.0)
    q = tl.load(constant + row, mask=used, other=0.0)
    result = g * a[None, :] + value * p[None, :] + q[None, :]
    tl.store(out + offset, result.to(out.dtype.element_ty), mask=inside)


def _tiles(x: Tensor) -> tuple[tuple[int, int], dict[str, int]]:
    """Grid and constants of the kernels for a tensor (N, C, H, W)."""
    count, channels, height, width = x.shape
    columns = triton.next_power_of_2(channels)
    rows = max(1, _TILE // columns)
    return (count, triton.cdiv(height * width, rows)), {"ROWS": rows, "COLUMNS": columns}


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _group_mean(x: Tensor, groups: int) -> Tensor:
    """Means over the channels of each group, (N, C), repeated for the channels of the group."""
    mean = x.view(len(x), groups, -1).mean(-1, keepdim=True)
    return mean.expand(-1, -1, x.shape[1] // groups).reshape(x.shape)


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, activate: bool) -> Tensor:
        x = _channels_last(x)
        grid, tiles = _tiles(x)
        channels = x.shape[1]
        pixels = x.shape[2] * x.shape[3]
        sums = torch.empty(*grid, 2, channels, device=x.device)
        _sums_kernel[grid](x, sums, pixels, channels, **tiles)
        mean, square = (_group_mean(total, groups) for total in (sums.sum(1) / pixels).unbind(1))
        rstd = (square - mean * mean).clamp_min(0).add(eps).rsqrt()
        scale = rstd * weight.float()
        shift = bias.float() - mean * scale
        out = torch.empty_like(x)
        _apply_kernel[grid](x, scale, shift, out, pixels, channels, ACTIVATE=activate, **tiles)
        ctx.save_for_backward(x, weight, mean, rstd, scale, shift)
        ctx.groups, ctx.activate = groups, activate
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, rstd, scale, shift = ctx.saved_tensors
        grad = _channels_last(grad)
        grid, tiles = _tiles(x)
        channels = x.shape[1]
        pixels = x.shape[2] * x.shape[3]
        sums = torch.empty(*grid, 2, channels, device=x.device)
        options = {"ACTIVATE": ctx.activate, **tiles}
        _gradient_sums_kernel[grid](x, grad, scale, shift, sums, pixels, channels, **options)
        total, by_x = sums.sum(1).unbind(1)
        by_normalized = rstd * (by_x - mean * total)  # sum of g times the normalized input
        weights = weight.float()
        first = _group_mean(weights * total, ctx.groups) / pixels
        second = _group_mean(weights * by_normalized, ctx.groups) / pixels
        slope = -rstd * rstd * second
        constant = -rstd * first - slope * mean
        out = torch.empty_like(x)
        _gradient_kernel[grid](x, grad, scale, shift, slope, constant, out, pixels, channels, **options)
        return out, by_normalized.sum(0).to(weight.dtype), total.sum(0).to(weight.dtype), None, None, None


def group_norm(x: Tensor, weight: Tensor, bias: Tensor, *, groups: int, eps: float, activate: bool) -> Tensor:
    """Group normalization over (N, C, H, W), followed by SiLU if ``activate``; the result is channels-last.

    Statistics are computed in fp32. The result has the dtype of ``x``.
    """
    output: Tensor = _GroupNorm.apply(x, weight, bias, groups, eps, activate)  # type: ignore[no-untyped-call]
    return output

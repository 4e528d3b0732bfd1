"""Texture sampling in Triton: CUDA, float32 (also in Triton's interpreter, for the tests); see ``texture``."""

# mypy: disallow-untyped-defs=False, check-untyped-defs=False

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from scoredist3d.ops.rasterization.common_triton import OPTIONS, channels_per_program

_POINTS = 128


@triton.jit
def _wrap(index, size, REPEAT: tl.constexpr):
    """Row or column of a texel, wrapped or clamped to the texture."""
    if REPEAT:
        index = index % size
        index = tl.where(index < 0, index + size, index)
    else:
        index = tl.minimum(tl.maximum(index, 0), size - 1)
    return index


@triton.jit
def _texels(uv, point, mask, points_per_texture, height, width, LINEAR: tl.constexpr, REPEAT: tl.constexpr):
    """Texels around each point (upper left, upper right, lower left, lower right), and its position between them."""
    x = tl.load(uv + point * 2, mask=mask, other=0.0) * width
    y = (1.0 - tl.load(uv + point * 2 + 1, mask=mask, other=0.0)) * height
    if LINEAR:
        x -= 0.5
        y -= 0.5
    left, top = tl.floor(x), tl.floor(y)
    column, row, base = left.to(tl.int64), top.to(tl.int64), point // points_per_texture * height
    upper, lower = (base + _wrap(row, height, REPEAT)) * width, (base + _wrap(row + 1, height, REPEAT)) * width
    column, right = _wrap(column, width, REPEAT), _wrap(column + 1, width, REPEAT)
    return upper + column, upper + right, lower + column, lower + right, x - left, y - top


@triton.jit(do_not_specialize=["num_points", "points_per_texture"])
def _sample_kernel(
    texture, uv, out, num_points, points_per_texture, num_channels, height, width,
    LINEAR: tl.constexpr, REPEAT: tl.constexpr, CHANNELS: tl.constexpr, POINTS: tl.constexpr,
):  # fmt: skip
    """Sample textures at POINTS points."""
    point = tl.program_id(0).to(tl.int64) * POINTS + tl.arange(0, POINTS)
    inside = point < num_points
    i, j, k, m, across, down = _texels(uv, point, inside, points_per_texture, height, width, LINEAR, REPEAT)
    across, down = across[:, None], down[:, None]
    first = 0
    while first < num_channels:
        channel = (first + tl.arange(0, CHANNELS))[None, :]
        mask = inside[:, None] & (channel < num_channels)
        value = tl.load(texture + i[:, None] * num_channels + channel, mask=mask, other=0.0)
        if LINEAR:
            value *= (1.0 - down) * (1.0 - across)
            b = tl.load(texture + j[:, None] * num_channels + channel, mask=mask, other=0.0)
            c = tl.load(texture + k[:, None] * num_channels + channel, mask=mask, other=0.0)
            d = tl.load(texture + m[:, None] * num_channels + channel, mask=mask, other=0.0)
            value = (value + (1.0 - down) * across * b) + (down * (1.0 - across) * c + down * across * d)
        tl.store(out + point[:, None] * num_channels + channel, value, mask=mask)
        first += CHANNELS


@triton.jit(do_not_specialize=["num_points", "points_per_texture"])
def _sample_gradient_kernel(
    texture, uv, upstream, by_texture, by_uv, num_points, points_per_texture, num_channels, height, width,
    WITH_TEXTURE: tl.constexpr, WITH_UV: tl.constexpr, LINEAR: tl.constexpr, REPEAT: tl.constexpr,
    CHANNELS: tl.constexpr, POINTS: tl.constexpr,
):  # fmt: skip
    """Gradients of POINTS points: added to ``by_texture``, stored in ``by_uv``."""
    point = tl.program_id(0).to(tl.int64) * POINTS + tl.arange(0, POINTS)
    inside = point < num_points
    i, j, k, m, across, down = _texels(uv, point, inside, points_per_texture, height, width, LINEAR, REPEAT)
    across, down = across[:, None], down[:, None]
    by_x = tl.zeros((POINTS,), dtype=tl.float32)
    by_y = tl.zeros((POINTS,), dtype=tl.float32)
    first = 0
    while first < num_channels:
        channel = (first + tl.arange(0, CHANNELS))[None, :]
        mask = inside[:, None] & (channel < num_channels)
        given = tl.load(upstream + point[:, None] * num_channels + channel, mask=mask, other=0.0)
        at_i, at_j = i[:, None] * num_channels + channel, j[:, None] * num_channels + channel
        at_k, at_m = k[:, None] * num_channels + channel, m[:, None] * num_channels + channel
        if WITH_TEXTURE:
            if LINEAR:
                upper, lower = (1.0 - down) * given, down * given
                tl.atomic_add(by_texture + at_i, upper * (1.0 - across), mask=mask, sem="relaxed")
                tl.atomic_add(by_texture + at_j, upper * across, mask=mask, sem="relaxed")
                tl.atomic_add(by_texture + at_k, lower * (1.0 - across), mask=mask, sem="relaxed")
                tl.atomic_add(by_texture + at_m, lower * across, mask=mask, sem="relaxed")
            else:
                tl.atomic_add(by_texture + at_i, given, mask=mask, sem="relaxed")
        if WITH_UV:
            a = tl.load(texture + at_i, mask=mask, other=0.0)
            b = tl.load(texture + at_j, mask=mask, other=0.0)
            c = tl.load(texture + at_k, mask=mask, other=0.0)
            d = tl.load(texture + at_m, mask=mask, other=0.0)
            by_x += tl.sum(given * ((1.0 - down) * (b - a) + down * (d - c)), axis=1)
            by_y += tl.sum(given * ((1.0 - across) * (c - a) + across * (d - b)), axis=1)
        first += CHANNELS
    if WITH_UV:
        tl.store(by_uv + point * 2, by_x * width, mask=inside)
        tl.store(by_uv + point * 2 + 1, -by_y * height, mask=inside)


def sample(texture: Tensor, uv: Tensor, points_per_texture: int, linear: bool, repeat: bool) -> Tensor:
    """Samples (N, C) of textures (..., Ht, Wt, C) at ``uv`` (N, 2), ``points_per_texture`` consecutive points each."""
    values: Tensor = _Sample.apply(texture, uv if linear else uv.detach(), points_per_texture, linear, repeat)
    return values


class _Sample(torch.autograd.Function):
    """Samples as a function of texture and coordinates, see ``texture.sample_texture``."""

    @staticmethod
    def forward(ctx: Any, texture: Tensor, uv: Tensor, points_per_texture: int, linear: bool, repeat: bool) -> Tensor:
        texture, uv = texture.contiguous(), uv.contiguous()
        height, width, channels = texture.shape[-3:]
        ctx.save_for_backward(texture, uv)
        ctx.sizes = (len(uv), points_per_texture, channels, height, width)
        ctx.constants = {
            "LINEAR": linear,
            "REPEAT": repeat,
            "CHANNELS": channels_per_program(channels),
            "POINTS": _POINTS,
        }
        out = texture.new_empty(len(uv), channels)
        if len(uv):
            with torch.cuda.device_of(texture):
                _sample_kernel[_grid(uv)](texture, uv, out, *ctx.sizes, **ctx.constants, **OPTIONS)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        texture, uv = ctx.saved_tensors
        upstream = upstream.contiguous()
        with_texture, with_uv = ctx.needs_input_grad[:2]
        by_texture = torch.zeros_like(texture) if with_texture else None
        by_uv = torch.empty_like(uv) if with_uv else None
        targets = (texture if by_texture is None else by_texture, uv if by_uv is None else by_uv)
        if len(uv):
            with torch.cuda.device_of(texture):
                _sample_gradient_kernel[_grid(uv)](
                    texture, uv, upstream, *targets, *ctx.sizes, WITH_TEXTURE=with_texture, WITH_UV=with_uv,
                    **ctx.constants, **OPTIONS,
                )  # fmt: skip
        return by_texture, by_uv, None, None, None


def _grid(uv: Tensor) -> tuple[int]:
    return (triton.cdiv(len(uv), _POINTS),)

"""Deferred back-propagation: images whose samples would not fit into memory (ARF, arXiv 2206.06360, section 4.2)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from scoredist3d.renderers.volume_sampling import Rays

Maps = dict[str, Tensor]
"""(R, C) values of R rays, by name."""


def in_chunks(compute: Callable[[Rays], Maps], rays: Rays, size: int) -> Maps:
    """``compute`` of all rays, ``size`` of them at a time."""
    parts = [compute(rays[first : first + size]) for first in range(0, len(rays), size)]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def deferred(compute: Callable[[Rays], Maps], rays: Rays, size: int, parameters: Sequence[nn.Parameter]) -> Maps:
    """:func:`in_chunks` with gradients, of which only one chunk's graph is alive at any time.

    The forward pass keeps the maps alone. The backward pass computes each chunk again, with a graph, and adds its
    gradients: twice the work, a bounded memory, the same numbers.

    Args:
        compute: A function of the rays and of ``parameters`` that gives the same values whenever it is called.
        rays: R rays.
        size: Rays of a chunk.
        parameters: Everything that is to get a gradient.
    """
    names: list[str] = []

    def values(part: Rays) -> Maps:
        maps = compute(part)
        names[:] = maps
        return maps

    results = _Deferred.apply(values, rays, size, *parameters)
    return dict(zip(names, results, strict=True))


class _Deferred(torch.autograd.Function):
    """Maps of rays as a function of parameters."""

    @staticmethod
    def forward(
        ctx: Any, compute: Callable[[Rays], Maps], rays: Rays, size: int, *parameters: nn.Parameter
    ) -> tuple[Tensor, ...]:
        ctx.compute, ctx.rays, ctx.size, ctx.parameters = compute, rays, size, parameters
        device = rays.origins.device.type
        ctx.precision = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
        return tuple(in_chunks(compute, rays, size).values())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        totals: list[Tensor | None] = [None] * len(ctx.parameters)
        for first in range(0, len(ctx.rays), ctx.size):
            part = slice(first, first + ctx.size)
            for index, gradient in enumerate(_gradients(ctx, part, gradients)):
                if gradient is not None:
                    total = totals[index]
                    totals[index] = gradient if total is None else total + gradient
        return None, None, None, *totals


def _gradients(ctx: Any, part: slice, gradients: Sequence[Tensor]) -> Sequence[Tensor | None]:
    """Of one chunk, by each parameter."""
    device, dtype, enabled = ctx.precision  # of the forward pass; the backward pass runs outside of autocast
    with torch.enable_grad(), torch.autocast(device, dtype, enabled):
        maps = ctx.compute(ctx.rays[part]).values()
    pairs = [(value, grad[part]) for value, grad in zip(maps, gradients, strict=True) if value.requires_grad]
    if not pairs:
        return []
    outputs, seeds = zip(*pairs, strict=True)
    return torch.autograd.grad(outputs, ctx.parameters, seeds, allow_unused=True)

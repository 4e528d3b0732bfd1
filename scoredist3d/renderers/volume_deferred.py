"""Deferred backpropagation, for images whose samples do not fit in memory (ARF, arXiv 2206.06360, section 4.2)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from scoredist3d.renderers.volume_sampling import RayBatch

Maps = dict[str, Tensor]
"""(R, C) maps of R rays, by name."""


def in_chunks(compute: Callable[[RayBatch], Maps], rays: RayBatch, size: int) -> Maps:
    """``compute`` applied to all rays in chunks of ``size``."""
    parts = [compute(rays[first : first + size]) for first in range(0, len(rays), size)]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def deferred(
    compute: Callable[[RayBatch], Maps], rays: RayBatch, size: int, parameters: Sequence[nn.Parameter]
) -> Maps:
    """:func:`in_chunks` with gradients; only the graph of one chunk is in memory at a time.

    The forward pass stores only the maps. The backward pass computes each chunk again with a graph and accumulates the
    gradients. The results equal those of a single pass, at twice the cost.

    Args:
        compute: A deterministic function of the rays and ``parameters``.
        rays: R rays.
        size: Rays per chunk.
        parameters: All parameters that receive gradients.
    """
    names: list[str] = []

    def values(part: RayBatch) -> Maps:
        maps = compute(part)
        names[:] = maps
        return maps

    results = _Deferred.apply(values, rays, size, *parameters)
    return dict(zip(names, results, strict=True))


class _Deferred(torch.autograd.Function):
    """Autograd function that computes the maps of rays from the parameters."""

    @staticmethod
    def forward(
        ctx: Any, compute: Callable[[RayBatch], Maps], rays: RayBatch, size: int, *parameters: nn.Parameter
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
    """Gradients of one chunk with respect to each parameter; empty if no map depends on them."""
    device, dtype, enabled = (
        ctx.precision
    )  # autocast state of the forward pass; the backward pass runs without autocast
    with torch.enable_grad(), torch.autocast(device, dtype, enabled):
        maps = ctx.compute(ctx.rays[part]).values()
    pairs = [(value, grad[part]) for value, grad in zip(maps, gradients, strict=True) if value.requires_grad]
    if not pairs:
        return []
    outputs, seeds = zip(*pairs, strict=True)
    return torch.autograd.grad(outputs, ctx.parameters, seeds, allow_unused=True)

"""Multiresolution hash encoding (Müller et al. 2022, https://arxiv.org/abs/2201.05989, section 3).

Level ``l`` is a grid with ``scale_l = base_resolution * per_level_scale^l - 1`` cells along each axis of the unit cube.
A point x has the grid position ``x * scale_l + 0.5``; its features are the trilinear interpolation of the table entries
of the eight surrounding grid vertices. A level whose vertices fit into ``2^log2_hashmap_size`` entries is indexed
densely, a finer one by the spatial hash ``(x * 1) xor (y * 2654435761) xor (z * 805459861)``. Layout, offsets and the
shift by half a cell are those of tiny-cuda-nn, whose parameters can be used after a reshape.

Each backend provides three kernels (encode, gradient of the table, gradient of the points), which also compute their
derivative along a direction. The autograd functions in this module combine them into first and second derivatives.
"""

from __future__ import annotations

import importlib
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from scoredist3d.ops import backends
from scoredist3d.ops.hash_grid.spec import HashGridSpec

BACKENDS = ("torch", "native", "triton", "tinycudann")


def hash_grid_encode(
    points: Tensor, table: Tensor, spec: HashGridSpec, *, backend: str = "auto", num_active_levels: int | None = None
) -> Tensor:
    """Encode points with a multiresolution hash grid.

    Twice differentiable in points and table (``tinycudann``: as far as that package supports it). Points outside the
    unit cube are clamped to it and get zero gradient.

    Args:
        points: (N, 3), in [0, 1].
        table: (spec.num_entries, F), features of the grid vertices.
        spec: Parameters of the grid.
        backend: auto, torch, native (CPU), triton or tinycudann (CUDA).
        num_active_levels: Number of coarse levels that are evaluated; finer levels give zeros and no gradient. None
            means all.

    Returns:
        (N, L * F), level by level, in the dtype of the table.

    Raises:
        ValueError: A shape, dtype or number of levels is invalid, or the backend is not usable.
    """
    if points.ndim != 2 or points.shape[1] != 3:
        raise ValueError(f"hash grid: points must be (N, 3), got {tuple(points.shape)}")
    if tuple(table.shape) != (spec.num_entries, spec.features_per_level):
        expected = (spec.num_entries, spec.features_per_level)
        raise ValueError(f"hash grid: the table must be {expected}, got {tuple(table.shape)}")
    if points.dtype != table.dtype or points.device != table.device:
        raise ValueError(
            f"hash grid: points ({points.dtype}, {points.device}) and table ({table.dtype}, {table.device}) must "
            "have the same dtype and device"
        )
    levels = spec.num_levels if num_active_levels is None else num_active_levels
    if not 0 <= levels <= spec.num_levels:
        raise ValueError(f"hash grid: num_active_levels must be from 0 to {spec.num_levels}, got {levels}")
    name = backends.choose("hash grid", backend, points.device, BACKENDS, table.dtype)
    if name == "tinycudann":
        return _encode_tinycudann(points, table, spec, levels)
    return _Encode.apply(points, table, spec, levels, _kernels(name))


@cache
def _kernels(name: str) -> ModuleType:
    """Backend module with the functions ``encode``, ``table_gradient`` and ``point_gradient``."""
    return importlib.import_module(f"scoredist3d.ops.hash_grid.{name}_backend")


class _Encode(torch.autograd.Function):
    """Autograd function of ``encode(points, table)``, for any backend."""

    @staticmethod
    def forward(
        ctx: Any, points: Tensor, table: Tensor, spec: HashGridSpec, levels: int, kernels: ModuleType
    ) -> Tensor:
        points, table = points.contiguous(), table.contiguous()
        ctx.save_for_backward(points, table)
        # Backends for which finding the corners is expensive can store them for the backward pass.
        offer = getattr(kernels, "corner_store", None)
        keep = offer(points, levels) if offer is not None and ctx.needs_input_grad[1] else None
        ctx.settings = (spec, levels, kernels, keep)
        return kernels.encode(points, table, spec, levels, **({} if keep is None else {"keep": keep}))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        points, table = ctx.saved_tensors
        needs = (ctx.needs_input_grad[0], ctx.needs_input_grad[1])
        grad_points, grad_table = _EncodeBackward.apply(grad, points, table, needs, *ctx.settings)
        return grad_points, grad_table, None, None, None


class _EncodeBackward(torch.autograd.Function):
    """Gradients of points and table as a differentiable function of the upstream gradient, points and table."""

    @staticmethod
    def forward(
        ctx: Any,
        grad: Tensor,
        points: Tensor,
        table: Tensor,
        needs: tuple[bool, bool],
        spec: HashGridSpec,
        levels: int,
        kernels: ModuleType,
        kept: Any,
    ) -> tuple[Tensor | None, Tensor | None]:
        grad = grad.contiguous()
        ctx.save_for_backward(grad, points, table)
        ctx.settings = (spec, levels)
        ctx.kernels = kernels
        ctx.set_materialize_grads(False)
        grad_points = kernels.point_gradient(points, table, grad, spec, levels) if needs[0] else None
        reused = {"kept": kept} if kept else {}
        grad_table = kernels.table_gradient(points, grad, spec, levels, **reused) if needs[1] else None
        return grad_points, grad_table

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_points: Tensor | None, of_table: Tensor | None) -> tuple[Tensor | None, ...]:
        grad, points, table = ctx.saved_tensors
        kernels = ctx.kernels
        wants_grad, wants_points, wants_table = ctx.needs_input_grad[:3]
        for_grad: list[Tensor] = []
        for_points: list[Tensor] = []
        for_table: list[Tensor] = []
        if of_points is not None:
            direction = of_points.contiguous()
            if wants_grad:
                for_grad.append(kernels.encode(points, table, *ctx.settings, direction))
            if wants_points:
                for_points.append(kernels.point_gradient(points, table, grad, *ctx.settings, direction))
            if wants_table:
                for_table.append(kernels.table_gradient(points, grad, *ctx.settings, direction))
        if of_table is not None:
            of_table = of_table.contiguous()
            if wants_grad:
                for_grad.append(kernels.encode(points, of_table, *ctx.settings))
            if wants_points:
                for_points.append(kernels.point_gradient(points, of_table, grad, *ctx.settings))
        total = [sum(terms[1:], terms[0]) if terms else None for terms in (for_grad, for_points, for_table)]
        return total[0], total[1], total[2], None, None, None, None, None


@cache
def _tinycudann_module(spec: HashGridSpec, device: torch.device) -> torch.nn.Module:
    """tiny-cuda-nn encoding for ``spec`` on the current device; its parameters are replaced at each call."""
    import tinycudann

    config = {
        "otype": "HashGrid",
        "n_levels": spec.num_levels,
        "n_features_per_level": spec.features_per_level,
        "log2_hashmap_size": spec.log2_hashmap_size,
        "base_resolution": spec.base_resolution,
        "per_level_scale": spec.per_level_scale,
    }
    module = tinycudann.Encoding(3, config, dtype=torch.float32)
    expected = spec.num_entries * spec.features_per_level
    if module.params.numel() != expected:
        raise ValueError(
            f"hash grid: tinycudann allocates {module.params.numel()} parameters for this grid, but {expected} are "
            "expected; the installed version is not compatible, use another backend"
        )
    return module


def _encode_tinycudann(points: Tensor, table: Tensor, spec: HashGridSpec, levels: int) -> Tensor:
    with torch.cuda.device_of(points):
        module = _tinycudann_module(spec, points.device)
        features = torch.func.functional_call(module, {"params": table.reshape(-1)}, (points.clamp(0, 1),))
    active = features[:, : levels * spec.features_per_level].to(table.dtype)
    return torch.nn.functional.pad(active, (0, spec.output_dim - active.shape[1]))

"""Multiresolution hash encoding (Müller et al. 2022, https://arxiv.org/abs/2201.05989, section 3).

Level ``l`` is a grid with ``scale_l = base_resolution * per_level_scale^l - 1`` cells along each axis of the unit cube.
A point x lies at ``x * scale_l + 0.5`` in it; its features are the trilinear blend of the eight corners' table entries.
A level whose corners all fit in ``2^log2_hashmap_size`` entries is indexed densely, a finer one by the spatial hash
``(x * 1) xor (y * 2654435761) xor (z * 805459861)``. Layout, offsets and the half-cell shift are those of tiny-cuda-nn,
so that its parameters are ours, reshaped.

Each backend provides the same three kernels (encode, gradient to the table, gradient to the points), each also along a
direction; the autograd functions here are built from them once, first and second order, for all backends.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from functools import cache, cached_property
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from scoredist3d.ops import backends

BACKENDS = ("torch", "native", "triton", "tinycudann")


@dataclass(frozen=True)
class HashGridSpec:
    """Shape of a multiresolution hash grid.

    Attributes:
        num_levels: L, number of resolutions.
        features_per_level: F, features per table entry: 1, 2, 4 or 8.
        log2_hashmap_size: A level has at most 2 to this power entries.
        base_resolution: Resolution of the coarsest level.
        per_level_scale: Growth of the resolution from level to level, at least 1.
    """

    num_levels: int = 8
    features_per_level: int = 2
    log2_hashmap_size: int = 14
    base_resolution: int = 8
    per_level_scale: float = 1.5

    def __post_init__(self) -> None:
        if self.features_per_level not in (1, 2, 4, 8):
            raise ValueError(f"hash grid: features_per_level must be 1, 2, 4 or 8, got {self.features_per_level}")
        for name, low, high in (("num_levels", 1, 32), ("log2_hashmap_size", 3, 24)):
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"hash grid: {name} must be from {low} to {high}, got {getattr(self, name)}")
        if self.base_resolution < 2:
            raise ValueError(f"hash grid: base_resolution must be 2 or more, got {self.base_resolution}")
        if not self.per_level_scale >= 1:
            raise ValueError(f"hash grid: per_level_scale must be 1 or more, got {self.per_level_scale}")
        if self.resolutions[-1] > 2**20:
            raise ValueError(f"hash grid: the finest resolution, {self.resolutions[-1]}, exceeds {2**20}")

    @cached_property
    def scales(self) -> tuple[float, ...]:
        """Cells along an axis of the unit cube, per level; float32 as in tiny-cuda-nn, so that the rounding agrees."""
        growth = np.log2(np.float32(self.per_level_scale))
        powers = np.exp2(np.arange(self.num_levels, dtype=np.float32) * growth)
        return tuple(float(s) for s in powers * np.float32(self.base_resolution) - np.float32(1))

    @cached_property
    def resolutions(self) -> tuple[int, ...]:
        """Corners along an axis, per level."""
        return tuple(int(np.ceil(scale)) + 1 for scale in self.scales)

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Table entries per level (dense levels are padded to a multiple of eight)."""
        return tuple(min((r**3 + 7) // 8 * 8, 2**self.log2_hashmap_size) for r in self.resolutions)

    @cached_property
    def hashed(self) -> tuple[bool, ...]:
        """Whether a level is hashed (True) or densely indexed."""
        return tuple(r**3 > size for r, size in zip(self.resolutions, self.sizes, strict=True))

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """First table entry of each level, and the total: L + 1 numbers."""
        return (0, *(int(end) for end in np.cumsum(self.sizes)))

    @property
    def num_entries(self) -> int:
        """Rows of the table."""
        return self.offsets[-1]

    @property
    def output_dim(self) -> int:
        """L * F."""
        return self.num_levels * self.features_per_level


def hash_grid_encode(
    points: Tensor, table: Tensor, spec: HashGridSpec, *, backend: str = "auto", num_active_levels: int | None = None
) -> Tensor:
    """Encode points by the hash grid ``table``.

    Differentiable twice with respect to points and table (``tinycudann``: as far as that package goes). Points outside
    the cube are moved to its surface and get no gradient.

    Args:
        points: (N, 3), in [0, 1].
        table: (spec.num_entries, F).
        backend: auto, torch, native (CPU), triton or tinycudann (CUDA).
        num_active_levels: Finer levels than this many give zeros and no gradient; None means all.

    Returns:
        (N, L * F), level by level, in the table's dtype.

    Raises:
        ValueError: On a wrong shape, dtype or number of levels, or a backend that cannot be used.
    """
    if points.ndim != 2 or points.shape[1] != 3:
        raise ValueError(f"hash grid: points must be (N, 3), got {tuple(points.shape)}")
    if tuple(table.shape) != (spec.num_entries, spec.features_per_level):
        expected = (spec.num_entries, spec.features_per_level)
        raise ValueError(f"hash grid: the table must be {expected}, got {tuple(table.shape)}")
    if points.dtype != table.dtype or points.device != table.device:
        raise ValueError(
            f"hash grid: points ({points.dtype}, {points.device}) and table ({table.dtype}, {table.device}) must agree"
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
    """The module with ``encode``, ``table_gradient`` and ``point_gradient`` of a backend."""
    return importlib.import_module(f"scoredist3d.ops.hash_grid.{name}_backend")


class _Encode(torch.autograd.Function):
    """y = encode(x, table)."""

    @staticmethod
    def forward(
        ctx: Any, points: Tensor, table: Tensor, spec: HashGridSpec, levels: int, kernels: ModuleType
    ) -> Tensor:
        points, table = points.contiguous(), table.contiguous()
        ctx.save_for_backward(points, table)
        # Kernels that find the corners at some cost offer a store that gives them back to the backward pass.
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
    """(grad_points, grad_table) as a function of (grad, points, table), itself differentiable once."""

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
    """A tiny-cuda-nn encoding of ``spec`` on the current device; its own parameters are replaced at each call."""
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
        raise ValueError(f"hash grid: tinycudann lays out {module.params.numel()} parameters where we have {expected}")
    return module


def _encode_tinycudann(points: Tensor, table: Tensor, spec: HashGridSpec, levels: int) -> Tensor:
    with torch.cuda.device_of(points):
        module = _tinycudann_module(spec, points.device)
        features = torch.func.functional_call(module, {"params": table.reshape(-1)}, (points.clamp(0, 1),))
    active = features[:, : levels * spec.features_per_level].to(table.dtype)
    return torch.nn.functional.pad(active, (0, spec.output_dim - active.shape[1]))

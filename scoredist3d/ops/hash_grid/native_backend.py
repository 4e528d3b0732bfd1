"""Hash grid kernels in C (``native/hash_grid.c``): CPU, float32, bit-identical for any number of threads."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from scoredist3d.ops import native
from scoredist3d.ops.hash_grid.spec import HashGridSpec


def encode(points: Tensor, table: Tensor, spec: HashGridSpec, levels: int, direction: Tensor | None = None) -> Tensor:
    """Features (N, L * F), or their derivative along ``direction`` (N, 3)."""
    out = table.new_empty(points.shape[0], spec.output_dim)
    native.call("sd3d_hash_encode", *_grid(spec), *_sizes(spec, levels), points, direction, table, out, len(points))
    return out


def table_gradient(
    points: Tensor, grad: Tensor, spec: HashGridSpec, levels: int, direction: Tensor | None = None
) -> Tensor:
    """Gradient (num_entries, F) of ``sum(grad * encode(points, table, direction))``."""
    out = grad.new_zeros(spec.num_entries, spec.features_per_level)
    sizes = _sizes(spec, levels)
    native.call("sd3d_hash_table_gradient", *_grid(spec), *sizes, points, direction, grad, out, len(points))
    return out


def point_gradient(
    points: Tensor, table: Tensor, grad: Tensor, spec: HashGridSpec, levels: int, direction: Tensor | None = None
) -> Tensor:
    """Gradient (N, 3) of ``sum(grad * encode(points, table, direction))``."""
    out = torch.empty_like(points)
    sizes = _sizes(spec, levels)
    native.call("sd3d_hash_point_gradient", *_grid(spec), *sizes, points, direction, table, grad, out, len(points))
    return out


def _sizes(spec: HashGridSpec, levels: int) -> tuple[int, int, int]:
    return spec.num_levels, levels, spec.features_per_level


@lru_cache(maxsize=64)
def _grid(spec: HashGridSpec) -> tuple[Tensor, ...]:
    scales = torch.tensor(spec.scales, dtype=torch.float32)
    integers = (spec.resolutions, spec.sizes, spec.offsets, spec.hashed)
    return (scales, *(torch.tensor([int(value) for value in values]) for values in integers))

"""Hash grid kernels in plain torch: any device, any floating dtype. The arithmetic every other backend reproduces."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from scoredist3d.ops.hash_grid import HashGridSpec

_CORNERS = [(c & 1, c >> 1 & 1, c >> 2 & 1) for c in range(8)]


def encode(points: Tensor, table: Tensor, spec: HashGridSpec, levels: int, direction: Tensor | None = None) -> Tensor:
    """Features (N, L * F), or their derivative along ``direction`` (N, 3)."""
    out = table.new_zeros(points.shape[0], spec.num_levels, spec.features_per_level)
    for level in range(levels):
        indices, fraction = _locate(points, spec, level)
        weights = _weights(fraction, _steps(points, spec, level, direction))
        entries = table[spec.offsets[level] : spec.offsets[level + 1]]
        out[:, level] = functional.embedding_bag(indices, entries, mode="sum", per_sample_weights=weights)
    return out.flatten(1)


def table_gradient(
    points: Tensor, grad: Tensor, spec: HashGridSpec, levels: int, direction: Tensor | None = None
) -> Tensor:
    """Gradient (num_entries, F) of ``sum(grad * encode(points, table, direction))``."""
    num_features = spec.features_per_level
    out = grad.new_zeros(num_features, spec.num_entries)
    for level in range(levels):
        indices, fraction = _locate(points, spec, level)
        weights = _weights(fraction, _steps(points, spec, level, direction))
        indices = indices.flatten() + spec.offsets[level]
        for feature in range(num_features):
            column = grad[:, level * num_features + feature, None]
            out[feature].scatter_add_(0, indices, (weights * column).flatten())
    return out.t().contiguous()


def point_gradient(
    points: Tensor, table: Tensor, grad: Tensor, spec: HashGridSpec, levels: int, direction: Tensor | None = None
) -> Tensor:
    """Gradient (N, 3) of ``sum(grad * encode(points, table, direction))``."""
    out = torch.zeros_like(points)
    for level in range(levels):
        indices, fraction = _locate(points, spec, level)
        entries = table[spec.offsets[level] : spec.offsets[level + 1]]
        upstream = grad[:, level * spec.features_per_level : (level + 1) * spec.features_per_level]
        products = torch.einsum("ncf,nf->nc", entries[indices], upstream)  # (N, 8)
        out += _slope(products, fraction, _steps(points, spec, level, direction)) * spec.scales[level]
    return out * _inside(points)


def _inside(points: Tensor) -> Tensor:
    return ((points >= 0) & (points <= 1)).to(points.dtype)


def _steps(points: Tensor, spec: HashGridSpec, level: int, direction: Tensor | None) -> Tensor | None:
    """The direction in cells of the level (points on which the cube's surface acts do not move)."""
    return None if direction is None else direction * _inside(points) * spec.scales[level]


def _locate(points: Tensor, spec: HashGridSpec, level: int) -> tuple[Tensor, Tensor]:
    """Entries of the eight corners within the level (N, 8) and the position in the cell (N, 3)."""
    position = points.clamp(0, 1) * spec.scales[level] + 0.5
    low = position.floor()
    fraction = position - low
    x, y, z = ((c, c + 1) for c in low.long().unbind(1))
    if spec.hashed[level]:
        y = (y[0] * 2654435761 & 0xFFFFFFFF, y[1] * 2654435761 & 0xFFFFFFFF)
        z = (z[0] * 805459861 & 0xFFFFFFFF, z[1] * 805459861 & 0xFFFFFFFF)
        corners = [x[i] ^ y[j] ^ z[k] for i, j, k in _CORNERS]
    else:
        resolution = spec.resolutions[level]
        corners = [x[i] + (y[j] + z[k] * resolution) * resolution for i, j, k in _CORNERS]
    return torch.stack(corners, dim=1) % spec.sizes[level], fraction


def _weights(fraction: Tensor, along: Tensor | None) -> Tensor:
    """Trilinear weights (N, 8), or their derivative along ``along`` (N, 3; in cells)."""
    x, y, z = ((1 - fraction[:, d], fraction[:, d]) for d in range(3))
    if along is None:
        return torch.stack([x[i] * y[j] * z[k] for i, j, k in _CORNERS], dim=1)
    vx, vy, vz = along.unbind(1)
    rows = [
        (2 * i - 1) * y[j] * z[k] * vx + (2 * j - 1) * x[i] * z[k] * vy + (2 * k - 1) * x[i] * y[j] * vz
        for i, j, k in _CORNERS
    ]
    return torch.stack(rows, dim=1)


def _slope(values: Tensor, fraction: Tensor, along: Tensor | None) -> Tensor:
    """Derivative (N, 3) by the position in the cell of the blend of corner ``values`` (N, 8).

    With ``along`` that of the blend's derivative along it: a trilinear blend has only mixed second derivatives.
    """
    v = values.unbind(1)
    (x0, y0, z0), (x1, y1, z1) = (1 - fraction).unbind(1), fraction.unbind(1)
    if along is None:
        by_x = ((v[1] - v[0]) * y0 + (v[3] - v[2]) * y1) * z0 + ((v[5] - v[4]) * y0 + (v[7] - v[6]) * y1) * z1
        by_y = ((v[2] - v[0]) * x0 + (v[3] - v[1]) * x1) * z0 + ((v[6] - v[4]) * x0 + (v[7] - v[5]) * x1) * z1
        by_z = ((v[4] - v[0]) * x0 + (v[5] - v[1]) * x1) * y0 + ((v[6] - v[2]) * x0 + (v[7] - v[3]) * x1) * y1
        return torch.stack((by_x, by_y, by_z), dim=1)
    xy = (v[3] - v[2] - v[1] + v[0]) * z0 + (v[7] - v[6] - v[5] + v[4]) * z1
    xz = (v[5] - v[4] - v[1] + v[0]) * y0 + (v[7] - v[6] - v[3] + v[2]) * y1
    yz = (v[6] - v[4] - v[2] + v[0]) * x0 + (v[7] - v[5] - v[3] + v[1]) * x1
    vx, vy, vz = along.unbind(1)
    return torch.stack((vy * xy + vz * xz, vx * xy + vz * yz, vx * xz + vy * yz), dim=1)

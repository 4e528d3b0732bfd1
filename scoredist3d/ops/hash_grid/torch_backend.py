"""Hash grid kernels in plain torch, the reference for the other backends: any device and floating-point dtype."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from scoredist3d.ops.hash_grid.spec import HashGridSpec

_STORE_BYTES = 2**28
# Table entries (N, 8) of the cell corners in one level, and their weights (N, 8).
Located = tuple[Tensor, Tensor]
_CORNERS = [(c & 1, c >> 1 & 1, c >> 2 & 1) for c in range(8)]
_PRIME_Y, _PRIME_Z = 2654435761 - 2**32, 805459861  # as 32-bit integers


def corner_store(points: Tensor, levels: int) -> list[Located] | None:
    """List in which :func:`encode` stores corners for :func:`table_gradient`; None on GPUs or if too large."""
    needed = 64 * points.shape[0] * levels  # bytes: eight 32-bit entries and weights per point and level
    return [] if points.device.type == "cpu" and needed <= _STORE_BYTES else None


def encode(
    points: Tensor,
    table: Tensor,
    spec: HashGridSpec,
    levels: int,
    direction: Tensor | None = None,
    *,
    keep: list[Located] | None = None,
) -> Tensor:
    """Features (N, L * F), or their derivative along ``direction`` (N, 3); appends corners and weights to ``keep``."""
    out = table.new_zeros(points.shape[0], spec.num_levels, spec.features_per_level)
    for level in range(levels):
        indices, fraction = _locate(points, spec, level)
        weights = _weights(fraction, _steps(points, spec, level, direction))
        if keep is not None:
            keep.append((indices, weights))
        entries = table[spec.offsets[level] : spec.offsets[level + 1]]
        out[:, level] = functional.embedding_bag(indices, entries, mode="sum", per_sample_weights=weights)
    return out.flatten(1)


def table_gradient(
    points: Tensor,
    grad: Tensor,
    spec: HashGridSpec,
    levels: int,
    direction: Tensor | None = None,
    *,
    kept: list[Located] | None = None,
) -> Tensor:
    """Table gradient (num_entries, F) of ``sum(grad * encode(...))``; ``kept`` holds corners from ``encode``."""
    num_features = spec.features_per_level
    out = grad.new_zeros(num_features, spec.num_entries)
    for level in range(levels):
        if kept:
            indices, weights = kept[level]
        else:
            indices, fraction = _locate(points, spec, level)
            weights = _weights(fraction, _steps(points, spec, level, direction))
        indices = indices.flatten().long()
        for feature in range(num_features):
            column = grad[:, level * num_features + feature, None]
            part = out[feature, spec.offsets[level] : spec.offsets[level + 1]]
            part.scatter_add_(0, indices, (weights * column).flatten())
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
    """Direction in units of cells of the level; 0 along axes on which a point was clamped to the cube."""
    return None if direction is None else direction * _inside(points) * spec.scales[level]


def _locate(points: Tensor, spec: HashGridSpec, level: int) -> tuple[Tensor, Tensor]:
    """Entries (N, 8) int32 of the eight corners within the level, and the position in the cell (N, 3)."""
    position = points.clamp(0, 1) * spec.scales[level] + 0.5
    low = position.floor()
    fraction = position - low
    # 32 bits suffice although products overflow: the mask keeps only low bits, which overflow does not change.
    x, y, z = ((c, c + 1) for c in low.int().t().contiguous().unbind(0))
    size = spec.sizes[level]
    if spec.hashed[level]:
        mask = size - 1
        x = (x[0] & mask, x[1] & mask)
        yz = [[(y[j] * _PRIME_Y ^ z[k] * _PRIME_Z) & mask for k in (0, 1)] for j in (0, 1)]
        return torch.stack([x[i] ^ yz[j][k] for i, j, k in _CORNERS], dim=1), fraction
    resolution = spec.resolutions[level]
    yz = [[(y[j] + z[k] * resolution) * resolution for k in (0, 1)] for j in (0, 1)]
    return torch.stack([x[i] + yz[j][k] for i, j, k in _CORNERS], dim=1) % size, fraction


def _weights(fraction: Tensor, along: Tensor | None) -> Tensor:
    """Trilinear weights (N, 8), or their derivative along the direction ``along`` (N, 3), in cells."""
    x, y, z = ((1 - f, f) for f in fraction.t().contiguous().unbind(0))
    if along is None:
        xy = [[x[i] * y[j] for j in (0, 1)] for i in (0, 1)]
        return torch.stack([xy[i][j] * z[k] for i, j, k in _CORNERS], dim=1)
    vx, vy, vz = along.unbind(1)
    rows = [
        (2 * i - 1) * y[j] * z[k] * vx + (2 * j - 1) * x[i] * z[k] * vy + (2 * k - 1) * x[i] * y[j] * vz
        for i, j, k in _CORNERS
    ]
    return torch.stack(rows, dim=1)


def _slope(values: Tensor, fraction: Tensor, along: Tensor | None) -> Tensor:
    """Gradient (N, 3) of the trilinear interpolation of ``values`` (N, 8) with respect to the position in the cell.

    With ``along``, the gradient of its derivative along that direction, in which only mixed second derivatives occur.
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

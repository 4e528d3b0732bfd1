"""Gaussian splatting in plain torch, the reference for the other backends.

It supports any device and floating-point dtype and is twice differentiable.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from scoredist3d.ops.splatting.constants import FRUSTUM_MARGIN, MAX_ALPHA, MIN_ALPHA, MIN_TRANSMITTANCE, REACH, TILE
from scoredist3d.ops.splatting.types import Gaussians2D, ProjectedGaussians, ProjectionSettings, TileLists


def project(
    means: Tensor, scales: Tensor, quaternions: Tensor, w2c: Tensor, focal: Tensor, settings: ProjectionSettings
) -> ProjectedGaussians:
    """Project Gaussians to the image planes; arguments as for ``splat.project``."""
    rotation, translation = w2c[:, :3, :3], w2c[:, :3, 3:]
    local = rotation @ means.t() + translation  # (B, 3, N)
    batch, count = len(w2c), len(means)
    axes = (rotation @ _axes(scales, quaternions).view(3, 3 * count)).view(batch, 3, 3, count)
    depth = -local[:, 2]
    front = depth > settings.near
    z = torch.where(front, depth, 1.0)
    slope = local[:, :2] / z[:, None]
    f = focal[:, None, None]
    size = slope.new_tensor([settings.width, settings.height])[:, None]
    limit = FRUSTUM_MARGIN * 0.5 * size / f
    jacobian = torch.minimum(torch.maximum(slope, -limit), limit)
    # Rows of J W A, where A holds the scaled axes of a Gaussian: the axes in the image, where y points down (-along).
    along = f[..., None] / z[:, None, None] * (axes[:, :2] + jacobian[:, :, None] * axes[:, 2:])
    conics, variance, compensation = _conics(along[:, 0], -along[:, 1], settings)
    center = f * slope * slope.new_tensor([1.0, -1.0])[:, None] + 0.5 * size
    means2d = center.transpose(1, 2)
    with torch.no_grad():
        radius = REACH * _largest_eigenvalue(variance).sqrt()
        reach = REACH * variance[..., :2].sqrt()
        inside = ((means2d + reach > 0) & (means2d - reach < size[:, 0])).all(dim=-1)
        visible = front & inside & conics.isfinite().all(dim=-1)
        radius = torch.where(visible, radius, 0.0)
    return ProjectedGaussians(means2d, conics, depth, radius, reach / REACH, visible, compensation)


def _axes(scales: Tensor, quaternions: Tensor) -> Tensor:
    """(3, 3, N), principal axes in world space (coordinate, axis), each as long as its standard deviation."""
    w, x, y, z = functional.normalize(quaternions, dim=1).unbind(1)
    rows = (
        (1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)),
        (2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)),
        (2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)),
    )
    return torch.stack([entry for row in rows for entry in row]).view(3, 3, len(scales)) * scales.t()


def _conics(p: Tensor, q: Tensor, settings: ProjectionSettings) -> tuple[Tensor, Tensor, Tensor | None]:
    """Conics (B, N, 3), variances (xx, yy, xy) and compensation, from the rows p, q (B, 3, N) of J W A.

    The determinant of the dilated covariance is ``|p x q|^2 + d (|p|^2 + |q|^2) + d^2``. All terms are positive; the
    product of the variances minus the squared covariance would cancel catastrophically for long, thin Gaussians.
    """
    dilation = settings.dilation
    xx, yy, xy = (p * p).sum(1), (q * q).sum(1), (p * q).sum(1)
    area = torch.linalg.vector_norm(torch.linalg.cross(p, q, dim=1), dim=1)
    det = area * area + dilation * (xx + yy) + dilation * dilation
    xx, yy = xx + dilation, yy + dilation
    conics = torch.stack([yy, -xy, xx], dim=-1) / det[..., None]
    compensation = area * det.rsqrt() if settings.antialiased else None
    return conics, torch.stack([xx, yy, xy], dim=-1).detach(), compensation


def _largest_eigenvalue(variance: Tensor) -> Tensor:
    """Larger eigenvalue of [[xx, xy], [xy, yy]], given (xx, yy, xy)."""
    xx, yy, xy = variance.unbind(-1)
    return 0.5 * (xx + yy) + torch.hypot(0.5 * (xx - yy), xy)


def composite(gaussians: Gaussians2D, lists: TileLists) -> tuple[Tensor, Tensor]:
    """Image (B, H, W, K) and opacity (B, H, W), computed tile by tile."""
    down, across = lists.grid
    channels = gaussians.features.shape[1]
    edges = lists.offsets.tolist()
    tiles = []
    for tile in range(lists.batch * down * across):
        index = lists.gaussians[edges[tile] : edges[tile + 1]]
        tiles.append(_composite_tile(gaussians, index, tile // across % down, tile % across))
    stacked = torch.stack(tiles).view(lists.batch, down, across, TILE, TILE, channels + 1)
    whole = stacked.transpose(2, 3).reshape(lists.batch, down * TILE, across * TILE, channels + 1)
    image = whole[:, : lists.height, : lists.width]
    return image[..., :-1], image[..., -1]


def _composite_tile(gaussians: Gaussians2D, index: Tensor, row: int, column: int) -> Tensor:
    """(TILE * TILE, K + 1): composited features and opacity of one tile, from the Gaussians ``index`` (n,)."""
    features = gaussians.features[index]
    alpha = _alphas(gaussians, index, row, column)
    after = torch.cumprod(1 - alpha, dim=1)
    drawn = alpha * (after > MIN_TRANSMITTANCE)
    before = torch.cat([torch.ones_like(after[:, :1]), after[:, :-1]], dim=1)
    weights = drawn * before
    return torch.cat([weights @ features, weights.sum(dim=1, keepdim=True)], dim=1)


def _alphas(gaussians: Gaussians2D, index: Tensor, row: int, column: int) -> Tensor:
    """(TILE * TILE, n), alpha of each Gaussian at each pixel; 0 below MIN_ALPHA."""
    steps = torch.arange(TILE, device=index.device, dtype=gaussians.means.dtype) + 0.5
    mean, conic = gaussians.means[index], gaussians.conics[index]
    dx = (column * TILE + steps)[None, :, None] - mean[:, 0]
    dy = (row * TILE + steps)[:, None, None] - mean[:, 1]
    power = -0.5 * (conic[:, 0] * dx * dx + conic[:, 2] * dy * dy) - conic[:, 1] * dx * dy
    alpha = (gaussians.opacities[index] * power.exp()).clamp(max=MAX_ALPHA)
    return torch.where(alpha >= MIN_ALPHA, alpha, 0.0).view(TILE * TILE, -1)

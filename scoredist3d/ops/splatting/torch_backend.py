"""Splatting in plain torch: the reference. Any device and floating-point type; twice differentiable."""

from __future__ import annotations

import torch
from torch import Tensor

from scoredist3d.ops.splatting.tiles import MAX_ALPHA, MIN_ALPHA, MIN_TRANSMITTANCE, TILE, Scene, TileLists


def composite(scene: Scene, lists: TileLists) -> tuple[Tensor, Tensor]:
    """Image (B, H, W, K) and opacity (B, H, W), tile by tile."""
    down, across = lists.grid
    channels = scene.features.shape[1]
    edges = lists.offsets.tolist()
    tiles = []
    for tile in range(lists.batch * down * across):
        index = lists.gaussians[edges[tile] : edges[tile + 1]]
        tiles.append(_composite_tile(scene, index, tile // across % down, tile % across))
    stacked = torch.stack(tiles).view(lists.batch, down, across, TILE, TILE, channels + 1)
    whole = stacked.transpose(2, 3).reshape(lists.batch, down * TILE, across * TILE, channels + 1)
    image = whole[:, : lists.height, : lists.width]
    return image[..., :-1], image[..., -1]


def _composite_tile(scene: Scene, index: Tensor, row: int, column: int) -> Tensor:
    """(TILE * TILE, K + 1): the blended features and the opacity of a tile whose Gaussians are ``index``."""
    features = scene.features[index]
    alpha = _alphas(scene, index, row, column)
    after = torch.cumprod(1 - alpha, dim=1)
    drawn = alpha * (after > MIN_TRANSMITTANCE)
    before = torch.cat([torch.ones_like(after[:, :1]), after[:, :-1]], dim=1)
    weights = drawn * before
    return torch.cat([weights @ features, weights.sum(dim=1, keepdim=True)], dim=1)


def _alphas(scene: Scene, index: Tensor, row: int, column: int) -> Tensor:
    """(TILE * TILE, n), zero where not seen."""
    steps = torch.arange(TILE, device=index.device, dtype=scene.means.dtype) + 0.5
    mean, conic = scene.means[index], scene.conics[index]
    dx = (column * TILE + steps)[None, :, None] - mean[:, 0]
    dy = (row * TILE + steps)[:, None, None] - mean[:, 1]
    power = -0.5 * (conic[:, 0] * dx * dx + conic[:, 2] * dy * dy) - conic[:, 1] * dx * dy
    alpha = (scene.opacities[index] * power.exp()).clamp(max=MAX_ALPHA)
    return torch.where(alpha >= MIN_ALPHA, alpha, 0.0).view(TILE * TILE, -1)

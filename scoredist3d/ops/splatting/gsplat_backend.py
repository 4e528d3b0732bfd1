"""Splatting by gsplat 1.5's CUDA kernels over our tile lists."""

from __future__ import annotations

import torch
from gsplat import rasterize_to_pixels
from torch import Tensor

from scoredist3d.ops.splatting.tiles import TILE, Scene, TileLists
from scoredist3d.ops.splatting.torch_backend import composite as composite_nothing


def composite(scene: Scene, lists: TileLists) -> tuple[Tensor, Tensor]:
    """Image (B, H, W, K) and opacity (B, H, W)."""
    if len(lists) == 0:
        return composite_nothing(scene, lists)
    batch, count = lists.batch, scene.means.shape[0] // lists.batch
    tensors = (scene.means, scene.conics, scene.features)
    with torch.cuda.device_of(scene.means):
        image, opacity = rasterize_to_pixels(
            *(tensor.reshape(batch, count, -1) for tensor in tensors),
            scene.opacities.reshape(batch, count),
            lists.width,
            lists.height,
            TILE,
            lists.offsets[:-1].to(torch.int32).view(batch, *lists.grid),
            lists.gaussians.to(torch.int32),
        )
    return image, opacity[..., 0]

"""Gaussian compositing by the CUDA kernels of gsplat 1.5, applied to the tile lists of this package."""

from __future__ import annotations

import torch
from gsplat import rasterize_to_pixels
from torch import Tensor

from scoredist3d.ops.splatting.constants import TILE
from scoredist3d.ops.splatting.torch_backend import composite as composite_in_torch
from scoredist3d.ops.splatting.types import Gaussians2D, TileLists


def composite(gaussians: Gaussians2D, lists: TileLists) -> tuple[Tensor, Tensor]:
    """Image (B, H, W, K) and opacity (B, H, W)."""
    if len(lists) == 0:
        return composite_in_torch(gaussians, lists)
    batch, count = lists.batch, gaussians.means.shape[0] // lists.batch
    tensors = (gaussians.means, gaussians.conics, gaussians.features)
    with torch.cuda.device_of(gaussians.means):
        image, opacity = rasterize_to_pixels(
            *(tensor.reshape(batch, count, -1) for tensor in tensors),
            gaussians.opacities.reshape(batch, count),
            lists.width,
            lists.height,
            TILE,
            lists.offsets[:-1].to(torch.int32).view(batch, *lists.grid),
            lists.gaussians.to(torch.int32),
        )
    return image, opacity[..., 0]

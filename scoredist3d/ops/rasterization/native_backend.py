"""Visible triangles and silhouettes in C (``native/raster.c``): CPU, float32, independent of the number of threads."""

from __future__ import annotations

import torch
from torch import Tensor

from scoredist3d.ops import native


def visible_triangles(clip: Tensor, faces: Tensor, height: int, width: int) -> Tensor:
    """Index + 1 of the visible triangle at each pixel, 0 if there is none; (B, H, W) int32, as in ``torch_backend``."""
    batch, vertices = clip.shape[:2]
    keys = torch.empty(batch, height, width, dtype=torch.int64)
    out = torch.empty(batch, height, width, dtype=torch.int32)
    sizes = (batch, vertices, faces.shape[0], height, width)
    native.call("sd3d_raster_visible", clip.contiguous(), faces.contiguous(), keys, out, *sizes)
    return out


def silhouettes(clip: Tensor, faces: Tensor, across: Tensor, triangle: Tensor, depth: Tensor) -> Tensor:
    """Encoded silhouette edges between adjacent pixels, (B, 2, H, W) int64, as in ``torch_backend.silhouettes``."""
    batch, height, width = triangle.shape
    out = torch.empty(batch, 2, height, width, dtype=torch.int64)
    tensors = [tensor.contiguous() for tensor in (clip, faces, across, triangle, depth)]
    native.call("sd3d_raster_silhouettes", *tensors, out, batch, clip.shape[1], height, width)
    return out

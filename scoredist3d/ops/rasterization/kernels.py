"""The kernels of each rasterisation backend, and the checks that they rely on."""

from __future__ import annotations

import importlib
from functools import cache
from typing import Protocol, cast

import torch
from torch import Tensor

BACKENDS = ("torch", "native", "triton")


class RasterKernels(Protocol):
    """What a backend provides; see ``rasterize_torch``."""

    def visible_triangles(self, clip: Tensor, faces: Tensor, height: int, width: int) -> Tensor:
        """(B, H, W) int32, triangle + 1 or 0."""

    def silhouettes(self, clip: Tensor, faces: Tensor, across: Tensor, triangle: Tensor, depth: Tensor) -> Tensor:
        """(B, 2, H, W) int64, coded half-edges."""


@cache
def kernels(name: str) -> RasterKernels:
    """The kernels of a backend."""
    return cast(RasterKernels, importlib.import_module(f"scoredist3d.ops.rasterization.{name}_backend"))


def prepared_faces(op: str, clip: Tensor, faces: Tensor) -> Tensor:
    """Checked faces as contiguous int32.

    Raises:
        ValueError: On a wrong shape, type or device, or (CPU) an index without a vertex.
    """
    if clip.ndim != 3 or clip.shape[-1] != 4:
        raise ValueError(f"{op}: clip must be (B, V, 4), got {tuple(clip.shape)}")
    if faces.ndim != 2 or faces.shape[1] != 3 or faces.is_floating_point():
        raise ValueError(f"{op}: faces must be (F, 3) integers, got {tuple(faces.shape)} of {faces.dtype}")
    if faces.device != clip.device:
        raise ValueError(f"{op}: faces ({faces.device}) and clip ({clip.device}) must be on one device")
    if faces.device.type == "cpu" and faces.numel() > 0:
        low, high = int(faces.min()), int(faces.max())
        if low < 0 or high >= clip.shape[1]:
            raise ValueError(f"{op}: faces refer to vertices {low} to {high} and there are {clip.shape[1]}")
    return faces.to(torch.int32).contiguous()

"""Kernels of the rasterization backends, and checks of their inputs."""

from __future__ import annotations

import importlib
from functools import cache
from typing import Protocol, cast

import torch
from torch import Tensor

BACKENDS = ("torch", "native", "triton")


class RasterKernels(Protocol):
    """Interface of a backend module; its functions are documented in ``torch_backend``."""

    def visible_triangles(self, clip: Tensor, faces: Tensor, height: int, width: int) -> Tensor:
        """Index + 1 of the visible triangle at each pixel, 0 if there is none; (B, H, W) int32."""

    def silhouettes(self, clip: Tensor, faces: Tensor, across: Tensor, triangle: Tensor, depth: Tensor) -> Tensor:
        """Encoded silhouette edges between adjacent pixels, (B, 2, H, W) int64."""


@cache
def kernels(name: str) -> RasterKernels:
    """Backend module that provides the :class:`RasterKernels` of backend ``name``."""
    return cast(RasterKernels, importlib.import_module(f"scoredist3d.ops.rasterization.{name}_backend"))


def prepared_faces(op: str, clip: Tensor, faces: Tensor) -> Tensor:
    """Check faces and convert them to contiguous int32.

    Raises:
        ValueError: A shape, dtype or device is wrong, or (checked on the CPU) a vertex index is out of range.
    """
    if clip.ndim != 3 or clip.shape[-1] != 4:
        raise ValueError(f"{op}: clip must be (B, V, 4), got {tuple(clip.shape)}")
    if faces.ndim != 2 or faces.shape[1] != 3 or faces.is_floating_point():
        raise ValueError(f"{op}: faces must be integers (F, 3), got {tuple(faces.shape)} of {faces.dtype}")
    if faces.device != clip.device:
        raise ValueError(f"{op}: faces ({faces.device}) and clip ({clip.device}) must be on the same device")
    if faces.device.type == "cpu" and faces.numel() > 0:
        low, high = int(faces.min()), int(faces.max())
        if low < 0 or high >= clip.shape[1]:
            raise ValueError(f"{op}: faces refer to vertices {low} to {high}, but there are only {clip.shape[1]}")
    return faces.to(torch.int32).contiguous()

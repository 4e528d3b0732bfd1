"""Splatting kernels in C (``native/splatting.c``): CPU, float32, bit-identical for any number of threads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from scoredist3d.ops import native
from scoredist3d.ops.splatting.tiles import (
    MAX_ALPHA,
    MIN_ALPHA,
    MIN_TRANSMITTANCE,
    MOMENTS,
    Scene,
    TileLists,
)

# More than rounding can move the edge of an ellipse, in the exponent; the kernel tests every pixel itself.
_SLACK = 0.02


def composite(scene: Scene, lists: TileLists) -> tuple[Tensor, Tensor]:
    """Image (B, H, W, K) and opacity (B, H, W)."""
    image, opacity = _Composite.apply(scene.means, scene.conics, scene.features, scene.opacities, lists)
    return image, opacity


class _Composite(torch.autograd.Function):
    """(image, opacity) of (means, conics, features, opacities)."""

    @staticmethod
    def forward(
        ctx: Any, means: Tensor, conics: Tensor, features: Tensor, opacities: Tensor, lists: TileLists
    ) -> tuple[Tensor, Tensor]:
        scene = Scene(means.contiguous(), conics.contiguous(), features.contiguous(), opacities.contiguous())
        size = (lists.batch, lists.height, lists.width)
        image = means.new_empty(*size, features.shape[1])
        transmittance = means.new_empty(size)
        last = torch.empty(size, dtype=torch.int32)  # for the gradient: one past the last Gaussian drawn
        native.call("sd3d_splat", *_scene(scene, lists), image, transmittance, last)
        ctx.save_for_backward(scene.means, scene.conics, scene.features, scene.opacities, transmittance, last)
        ctx.lists = lists
        return image, 1 - transmittance

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_image: Tensor, of_opacity: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, transmittance, last = ctx.saved_tensors
        scene, lists = Scene(*tensors), ctx.lists
        count, width = scene.means.shape[0], MOMENTS + scene.features.shape[1]
        entries = scene.means.new_empty(len(lists), width)
        saved = (lists.rows, transmittance, last, of_image.contiguous(), of_opacity.contiguous())
        native.call("sd3d_splat_entry_gradient", *_scene(scene, lists), *saved, entries)
        out = scene.means.new_empty(count, width)
        native.call("sd3d_sum_rows", entries, lists.row_offsets, out, count, width)
        return out[:, :2], out[:, 2:5], out[:, MOMENTS:], out[:, 5], None


def _scene(scene: Scene, lists: TileLists) -> tuple[Tensor | float | int, ...]:
    tensors = (scene.means, scene.conics, scene.features, scene.opacities)
    reaches = (scene.opacities / MIN_ALPHA).log() + _SLACK
    sizes = (scene.features.shape[1], lists.height, lists.width, lists.batch)
    constants = (MAX_ALPHA, MIN_ALPHA, MIN_TRANSMITTANCE)
    return (*tensors, reaches, lists.gaussians, lists.offsets, *sizes, *constants)

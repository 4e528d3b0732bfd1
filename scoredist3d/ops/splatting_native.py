"""Splatting kernels in C (``native/splatting.c``): CPU, float32, bit-identical for any number of threads."""

from __future__ import annotations

import torch
from torch import Tensor

from scoredist3d.ops import native
from scoredist3d.ops.splatting_tiles import (
    MAX_ALPHA,
    MIN_ALPHA,
    MIN_TRANSMITTANCE,
    MOMENTS,
    Scene,
    TileLists,
    by_input,
)

# More than rounding can move the edge of an ellipse, in the exponent; the kernel tests every pixel itself.
_SLACK = 0.02


def composite(scene: Scene, lists: TileLists) -> tuple[Tensor, Tensor, Tensor]:
    """Image (B, H, W, K), transmittance left (B, H, W) and what the gradient asks for (B, H, W) int32."""
    size = (lists.batch, lists.height, lists.width)
    image = scene.means.new_empty(*size, scene.features.shape[1])
    transmittance = scene.means.new_empty(size)
    last = torch.empty(size, dtype=torch.int32)
    native.call("sd3d_splat", *_scene(scene, lists), image, transmittance, last)
    return image, transmittance, last


def composite_gradient(
    scene: Scene, lists: TileLists, transmittance: Tensor, last: Tensor, of_image: Tensor, of_opacity: Tensor
) -> Scene:
    """Gradients of the scene of ``sum(of_image * image) + sum(of_opacity * (1 - transmittance))``."""
    count, width = scene.means.shape[0], MOMENTS + scene.features.shape[1]
    entries = scene.means.new_empty(len(lists), width)
    saved = (lists.rows, transmittance, last, of_image, of_opacity)
    native.call("sd3d_splat_entry_gradient", *_scene(scene, lists), *saved, entries)
    out = scene.means.new_empty(count, width)
    native.call("sd3d_sum_rows", entries, lists.order, lists.row_offsets, out, count, width)
    return by_input(out)


def _scene(scene: Scene, lists: TileLists) -> tuple[Tensor | float | int, ...]:
    tensors = (scene.means, scene.conics, scene.features, scene.opacities)
    reaches = (scene.opacities / MIN_ALPHA).log() + _SLACK
    sizes = (scene.features.shape[1], lists.height, lists.width, lists.batch)
    constants = (MAX_ALPHA, MIN_ALPHA, MIN_TRANSMITTANCE)
    return (*tensors, reaches, lists.gaussians, lists.offsets, *sizes, *constants)

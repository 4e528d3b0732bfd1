"""Gaussian compositing in C (``native/splatting.c``): CPU, float32, bit-identical for any number of threads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from scoredist3d.ops import native
from scoredist3d.ops.splatting.constants import MAX_ALPHA, MIN_ALPHA, MIN_TRANSMITTANCE, MOMENTS
from scoredist3d.ops.splatting.types import Gaussians2D, TileLists

# Added to the exponent at which an ellipse ends; exceeds its rounding error. The kernel tests every pixel exactly.
_SLACK = 0.02


def composite(gaussians: Gaussians2D, lists: TileLists) -> tuple[Tensor, Tensor]:
    """Image (B, H, W, K) and opacity (B, H, W)."""
    image, opacity = _Composite.apply(*gaussians.tensors, lists)
    return image, opacity


class _Composite(torch.autograd.Function):
    """Image and opacity as a function of means, conics, features and opacities."""

    @staticmethod
    def forward(
        ctx: Any, means: Tensor, conics: Tensor, features: Tensor, opacities: Tensor, lists: TileLists
    ) -> tuple[Tensor, Tensor]:
        gaussians = Gaussians2D(*(tensor.contiguous() for tensor in (means, conics, features, opacities)))
        size = (lists.batch, lists.height, lists.width)
        image = means.new_empty(*size, features.shape[1])
        transmittance = means.new_empty(size)
        last = torch.empty(size, dtype=torch.int32)  # position after the last Gaussian drawn, for the backward pass
        native.call("sd3d_splat", *_kernel_inputs(gaussians, lists), image, transmittance, last)
        ctx.save_for_backward(*gaussians.tensors, transmittance, last)
        ctx.lists = lists
        return image, 1 - transmittance

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_image: Tensor, of_opacity: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, transmittance, last = ctx.saved_tensors
        gaussians, lists = Gaussians2D(*tensors), ctx.lists
        count, width = gaussians.means.shape[0], MOMENTS + gaussians.features.shape[1]
        entries = gaussians.means.new_empty(len(lists), width)
        saved = (lists.rows, transmittance, last, of_image.contiguous(), of_opacity.contiguous())
        native.call("sd3d_splat_entry_gradient", *_kernel_inputs(gaussians, lists), *saved, entries)
        out = gaussians.means.new_empty(count, width)
        native.call("sd3d_sum_rows", entries, lists.row_offsets, out, count, width)
        return out[:, :2], out[:, 2:5], out[:, MOMENTS:], out[:, 5], None


def _kernel_inputs(gaussians: Gaussians2D, lists: TileLists) -> tuple[Tensor | float | int, ...]:
    """Arguments that come first in both C kernels: Gaussians, tile lists, sizes and constants."""
    reaches = (gaussians.opacities / MIN_ALPHA).log() + _SLACK
    sizes = (gaussians.features.shape[1], lists.height, lists.width, lists.batch)
    constants = (MAX_ALPHA, MIN_ALPHA, MIN_TRANSMITTANCE)
    return (*gaussians.tensors, reaches, lists.gaussians, lists.offsets, *sizes, *constants)

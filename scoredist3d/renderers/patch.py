"""Training on patches: a full-resolution patch with gradients inside a low-resolution view without gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from scoredist3d.cameras import Cameras
from scoredist3d.config import option
from scoredist3d.limits import MAX_RENDER_SIDE
from scoredist3d.seeding import Rng


@dataclass
class PatchConfig:
    """Options of training on a random patch of each view. The rest of the view provides context for the prior."""

    size: int | None = option(
        None,
        "Pixels per side of the patch that receives gradients; null means the whole view.",
        ge=1,
        le=MAX_RENDER_SIDE,
    )
    downsample: int = option(4, "Downsampling factor per axis outside the patch.", ge=1, le=64)


@dataclass(frozen=True)
class Patch:
    """A rectangle of pixels at the same position in all images of a batch."""

    top: int
    left: int
    height: int
    width: int

    def cut(self, images: Tensor) -> Tensor:
        """The patch (B, h, w, C) of images (B, H, W, C)."""
        return images[:, self.top : self.top + self.height, self.left : self.left + self.width]

    def paste(self, patch: Tensor, coarse: Tensor, height: int, width: int) -> Tensor:
        """(B, height, width, C): ``coarse`` (B, h, w, C) upsampled, with ``patch`` pasted into it.

        The gradient of ``patch`` is multiplied by the ratio of image pixels to patch pixels. For patches at random
        positions, it is then an unbiased estimate of the gradient of the whole image, so the loss weights keep their
        meaning for any patch size.
        """
        size = (height, width)
        patch = _amplified(patch, height * width / (self.height * self.width))
        images = F.interpolate(coarse.movedim(-1, 1), size, mode="bilinear", align_corners=False).movedim(1, -1)
        images = images.contiguous()
        images[:, self.top : self.top + self.height, self.left : self.left + self.width] = patch
        return images


def draw_patch(config: PatchConfig, cameras: Cameras, rng: Rng | None, step: int) -> Patch | None:
    """A patch at a random position, or at the center without ``rng``; None if it would cover the whole image."""
    if config.size is None or config.size >= max(cameras.height, cameras.width):
        return None
    height, width = min(config.size, cameras.height), min(config.size, cameras.width)
    free = torch.tensor([cameras.height - height, cameras.width - width])
    place = torch.tensor([0.5, 0.5])
    if rng is not None:
        place = torch.rand(2, generator=rng("patch", step))  # on the CPU, to avoid a device synchronization
    top, left = (place * (free + 1)).long().minimum(free).tolist()
    return Patch(top, left, height, width)


def low_resolution(config: PatchConfig, cameras: Cameras) -> Cameras:
    """The same cameras at the resolution used outside the patch."""
    return cameras.with_size(max(1, cameras.height // config.downsample), max(1, cameras.width // config.downsample))


def _amplified(values: Tensor, factor: float) -> Tensor:
    """``values``, with their gradient multiplied by ``factor``."""
    amplified: Tensor = _Amplified.apply(values, factor)
    return amplified


class _Amplified(torch.autograd.Function):
    """Identity whose gradient is multiplied by a factor."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.factor * gradient, None

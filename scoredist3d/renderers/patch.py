"""A whole view at low resolution without gradients, and one full-resolution patch of it with them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from scoredist3d.cameras import Cameras
from scoredist3d.config import option
from scoredist3d.seeding import Rng


@dataclass
class PatchConfig:
    """Train on a random part of each view; the rest only shows the prior what it belongs to."""

    size: int | None = option(
        None, "Pixels per side of the part that gets gradients; the whole view where not given.", ge=1
    )
    downsample: int = option(4, "Pixels of the view along each axis to one ray outside of the patch.", ge=1, le=64)


@dataclass(frozen=True)
class Patch:
    """A square of pixels, cut off at the image's borders, at one place in all images of a batch."""

    top: int
    left: int
    height: int
    width: int

    def cut(self, images: Tensor) -> Tensor:
        """(B, h, w, C) of (B, H, W, C)."""
        return images[:, self.top : self.top + self.height, self.left : self.left + self.width]

    def paste(self, patch: Tensor, coarse: Tensor, height: int, width: int) -> Tensor:
        """(B, height, width, C): ``coarse`` (B, h, w, C) scaled up, with ``patch`` over it.

        ``patch`` gets its gradient times the number of pixels of the image to one of its own. As places are random,
        it then stands for that of the whole image: the gradient of a mean over the image's pixels is that of the mean
        over the patch's. So the weights of terms on images mean the same for patches of any size, next to each other,
        to the guidance and to terms on the geometry itself.
        """
        size = (height, width)
        patch = _amplified(patch, height * width / (self.height * self.width))
        images = F.interpolate(coarse.movedim(-1, 1), size, mode="bilinear", align_corners=False).movedim(1, -1)
        images = images.contiguous()
        images[:, self.top : self.top + self.height, self.left : self.left + self.width] = patch
        return images


def draw_patch(config: PatchConfig, cameras: Cameras, rng: Rng | None, step: int) -> Patch | None:
    """A patch at a random place, the same on every device, or None where it would be the whole image.

    Without ``rng`` it is in the middle.
    """
    if config.size is None or config.size >= max(cameras.height, cameras.width):
        return None
    height, width = min(config.size, cameras.height), min(config.size, cameras.width)
    free = torch.tensor([cameras.height - height, cameras.width - width])
    place = torch.tensor([0.5, 0.5])
    if rng is not None:
        place = torch.rand(2, generator=rng("patch", step))  # on the host, which would have to wait for a device's
    top, left = (place * (free + 1)).long().minimum(free).tolist()
    return Patch(top, left, height, width)


def low_resolution(config: PatchConfig, cameras: Cameras) -> Cameras:
    """The same views with fewer pixels."""
    return cameras.with_size(max(1, cameras.height // config.downsample), max(1, cameras.width // config.downsample))


def _amplified(values: Tensor, factor: float) -> Tensor:
    """``values``, with a gradient that is ``factor`` times as large."""
    amplified: Tensor = _Amplified.apply(values, factor)
    return amplified


class _Amplified(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.factor * gradient, None

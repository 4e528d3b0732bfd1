"""A whole view at low resolution without gradients, and one full-resolution patch of it with them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from scoredist3d.cameras import Cameras
from scoredist3d.config import option


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
        """(B, height, width, C): ``coarse`` (B, h, w, C) scaled up, with ``patch`` over it."""
        size = (height, width)
        images = F.interpolate(coarse.movedim(-1, 1), size, mode="bilinear", align_corners=False).movedim(1, -1)
        images = images.contiguous()
        images[:, self.top : self.top + self.height, self.left : self.left + self.width] = patch
        return images


def draw_patch(config: PatchConfig, cameras: Cameras, generator: torch.Generator | None) -> Patch | None:
    """A patch at a random place, or None where it would be the whole image.

    Without a generator it is in the middle.
    """
    if config.size is None or config.size >= max(cameras.height, cameras.width):
        return None
    height, width = min(config.size, cameras.height), min(config.size, cameras.width)
    free = torch.tensor([cameras.height - height, cameras.width - width])
    place = torch.tensor([0.5, 0.5])
    if generator is not None:
        place = torch.rand(2, generator=generator, device=generator.device).cpu()
    top, left = (place * (free + 1)).long().minimum(free).tolist()
    return Patch(top, left, height, width)


def low_resolution(config: PatchConfig, cameras: Cameras) -> Cameras:
    """The same views with fewer pixels."""
    return cameras.with_size(max(1, cameras.height // config.downsample), max(1, cameras.width // config.downsample))

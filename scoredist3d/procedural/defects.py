"""Defects of images, as their captions name them: see DEFECTS in :mod:`scoredist3d.procedural.captions`."""

from __future__ import annotations

import torch
from torch import Tensor

from scoredist3d.procedural.captions import DEFECTS

# Ranges of strength. Lengths are in pixels of an image of 128 pixels and scale with the image.
_REFERENCE = 128
_BLUR = (1.5, 4.0)  # standard deviation
_SATURATION = (1.8, 3.0)
_CONTRAST = (1.15, 1.5)
_NOISE = (0.08, 0.25)  # standard deviation
_FLATTENING = (6.0, 12.0)  # standard deviation
_BLOCK = (4, 8)  # side
_LUMA = (0.299, 0.587, 0.114)


def degrade(rgba: Tensor, background: Tensor, defect: Tensor, generator: torch.Generator) -> Tensor:
    """Images with one defect each, composited over a background: (B, 3, H, W) in [0, 1].

    Each defect has a random strength in each image. "low detail" flattens the object and keeps its silhouette; the
    other defects are those of the composited image.

    Args:
        rgba: (B, 4, H, W), straight alpha, in [0, 1].
        background: (B, 3, 1, 1), (B, 3, H, W) or one that broadcasts to these, in [0, 1].
        defect: (B,) int64, index into DEFECTS, or -1 for none.
        generator: Source of all randomness, on the device of the images.
    """
    rgb, alpha = rgba[:, :3], rgba[:, 3:]
    background = background.expand_as(rgb)
    result = rgb * alpha + background * (1.0 - alpha)
    strength = torch.rand(len(rgba), generator=generator, device=rgba.device, dtype=rgba.dtype)
    for index, name in enumerate(DEFECTS):
        chosen = (defect == index).nonzero()[:, 0]
        if len(chosen) == 0:
            continue
        image, u = result[chosen], strength[chosen]
        if name == "blurry":
            image = _blurred(image, _between(_BLUR, u))
        elif name == "oversaturated":
            image = _oversaturated(image, u)
        elif name == "noisy":
            noise = torch.randn(image.shape, generator=generator, device=image.device, dtype=image.dtype)
            image = image + _between(_NOISE, u)[:, None, None, None] * noise
        elif name == "pixelated":
            image = _pixelated(image, u)
        else:
            flat = _flattened(rgb[chosen], alpha[chosen], _between(_FLATTENING, u))
            image = torch.lerp(background[chosen], flat, alpha[chosen])
        result = result.index_copy(0, chosen, image.clamp(0.0, 1.0))
    return result


def _between(limits: tuple[float, float], u: Tensor) -> Tensor:
    return limits[0] + (limits[1] - limits[0]) * u


def _separable(image: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Apply one matrix per image along its height and one along its width: (B, H, H) and (B, W, W)."""
    return rows[:, None] @ image @ columns[:, None].transpose(-1, -2)


def _gaussian(size: int, sigma: Tensor) -> Tensor:
    """Matrices (B, size, size) of Gaussian blurs; weights beyond the border go to the pixels inside."""
    x = torch.arange(size, device=sigma.device, dtype=sigma.dtype)
    weights = torch.exp(-0.5 * ((x[:, None] - x) / sigma[:, None, None]) ** 2)
    return weights / weights.sum(-1, keepdim=True)


def _blurred(image: Tensor, sigma: Tensor) -> Tensor:
    height, width = image.shape[-2:]
    sigma = sigma * (height / _REFERENCE)
    return _separable(image, _gaussian(height, sigma), _gaussian(width, sigma))


def _oversaturated(image: Tensor, u: Tensor) -> Tensor:
    """More saturation, and more contrast about middle gray."""
    luma = (image * image.new_tensor(_LUMA)[:, None, None]).sum(1, keepdim=True)
    colorful = luma + _between(_SATURATION, u)[:, None, None, None] * (image - luma)
    return 0.5 + _between(_CONTRAST, u)[:, None, None, None] * (colorful - 0.5)


def _pixelated(image: Tensor, u: Tensor) -> Tensor:
    """Means over square blocks; the blocks at the right and lower border may be smaller."""
    height, width = image.shape[-2:]
    least, most = _BLOCK
    side = (least + torch.floor(u * (most - least + 1))).clamp_max(most)
    side = torch.round(side * (height / _REFERENCE)).clamp_min(2.0)
    return _separable(image, _blocks(height, side), _blocks(width, side))


def _blocks(size: int, side: Tensor) -> Tensor:
    block = torch.floor((torch.arange(size, device=side.device, dtype=side.dtype) + 0.5) / side[:, None])
    same = (block[:, :, None] == block[:, None, :]).to(side.dtype)
    return same / same.sum(-1, keepdim=True)


def _flattened(rgb: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Colors of the foreground, blurred without those of the background."""
    weighted = _blurred(torch.cat([rgb * alpha, alpha], 1), sigma)
    return weighted[:, :3] / weighted[:, 3:].clamp_min(1e-4)

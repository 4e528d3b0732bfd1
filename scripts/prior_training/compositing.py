"""Backgrounds of the training images."""

from __future__ import annotations

import torch
from torch import Tensor


def random_backgrounds(
    count: int, generator: torch.Generator, device: torch.device, *, white: float, gray: float
) -> Tensor:
    """Random background colors (count, 3, 1, 1).

    They are white with probability ``white``, a random gray with probability ``gray``, else a random color.
    """
    kind = torch.rand(count, generator=generator, device=device)[:, None]
    value = torch.rand(count, 3, generator=generator, device=device)
    shade = 0.1 + 0.9 * value[:, :1].expand(-1, 3)
    color = torch.where(kind < white, torch.ones_like(value), torch.where(kind < white + gray, shade, value))
    return color[:, :, None, None]


def straight_alpha(rgba: Tensor) -> Tensor:
    """Images (B, H, W, 4) in uint8 as (B, 4, H, W) in [0, 1]."""
    return rgba.movedim(-1, 1).float() / 255.0


def composite(rgba: Tensor, background: Tensor, opacity: Tensor | float = 1.0) -> Tensor:
    """Composite straight-alpha images (B, 4, H, W) over colors (B, 3, 1, 1); the result is (B, 3, H, W) in [0, 1]."""
    alpha = rgba[:, 3:] * opacity
    return rgba[:, :3] * alpha + background * (1 - alpha)

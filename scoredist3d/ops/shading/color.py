"""Color transfer functions (display sRGB, linear), and a clamp whose gradient does not vanish outside the range."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def srgb_to_linear(display: Tensor) -> Tensor:
    """Convert display sRGB values (IEC 61966-2-1) in [0, 1] to linear values in [0, 1]; differentiable everywhere."""
    curve = ((display.clamp_min(0.04045) + 0.055) / 1.055).pow(2.4)
    return torch.where(display <= 0.04045, display / 12.92, curve)


def linear_to_srgb(linear: Tensor) -> Tensor:
    """Convert linear values to display sRGB, the inverse of :func:`srgb_to_linear`; its slope at 0 is 12.92."""
    curve = 1.055 * linear.clamp_min(0.0031308).pow(1.0 / 2.4) - 0.055
    return torch.where(linear <= 0.0031308, 12.92 * linear, curve)


def clamp_unit(x: Tensor) -> Tensor:
    """Clamp ``x`` to [0, 1] with a one-sided gradient outside the range.

    Outside, the gradient is passed on if gradient descent moves ``x`` back towards the range, and is 0 if it moves
    ``x`` away. With the gradient of a plain clamp, a value outside the range could never return.
    """
    clamped: Tensor = _ClampUnit.apply(x)
    return clamped


class _ClampUnit(torch.autograd.Function):
    """Autograd function of :func:`clamp_unit`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clamp(0.0, 1.0)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        leads_away = ((x > 1.0) & (upstream < 0.0)) | ((x < 0.0) & (upstream > 0.0))
        return torch.where(leads_away, 0.0, upstream)

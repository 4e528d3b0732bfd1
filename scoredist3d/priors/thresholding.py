"""Thresholding of the predicted clean image in pixel-space models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from scoredist3d.diffusion.schedule import per_item


@dataclass(frozen=True)
class SampleLimit:
    """Static or dynamic thresholding of x_0 (Imagen, arXiv 2205.11487, section 2.3).

    Static thresholding clamps x_0 to [-maximum, maximum]. Dynamic thresholding computes the quantile s of |x_0| per
    image, clamps s to [1, maximum], clamps the image to [-s, s] and divides it by s.

    Attributes:
        maximum: The largest absolute value.
        quantile: The quantile of dynamic thresholding, in (0, 1]; None for static thresholding.
    """

    maximum: float
    quantile: float | None = None

    @classmethod
    def from_scheduler_config(cls, config: Mapping[str, Any]) -> Self | None:
        """The thresholding that a diffusers ``scheduler_config.json`` specifies; None if it specifies none."""
        if config.get("thresholding"):
            return cls(
                float(config.get("sample_max_value", 1.0)), float(config.get("dynamic_thresholding_ratio", 0.995))
            )
        if config.get("clip_sample"):
            return cls(float(config.get("clip_sample_range", 1.0)))
        return None

    def __call__(self, x0: Tensor) -> Tensor:
        """The thresholded images (B, C, H, W)."""
        if self.quantile is None:
            return x0.clamp(-self.maximum, self.maximum)
        magnitudes = x0.abs().flatten(1).float()
        s = torch.quantile(magnitudes, self.quantile, dim=1).clamp(1.0, max(1.0, self.maximum))
        s = per_item(s, x0)
        return x0.clamp(-s, s) / s

"""Agreement of two sets of renders of the same views: color, coverage and depth.

Colors are (B, H, W, 3) in [0, 1]; opacities and depths are (B, H, W, 1).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SOLID = 0.5  # opacity from which a pixel shows the object
_LEAST_ERROR = 1e-10


def psnr(images: Tensor, reference: Tensor) -> float:
    """PSNR of images against reference images of the same shape in dB, over all values; at most 100."""
    error = float((images - reference).square().mean())
    return -10.0 * float(torch.tensor(max(error, _LEAST_ERROR), dtype=torch.float64).log10())


@dataclass(frozen=True)
class Coverage:
    """Agreement of the coverage and depth of a surface with those of a reference.

    Attributes:
        see_through: Share, in [0, 1], of the reference's solid pixels in which the surface is missing.
        off_depth: Share of the pixels solid in both in which the depths differ by more than the tolerance.
        behind: Share of the same pixels in which the surface is farther away by more than the tolerance.
    """

    see_through: float
    off_depth: float
    behind: float


def coverage(
    opacity: Tensor, depth: Tensor, wanted_opacity: Tensor, wanted_depth: Tensor, tolerance: float
) -> Coverage:
    """Compare the coverage and depth of a surface with a reference; shares of no pixels are 0.

    Args:
        opacity, depth: (B, H, W, 1), of the surface; depths in scene units.
        wanted_opacity, wanted_depth: (B, H, W, 1), of the reference.
        tolerance: Largest difference of depths that counts as equal, scene units.
    """
    solid, wanted = opacity >= SOLID, wanted_opacity >= SOLID
    both = solid & wanted
    further = (depth - wanted_depth)[both]
    return Coverage(
        see_through=_share(~solid[wanted]),
        off_depth=_share(further.abs() > tolerance),
        behind=_share(further > tolerance),
    )


def _share(mask: Tensor) -> float:
    return float(mask.double().mean()) if mask.numel() else 0.0

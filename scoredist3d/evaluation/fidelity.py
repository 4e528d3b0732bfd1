"""Agreement of two sets of renders of the same views: color, structure, coverage and depth.

Colors are (B, H, W, 3) in [0, 1]; opacities and depths are (B, H, W, 1).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SOLID = 0.5  # opacity from which a pixel shows the object
_LEAST_ERROR = 1e-10
_WINDOW = 11  # pixels


def psnr(images: Tensor, reference: Tensor) -> float:
    """PSNR of images against reference images of the same shape in dB, over all values; at most 100."""
    error = float((images - reference).square().mean())
    return -10.0 * float(torch.tensor(max(error, _LEAST_ERROR), dtype=torch.float64).log10())


def ssim(images: Tensor, reference: Tensor) -> float:
    """Mean structural similarity (SSIM) of images and reference images of the same shape, in [-1, 1]; 1 if they equal.

    As in Wang et al. 2004 ("Image quality assessment"): a Gaussian window of 11x11 pixels with a standard deviation of
    1.5, K1 = 0.01 and K2 = 0.03, each channel by itself. Pixels less than 5 from the border are left out.

    Raises:
        ValueError: The images are smaller than 11x11 pixels.
    """
    if min(images.shape[1:3]) < _WINDOW:
        raise ValueError(f"ssim: the images must have at least {_WINDOW}x{_WINDOW} pixels, got {tuple(images.shape)}")
    from skimage.metrics import structural_similarity

    pairs = zip(images.double().cpu().numpy(), reference.double().cpu().numpy(), strict=True)
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    values = [structural_similarity(*pair, data_range=1.0, channel_axis=-1, **options) for pair in pairs]
    return float(sum(values) / len(values))


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

"""A set of 3D Gaussians outside of any optimisation."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Splats:
    """``N`` Gaussians in the world (3D Gaussian splatting, arXiv 2308.04079).

    Attributes:
        means: (N, 3), scene units.
        scales: (N, 3), standard deviations along the own axes, scene units, > 0.
        quaternions: (N, 4), unit, w first: own axes to world.
        opacities: (N,), in (0, 1).
        colors: (N, 3), display sRGB in [0, 1] (seen from nowhere in particular).
        harmonics: (N, K, 3) or None, coefficients of degrees 1 and up of the view-dependent part.
    """

    means: Tensor
    scales: Tensor
    quaternions: Tensor
    opacities: Tensor
    colors: Tensor
    harmonics: Tensor | None = None

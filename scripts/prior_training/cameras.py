"""Cameras of the training images."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from scoredist3d.cameras import Cameras, orbit
from scoredist3d.procedural.rendering import STANDARD_DISTANCE, STANDARD_FOVY_DEG

REFERENCE_EXTENT = STANDARD_DISTANCE * math.tan(math.radians(STANDARD_FOVY_DEG / 2))
"""Half the height that a camera of the standard distance and field of view sees at the origin, in scene units."""
_STANDARD = 0.7  # share of cameras close to the standard distance and field of view
_EXTENT_RANGE = (0.7, 1.25)  # visible height of the other cameras, relative to the standard
_FOVY_RANGE = (25.0, 55.0)


def training_cameras(
    count: int, size: int, generator: torch.Generator, device: torch.device, *, varied: bool = True
) -> Cameras:
    """Random cameras of the prior.

    The azimuth is uniform. The elevation is uniform in [-15, 60] degrees, and for 30 % of the cameras in [30, 90]. 70 %
    of the cameras have the standard field of view and distance (+-5 %). The others have fields of view from 25 to 55
    degrees, at distances from which 0.7 to 1.25 times the standard height is visible.

    Args:
        count: Number of cameras.
        size: Height and width of the images in pixels.
        generator: Source of all randomness.
        device: Device of the cameras.
        varied: Whether distances and fields of view vary; otherwise all cameras are standard ones.
    """

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, generator=generator, device=device)

    steep = uniform(0.0, 1.0) < 0.3
    elevation = torch.where(steep, uniform(30.0, 90.0), uniform(-15.0, 60.0))
    azimuth = uniform(0.0, 360.0)
    standard = uniform(0.0, 1.0) < (_STANDARD if varied else 1.0)
    fovy = torch.where(standard, STANDARD_FOVY_DEG, uniform(*_FOVY_RANGE))
    extent = REFERENCE_EXTENT * torch.where(standard, uniform(0.95, 1.05), uniform(*_EXTENT_RANGE))
    distance = extent / torch.tan(torch.deg2rad(fovy / 2))
    return orbit(azimuth, elevation, distance, fovy, size, size)

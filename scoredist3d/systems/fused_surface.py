"""Surface of a density field as its renders show it: depths in views from all around, fused to signed distances."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from scoredist3d.cameras import Cameras
from scoredist3d.geometry.base import distance_density
from scoredist3d.geometry.trilinear import trilinear
from scoredist3d.meshes.tsdf_fusion import surface_distances, surrounding_cameras

_VIEWS = 48
_LEAST_SIZE = 64  # pixels
_OPAQUE = 0.5  # opacity from which a ray meets a surface


@dataclass(frozen=True)
class FusedSurface:
    """An :class:`~scoredist3d.meshes.exportable.Extractable` of signed distances on a grid.

    Attributes:
        distances: (N, N, N), see :func:`~scoredist3d.meshes.tsdf_fusion.fuse_depths`.
        radius: Radius of the ball that contains the object, scene units.
        iso_level: Density on the surface.
    """

    distances: Tensor
    radius: float
    iso_level: float | None = 1.0

    @property
    def device(self) -> torch.device:
        """Device of the distances."""
        return self.distances.device

    def density(self, points: Tensor) -> Tensor:
        """(N,) :func:`~scoredist3d.geometry.base.distance_density` of the distances at (N, 3) points."""
        return distance_density(trilinear(self.distances, points, self.radius), points, self.radius)

    def surface(self) -> None:
        """There is no mesh yet."""


@dataclass(frozen=True)
class DepthViews:
    """Depths in ``B`` views.

    Attributes:
        depth: (B, H, W, 1), mean distance of the samples along the ray, scene units.
        variance: (B, H, W, 1), their variance, scene units^2.
        opacity: (B, H, W, 1) in [0, 1].
    """

    depth: Tensor
    variance: Tensor
    opacity: Tensor


@torch.no_grad()
def fused_surface(
    views: Callable[[Cameras], DepthViews], radius: float, device: torch.device, resolution: int
) -> FusedSurface | None:
    """Fuse the depths of an object in 48 views; None if no ray is half opaque, or if no grid point is inside.

    The volume rendering of an optimized field looks smooth although its iso-surfaces are crumpled, because a ray
    averages over the density along its way, and the fusion averages over the rays. The surface is one standard
    deviation in front of the mean depth: behind the surface of a homogeneous medium, the depth has an exponential
    distribution, whose mean equals its standard deviation.

    Args:
        views: Renders the object from cameras on ``device``.
        radius: Radius of the ball that contains the object, scene units.
        device: Device of the object.
        resolution: Points along each axis of the grid of distances, and height and width of the views if these are
            not smaller than 64 pixels.
    """
    cameras = surrounding_cameras(_VIEWS, radius, max(resolution, _LEAST_SIZE)).to(device)
    seen = views(cameras)
    empty = seen.opacity[..., 0] < _OPAQUE
    if bool(empty.all()):
        return None
    # From distances along the rays to distances along the viewing axis, which is -z of the camera.
    cosine = -(cameras.rays().directions * cameras.c2w[:, None, None, :3, 2]).sum(-1)
    depth = (seen.depth - seen.variance.sqrt())[..., 0] * cosine
    variance = seen.variance[..., 0]
    distances = surface_distances(cameras, depth, variance, empty, radius=radius, resolution=resolution)
    return FusedSurface(distances, radius) if bool((distances < 0).any()) else None

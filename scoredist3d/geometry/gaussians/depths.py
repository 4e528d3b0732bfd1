"""Depths of 3D Gaussians in views from all around, for the extraction of their surface."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from scoredist3d.cameras import Cameras, sphere_cameras
from scoredist3d.geometry.base import GaussianSet
from scoredist3d.meshes.tsdf_fusion import DepthMaps
from scoredist3d.ops.rotations import rotation_matrices
from scoredist3d.ops.splatting.splat import project, splat

_DISTANCE, _FOVY_DEG = 3.2, 40.0  # of the cameras, in radii: the ball fills the image
_LEAST_OPACITY = 0.05  # of the most opaque ray through an object
_SPREAD = 0.1  # standard deviation of the depths along a ray that halves its weight, in radii


@torch.no_grad()
def surface_depths(gaussians: GaussianSet, radius: float, *, views: int, size: int) -> DepthMaps:
    """Depths of the surface of Gaussians from cameras on a sphere around the ball.

    The depth of a ray is the mean over the Gaussians of the depth of their near side, weighted as their colors. The
    near side is one standard deviation in front of the mean: the silhouette of a Gaussian is about as far from the mean
    (1.2 standard deviations at half of an opacity of 1), so that depths and silhouettes describe one surface. Rays
    whose Gaussians differ much in depth, at an outline or through a gap, have a low weight. Rays with less than half of
    the largest opacity of all rays are empty.

    Args:
        gaussians: Treated as constants.
        radius: Radius of the ball, scene units.
        views: Number of cameras.
        size: Width and height of the images in pixels.

    Raises:
        ValueError: No ray is more than 5 % opaque.
    """
    cameras = sphere_cameras(views, distance=_DISTANCE * radius, fovy_deg=_FOVY_DEG, size=size).to(
        gaussians.means.device
    )
    rendered = [_render(gaussians, cameras[index]) for index in range(views)]
    depth, variance, opacity = (torch.cat(maps) for maps in zip(*rendered, strict=True))
    largest = float(opacity.max())
    if largest < _LEAST_OPACITY:
        raise ValueError(
            f"no surface: no ray through the Gaussians is more than {100 * largest:.2g} % opaque; train longer"
        )
    weight = 1.0 / (1.0 + variance / (_SPREAD * radius) ** 2)
    return DepthMaps(cameras, depth.masked_fill(opacity < 0.5 * largest, torch.inf), weight)


def _render(gaussians: GaussianSet, camera: Cameras) -> tuple[Tensor, Tensor, Tensor]:
    """(1, H, W) means and variances of the depths of near sides, and opacities, in the view of one camera."""
    height, width = camera.height, camera.width
    focal = 0.5 * height / torch.tan(camera.fovy / 2)
    projected = project(gaussians.means, gaussians.scales, gaussians.quaternions, camera.w2c, focal, height, width)
    toward = F.normalize(gaussians.means - camera.origins, dim=-1)
    local = torch.einsum("nij,ni->nj", rotation_matrices(gaussians.quaternions), toward)
    std = (local * gaussians.scales).norm(dim=-1)
    # Relative to the distance of the origin, so that squaring loses few digits.
    middle = camera.origins.norm()
    offset = projected.depth[0] - std - middle
    image = splat(projected, torch.stack([offset, offset.square()], dim=-1), gaussians.opacities, height, width)
    mean, square = (image.color / image.opacity.clamp_min(1e-6)).unbind(dim=-1)
    return mean + middle, (square - mean.square()).clamp_min(0.0), image.opacity[..., 0]

"""Surface of 3D Gaussians: their depths in views from all around, fused to signed distances."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from scoredist3d.cameras import Cameras
from scoredist3d.geometry.base import GaussianSet
from scoredist3d.meshes.tsdf_fusion import surface_distances, surrounding_cameras
from scoredist3d.ops.rotations import rotation_matrices
from scoredist3d.ops.splatting.splat import project, splat

_VIEWS = 64
_LEAST_OPACITY = 0.05  # of the most opaque ray through an object


@torch.no_grad()
def gaussian_distances(gaussians: GaussianSet, radius: float, resolution: int) -> Tensor:
    """(N, N, N) distances to the surface of Gaussians, fused from their depths in 64 views.

    The depth of a ray is the mean over the Gaussians of the depth of their near side, weighted as their colors. The
    near side is one standard deviation in front of the mean: the silhouette of a Gaussian is about as far from the mean
    (1.2 standard deviations at half of an opacity of 1), so that depths and silhouettes describe one surface. Rays
    with less than half of the largest opacity of all rays are empty.

    Args:
        gaussians: Treated as constants.
        radius: Radius of the ball, scene units.
        resolution: Number of grid points per axis. Pixels are half as large as grid steps.

    Raises:
        ValueError: No ray is more than 5 % opaque.
    """
    cameras = surrounding_cameras(_VIEWS, radius, 2 * resolution).to(gaussians.means.device)
    rendered = [_render(gaussians, cameras[index]) for index in range(_VIEWS)]
    depth, variance, opacity = (torch.cat(maps) for maps in zip(*rendered, strict=True))
    largest = float(opacity.max())
    if largest < _LEAST_OPACITY:
        raise ValueError(
            f"no surface: no ray through the Gaussians is more than {100 * largest:.2g} % opaque; train longer"
        )
    empty = opacity < 0.5 * largest
    return surface_distances(cameras, depth, variance, empty, radius=radius, resolution=resolution)


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

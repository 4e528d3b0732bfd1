"""Differentiable 3D Gaussian splatting (Kerbl et al. 2023, https://arxiv.org/abs/2308.04079).

``project`` maps 3D Gaussians to 2D Gaussians in the image: with W the camera's rotation and J the Jacobian of the
perspective projection at the mean, ``cov2d = J W cov W^T J^T + dilation I`` (EWA splatting, Zwicker et al. 2001).
``splat`` composites them at every pixel from front to back:

    alpha_i = min(0.999, opacity_i exp(-(p - mean_i)^T conic_i (p - mean_i) / 2)),    0 if less than 1/255
    w_i     = alpha_i T_i,  T_i = prod_{j < i} (1 - alpha_j),    image = sum_i w_i color_i

Compositing stops before the Gaussian that would leave a transmittance of 1e-4 or less. All backends use the constants
of gsplat. Because the two steps are separate, a caller can splat other channels (features, normals) and can read the
gradient of the image-plane means, which densification needs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from scoredist3d.ops import backends
from scoredist3d.ops.splatting import torch_backend
from scoredist3d.ops.splatting.tiles import assign_tiles
from scoredist3d.ops.splatting.types import (
    Gaussians2D,
    ProjectedGaussians,
    ProjectionSettings,
    SplattedImages,
    TileLists,
)

logger = logging.getLogger("scoredist3d")

BACKENDS = ("torch", "native", "triton", "gsplat")
MAX_CHANNELS = 63  # 64 including depth, the number of channels in the stack buffer of the C kernel


def project(
    means: Tensor,
    scales: Tensor,
    quaternions: Tensor,
    w2c: Tensor,
    focal: Tensor,
    height: int,
    width: int,
    *,
    near: float = 0.01,
    dilation: float = 0.3,
    antialiased: bool = False,
    backend: str = "auto",
) -> ProjectedGaussians:
    """Project 3D Gaussians to the image planes of OpenGL cameras (x right, y up, looking along -z).

    Differentiable in all tensor arguments (Triton: once, and not in the cameras). Invisible Gaussians get finite values
    that do not affect any image. Gaussians with non-finite parameters are invisible.

    Args:
        means: (N, 3), world.
        scales: (N, 3), standard deviations along the principal axes, > 0, scene units.
        quaternions: (N, 4), rotations from the principal axes to the world as (w, x, y, z); normalized internally.
        w2c: (B, 4, 4), world to camera, rigid.
        focal: (B,), pixels; the principal point is the image center.
        height: Pixels.
        width: Pixels.
        near: Depth of the near plane; Gaussians whose mean is nearer are invisible.
        dilation: Added to the image-plane variances, square pixels; models the footprint of a pixel.
        antialiased: Also compute ``compensation`` = sqrt(det cov / det dilated) of Mip-Splatting (Yu et al. 2023,
            https://arxiv.org/abs/2311.16493), by which ``splat`` multiplies the opacities.
        backend: As for ``splat``. ``triton`` and ``gsplat`` both use the Triton kernel if Triton is installed and
            neither ``w2c`` nor ``focal`` requires a gradient; otherwise the projection runs in torch.

    Raises:
        ValueError: A shape, size, ``near`` or ``dilation`` is invalid, or the backend is not usable.
    """
    _check_gaussians(means, scales, quaternions, w2c, focal)
    if not near > 0 or not dilation >= 0:
        raise ValueError(f"splatting: near must be > 0 and dilation >= 0, got {near} and {dilation}")
    _check_size(height, width)
    name = backends.choose("splatting", backend, means.device, BACKENDS, means.dtype)
    settings = ProjectionSettings(height, width, near, dilation, antialiased)
    moving_camera = torch.is_grad_enabled() and (w2c.requires_grad or focal.requires_grad)
    if _uses_triton(name) and not moving_camera:
        from scoredist3d.ops.splatting.project_triton import project as project_in_triton

        return project_in_triton(means, scales, quaternions, w2c, focal, settings)
    return torch_backend.project(means, scales, quaternions, w2c, focal, settings)


def splat(
    projected: ProjectedGaussians,
    colors: Tensor,
    opacities: Tensor,
    height: int,
    width: int,
    *,
    backend: str = "auto",
) -> SplattedImages:
    """Composite projected Gaussians from front to back, see the module's docstring.

    Differentiable once in means2d, conics, depth, colors, opacities and compensation. The gradient through alpha is 0
    where alpha is clamped to its maximum. ``native`` (with any number of threads) and ``triton`` are deterministic.

    Args:
        projected: Result of ``project`` for the same image size.
        colors: (N, C), or (B, N, C) with colors per camera; C from 1 to 63.
        opacities: (N,), in [0, 1].
        height: Pixels.
        width: Pixels.
        backend: auto, torch, native (CPU), triton or gsplat (CUDA). auto never selects gsplat, whose kernels are
            compiled on the user's machine at first use.

    Raises:
        ValueError: A shape, dtype or size is invalid, or the backend is not usable.
    """
    _check_splat(projected, colors, opacities)
    _check_size(height, width)
    batch, count = projected.depth.shape
    name = backends.choose("splatting", backend, colors.device, BACKENDS, colors.dtype)
    if name == "triton":
        from scoredist3d.ops.splatting.triton_backend import splat as splat_in_triton

        return splat_in_triton(projected, colors, opacities, height, width)
    alphas = opacities.expand(batch, count)
    if projected.compensation is not None:
        alphas = alphas * projected.compensation
    if _uses_triton(name):
        from scoredist3d.ops.splatting.tiles_triton import gaussians_and_lists

        _, lists = gaussians_and_lists(projected, colors, opacities, height, width)
    else:
        lists = assign_tiles(projected, alphas, height, width)
    features = torch.cat([colors.expand(batch, count, -1), projected.depth[..., None]], dim=-1)
    gaussians = Gaussians2D(
        projected.means2d.flatten(0, 1),
        projected.conics.flatten(0, 1),
        features.flatten(0, 1),
        alphas.flatten(),
    )
    image, opacity = _compositor(name)(gaussians, lists)
    color, depth = image.split([colors.shape[-1], 1], dim=-1)
    return SplattedImages(color, opacity[..., None], depth)


def _uses_triton(name: str) -> bool:
    """Whether a backend projects and sorts in Triton: triton, and gsplat (which only composites) if available."""
    return name == "triton" or (name == "gsplat" and backends.missing("triton") is None)


def _check_gaussians(means: Tensor, scales: Tensor, quaternions: Tensor, w2c: Tensor, focal: Tensor) -> None:
    count, batch = means.shape[0], w2c.shape[0]
    expected = {
        "means": (means, (count, 3)),
        "scales": (scales, (count, 3)),
        "quaternions": (quaternions, (count, 4)),
        "w2c": (w2c, (batch, 4, 4)),
        "focal": (focal, (batch,)),
    }
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(f"splatting: {name} must be {shape}, got {tuple(tensor.shape)}")
        if tensor.dtype != means.dtype or tensor.device != means.device:
            raise ValueError(
                f"splatting: {name} ({tensor.dtype}, {tensor.device}) must have the dtype and device of "
                f"means ({means.dtype}, {means.device})"
            )


def _check_size(height: int, width: int) -> None:
    if height < 1 or width < 1:
        raise ValueError(f"splatting: height and width must be 1 or more, got {height} and {width}")


def _check_splat(projected: ProjectedGaussians, colors: Tensor, opacities: Tensor) -> None:
    batch, count = projected.depth.shape
    if colors.ndim not in (2, 3) or tuple(colors.shape[:-1]) not in ((count,), (batch, count)):
        raise ValueError(f"splatting: colors must be ({count}, C) or ({batch}, {count}, C), got {tuple(colors.shape)}")
    if not 1 <= colors.shape[-1] <= MAX_CHANNELS:
        raise ValueError(f"splatting: colors must have from 1 to {MAX_CHANNELS} channels, got {colors.shape[-1]}")
    if tuple(opacities.shape) != (count,):
        raise ValueError(f"splatting: opacities must be ({count},), got {tuple(opacities.shape)}")
    for name, tensor in (("colors", colors), ("opacities", opacities)):
        if tensor.dtype != projected.depth.dtype or tensor.device != projected.depth.device:
            raise ValueError(
                f"splatting: {name} ({tensor.dtype}, {tensor.device}) must have the dtype and device of the "
                f"projected Gaussians ({projected.depth.dtype}, {projected.depth.device})"
            )


@cache
def _compositor(name: str) -> Callable[[Gaussians2D, TileLists], tuple[Tensor, Tensor]]:
    """Function that composites 2D Gaussians with tile lists to an image (B, H, W, K) and its opacity (B, H, W)."""
    if name == "gsplat":
        logger.info("splatting: gsplat compiles its kernels at first use, which takes a few minutes")
        from scoredist3d.ops.splatting import gsplat_backend

        return gsplat_backend.composite
    if name == "native":
        from scoredist3d.ops.splatting import native_backend

        return native_backend.composite
    return torch_backend.composite

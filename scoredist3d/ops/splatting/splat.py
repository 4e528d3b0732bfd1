"""Differentiable 3D Gaussian splatting (Kerbl et al. 2023, https://arxiv.org/abs/2308.04079).

``project`` maps Gaussians in space to Gaussians in the image: with W the camera's rotation and J the Jacobian of the
perspective at the mean, ``cov2d = J W cov W^T J^T + dilation I`` (EWA splatting, Zwicker et al. 2001). ``splat``
composites them at every pixel, the nearest first:

    alpha_i = min(0.999, opacity_i exp(-(p - mean_i)^T conic_i (p - mean_i) / 2)),    0 where less than 1/255
    w_i     = alpha_i T_i,  T_i = prod_{j < i} (1 - alpha_j),    image = sum_i w_i color_i

A pixel is finished at the first Gaussian that would leave it a transmittance of 1e-4 or less; that one is not drawn.
The constants, the same in every backend, are gsplat's. Splitting the two steps lets a caller splat other channels
(features, normals) and read the gradient at the image-plane means, which densification needs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from scoredist3d.ops import backends
from scoredist3d.ops.splatting.tiles import FRUSTUM_MARGIN, REACH, Scene, TileLists, assign_tiles
from scoredist3d.ops.splatting.torch_backend import composite as composite_in_torch

logger = logging.getLogger("scoredist3d")

BACKENDS = ("torch", "native", "triton", "gsplat")
MAX_CHANNELS = 63  # with the depth 64: what a tile of the C kernel keeps on its stack


@dataclass(frozen=True)
class Projected:
    """N Gaussians in the image planes of B cameras.

    Attributes:
        means2d: (B, N, 2), pixels from the top left corner, x to the right and y down; the first pixel's centre is at
            (0.5, 0.5). Call ``means2d.retain_grad()`` before splatting to read its gradient (per pixel; times half the
            image's width it is per unit of normalised device coordinates, as in the paper) for densification.
        conics: (B, N, 3), inverse covariance (xx, xy, yy), per square pixel.
        depth: (B, N), along the viewing axis, scene units.
        radius: (B, N), pixels along the longer axis to where a Gaussian of opacity 1 falls to 1/255; 0 if not visible.
        deviations: (B, N, 2), standard deviation along x and y, pixels.
        visible: (B, N) bool, in front of the near plane and reaching the image.
        compensation: (B, N), what the opacities are multiplied with so that dilation adds no light; None without.
    """

    means2d: Tensor
    conics: Tensor
    depth: Tensor
    radius: Tensor
    deviations: Tensor
    visible: Tensor
    compensation: Tensor | None = None

    @property
    def count(self) -> Tensor:
        """(N,) int64, in how many of the cameras each Gaussian is visible."""
        return self.visible.sum(dim=0)


@dataclass(frozen=True)
class Splats:
    """Images of Gaussians.

    Attributes:
        color: (B, H, W, C), sum_i w_i color_i: premultiplied, so over a background b it is ``color + (1 - opacity) b``.
        opacity: (B, H, W, 1), sum_i w_i.
        depth: (B, H, W, 1), sum_i w_i depth_i: premultiplied too.
    """

    color: Tensor
    opacity: Tensor
    depth: Tensor


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
) -> Projected:
    """Project 3D Gaussians to the image planes of OpenGL cameras (x right, y up, looking along -z).

    Differentiable in everything but the image's size (Triton's kernels: once). Gaussians that are not visible have
    finite values that no image shows; a Gaussian that is not finite is not visible.

    Args:
        means: (N, 3), world.
        scales: (N, 3), standard deviations along the Gaussian's own axes, > 0, scene units.
        quaternions: (N, 4), rotation from those axes to the world, as (w, x, y, z); normalised here.
        w2c: (B, 4, 4), world to camera, rigid.
        focal: (B,), pixels; the principal point is the image's centre.
        height: Pixels.
        width: Pixels.
        near: Gaussians whose mean is nearer than this along the viewing axis are not visible.
        dilation: Added to the variance of each Gaussian in the image, square pixels: the pixel's own footprint.
        antialiased: Give the ``compensation`` sqrt(det cov / det dilated) of Mip-Splatting (Yu et al. 2023,
            https://arxiv.org/abs/2311.16493) with the means, by which ``splat`` multiplies the opacities.
        backend: As for ``splat``. One Triton kernel for triton and gsplat, where Triton is installed and neither
            ``w2c`` nor ``focal`` wants a gradient; else torch.

    Raises:
        ValueError: On a wrong shape, size, ``near`` or ``dilation``, or a backend that cannot be used.
    """
    _check_gaussians(means, scales, quaternions, w2c, focal)
    if not near > 0 or not dilation >= 0:
        raise ValueError(f"splatting: near must be > 0 and dilation >= 0, got {near} and {dilation}")
    _check_size(height, width)
    name = backends.choose("splatting", backend, means.device, BACKENDS, means.dtype)
    moving_camera = torch.is_grad_enabled() and (w2c.requires_grad or focal.requires_grad)
    if _takes_triton(name) and not moving_camera:
        from scoredist3d.ops.splatting.project_triton import View
        from scoredist3d.ops.splatting.project_triton import project as project_in_triton

        view = View(height, width, near, dilation, antialiased)
        return Projected(*project_in_triton(means, scales, quaternions, w2c, focal, view))
    return _project_in_torch(means, scales, quaternions, w2c, focal, (height, width), near, dilation, antialiased)


def splat(
    projected: Projected, colors: Tensor, opacities: Tensor, height: int, width: int, *, backend: str = "auto"
) -> Splats:
    """Composite projected Gaussians, the nearest first (see the top of this file).

    Differentiable once in means2d, conics, depth, colours, opacities and compensation. Where alpha is at its greatest
    value it has no gradient. ``native`` (for any number of threads) and ``triton`` repeat bit by bit.

    Args:
        projected: From ``project`` for the same image size.
        colors: (N, C) or, per camera, (B, N, C); any C from 1 to 63.
        opacities: (N,), in [0, 1].
        height: Pixels.
        width: Pixels.
        backend: auto, torch, native (CPU), triton or gsplat (CUDA). auto never takes gsplat, whose kernels are compiled
            on the user's machine at first use.

    Raises:
        ValueError: On a wrong shape, dtype or size, or a backend that cannot be used.
    """
    _check_splat(projected, colors, opacities)
    _check_size(height, width)
    batch, count = projected.depth.shape
    name = backends.choose("splatting", backend, colors.device, BACKENDS, colors.dtype)
    if name == "triton":
        from scoredist3d.ops.splatting.triton_backend import splat as splat_in_triton

        return Splats(*splat_in_triton(projected, colors, opacities, height, width))
    alphas = opacities.expand(batch, count)
    if projected.compensation is not None:
        alphas = alphas * projected.compensation
    if _takes_triton(name):
        from scoredist3d.ops.splatting.tiles_triton import scene_and_lists

        _, lists = scene_and_lists(projected, colors, opacities, height, width)
    else:
        lists = assign_tiles(projected, alphas, height, width)
    features = torch.cat([colors.expand(batch, count, -1), projected.depth[..., None]], dim=-1)
    scene = Scene(
        projected.means2d.flatten(0, 1),
        projected.conics.flatten(0, 1),
        features.flatten(0, 1),
        alphas.flatten(),
    )
    image, opacity = _compositor(name)(scene, lists)
    color, depth = image.split([colors.shape[-1], 1], dim=-1)
    return Splats(color, opacity[..., None], depth)


def _takes_triton(name: str) -> bool:
    """Whether the backend's projection and tile lists are Triton's; gsplat, from its package, only composites."""
    return name == "triton" or (name == "gsplat" and backends.missing("triton") is None)


def _project_in_torch(
    means: Tensor,
    scales: Tensor,
    quaternions: Tensor,
    w2c: Tensor,
    focal: Tensor,
    shape: tuple[int, int],
    near: float,
    dilation: float,
    antialiased: bool,
) -> Projected:
    """The reference; ``shape`` is the image's height and width."""
    rotation, translation = w2c[:, :3, :3], w2c[:, :3, 3:]
    local = rotation @ means.t() + translation  # (B, 3, N)
    batch, count = len(w2c), len(means)
    axes = (rotation @ _axes(scales, quaternions).view(3, 3 * count)).view(batch, 3, 3, count)
    depth = -local[:, 2]
    front = depth > near
    z = torch.where(front, depth, 1.0)
    slope = local[:, :2] / z[:, None]
    f = focal[:, None, None]
    size = slope.new_tensor([shape[1], shape[0]])[:, None]
    limit = FRUSTUM_MARGIN * 0.5 * size / f
    jacobian = torch.minimum(torch.maximum(slope, -limit), limit)
    # Rows of J W axes, that is, the Gaussian's axes in the image; the second row's sign is that of the image's y.
    along = f[..., None] / z[:, None, None] * (axes[:, :2] + jacobian[:, :, None] * axes[:, 2:])
    conics, variance, compensation = _conics(along[:, 0], -along[:, 1], dilation, antialiased)
    centre = f * slope * slope.new_tensor([1.0, -1.0])[:, None] + 0.5 * size
    means2d = centre.transpose(1, 2)
    with torch.no_grad():
        radius = REACH * _longest(variance).sqrt()
        reach = REACH * variance[..., :2].sqrt()
        inside = ((means2d + reach > 0) & (means2d - reach < size[:, 0])).all(dim=-1)
        visible = front & inside & conics.isfinite().all(dim=-1)
        radius = torch.where(visible, radius, 0.0)
    return Projected(means2d, conics, depth, radius, reach / REACH, visible, compensation)


def _axes(scales: Tensor, quaternions: Tensor) -> Tensor:
    """(3, 3, N), world coordinates by principal axis, each as long as its standard deviation."""
    w, x, y, z = torch.nn.functional.normalize(quaternions, dim=1).unbind(1)
    rows = (
        (1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)),
        (2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)),
        (2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)),
    )
    return torch.stack([entry for row in rows for entry in row]).view(3, 3, len(scales)) * scales.t()


def _conics(p: Tensor, q: Tensor, dilation: float, antialiased: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Conics (B, N, 3), variances (xx, yy, xy) and compensation, from the rows p, q (B, 3, N) of J W axes.

    ``det([p, q][p, q]^T + d I) = |p x q|^2 + d (|p|^2 + |q|^2) + d^2``: a sum of positive terms, where the product of
    the variances minus the square of the covariance would lose all its digits for a long thin Gaussian.
    """
    xx, yy, xy = (p * p).sum(1), (q * q).sum(1), (p * q).sum(1)
    area = torch.linalg.vector_norm(torch.linalg.cross(p, q, dim=1), dim=1)
    det = area * area + dilation * (xx + yy) + dilation * dilation
    xx, yy = xx + dilation, yy + dilation
    conics = torch.stack([yy, -xy, xx], dim=-1) / det[..., None]
    compensation = area * det.rsqrt() if antialiased else None
    return conics, torch.stack([xx, yy, xy], dim=-1).detach(), compensation


def _longest(variance: Tensor) -> Tensor:
    """The greater eigenvalue of [[xx, xy], [xy, yy]]."""
    xx, yy, xy = variance.unbind(-1)
    return 0.5 * (xx + yy) + torch.hypot(0.5 * (xx - yy), xy)


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
                f"splatting: {name} ({tensor.dtype}, {tensor.device}) must agree with means "
                f"({means.dtype}, {means.device})"
            )


def _check_size(height: int, width: int) -> None:
    if height < 1 or width < 1:
        raise ValueError(f"splatting: height and width must be 1 or more, got {height} and {width}")


def _check_splat(projected: Projected, colors: Tensor, opacities: Tensor) -> None:
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
                f"splatting: {name} ({tensor.dtype}, {tensor.device}) must agree with the projected Gaussians "
                f"({projected.depth.dtype}, {projected.depth.device})"
            )


@cache
def _compositor(name: str) -> Callable[[Scene, TileLists], tuple[Tensor, Tensor]]:
    """What makes an image (B, H, W, K) and an opacity (B, H, W) of a scene."""
    if name == "gsplat":
        logger.info("splatting: gsplat compiles its kernels at first use, which takes a few minutes")
        from scoredist3d.ops.splatting import gsplat_backend as splatting_gsplat

        return splatting_gsplat.composite
    if name == "native":
        from scoredist3d.ops.splatting import native_backend as splatting_native

        return splatting_native.composite
    return composite_in_torch

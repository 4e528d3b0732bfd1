"""The surface estimator: a small network that estimates normals and depths from an image of an object."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from scoredist3d.cameras import Cameras
from scoredist3d.config import FieldError
from scoredist3d.ops.shading.directional import DEFAULT_LIGHT
from scoredist3d.procedural.packaged_network import PackagedNetwork

ESTIMATOR_SIZE = 128
_UNSHUFFLE, _INPUTS, _OUTPUTS = 2, 12, 7
LEAST_ERROR = 0.02
"""Lower bound of the expected errors."""
_COVERED = 0.9  # opacity above which both surfaces are compared
_LIGHT = tuple(value / math.hypot(*DEFAULT_LIGHT) for value in DEFAULT_LIGHT)
_JUMP = 0.2  # difference of the depths in 3x3 pixels above which they are discontinuous, scene units


@dataclass(frozen=True)
class SurfaceEstimate:
    """Visible surface in ``B`` images.

    Attributes:
        normal: (B, H, W, 3), outward unit normals in the world.
        depth: (B, H, W, 1), distance along the ray from the camera, scene units.
        opacity: (B, H, W, 1), probability that the pixel shows the object, in [0, 1].
        normal_error: (B, H, W, 1), expected error ||N - N'||_1 + 1 - <N, N'> of the normal.
        depth_error: (B, H, W, 1), expected absolute error of the depth, scene units.
    """

    normal: Tensor
    depth: Tensor
    opacity: Tensor
    normal_error: Tensor
    depth_error: Tensor

    def packed(self) -> Tensor:
        """All maps as one, (B, H, W, 7)."""
        return torch.cat([self.normal, self.depth, self.opacity, self.normal_error, self.depth_error], -1)

    @classmethod
    def unpacked(cls, maps: Tensor) -> Self:
        """The estimate from the map that :meth:`packed` returned, possibly resized."""
        normal, *others = maps.split([3, 1, 1, 1, 1], -1)
        return cls(functional.normalize(normal, dim=-1), *others)


class SurfaceEstimator(PackagedNetwork):
    """U-Net that estimates normals and depths from an image, its background, its camera and the direction of the light.

    It was trained on renders of procedural objects and on the embedded prior's denoised versions of them, so it is
    valid for images of this prior: objects of its categories under its light.

    Args:
        channels: Channels of each level; the first level has half the resolution of the image.
    """

    name = "surface-estimator"

    def __init__(self, channels: Sequence[int] = (40, 56, 80, 96)) -> None:
        super().__init__()
        self.channels = tuple(channels)
        first = self.channels[0]
        self.stem = nn.Conv2d(_INPUTS * _UNSHUFFLE**2, first, 3, padding=1)
        self.down = nn.ModuleList()
        self.up = nn.ModuleList()
        inner = first
        for outer in self.channels:
            self.down.append(_ResidualBlock(inner, outer))
            inner = outer
        self.middle = _ResidualBlock(inner, inner)
        for outer in reversed(self.channels):
            self.up.append(_ResidualBlock(inner + outer, outer))
            inner = outer
        self.head = nn.Conv2d(first, _OUTPUTS * _UNSHUFFLE**2, 3, padding=1)

    def forward(self, images: Tensor, backgrounds: Tensor, cameras: Cameras) -> SurfaceEstimate:
        """Estimate the surface in images (B, H, W, 3) in [0, 1] over backgrounds of the same shape.

        Images of other sizes are resized to 128x128, and the estimate is resized to theirs.
        """
        outputs = self.raw(images, backgrounds, cameras)
        size = images.shape[1:3]
        if outputs.shape[2:] != size:
            outputs = functional.interpolate(outputs, size, mode="bilinear", align_corners=False)
        maps = outputs.movedim(1, -1)
        # From the axes of the camera to those of the world.
        normal = functional.normalize((cameras.c2w[:, None, None, :3, :3] * maps[..., None, :3]).sum(-1), dim=-1)
        depth = cameras.origins.norm(dim=-1)[:, None, None, None] + maps[..., 3:4]
        errors = maps[..., 5:].exp() + LEAST_ERROR
        return SurfaceEstimate(normal, depth, maps[..., 4:5].sigmoid(), errors[..., :1], errors[..., 1:])

    def raw(self, images: Tensor, backgrounds: Tensor, cameras: Cameras) -> Tensor:
        """Outputs of the network, (B, 7, 128, 128).

        Normals in camera space, which are not normalized; depth relative to the distance of the camera; logit of the
        opacity; logarithms of the expected errors of normal and depth.
        """
        pixels = torch.cat([images, backgrounds], -1).movedim(-1, 1)
        size = (ESTIMATOR_SIZE, ESTIMATOR_SIZE)
        if pixels.shape[2:] != size:
            pixels = functional.interpolate(pixels, size, mode="bilinear", align_corners=False, antialias=True)
        world_to_camera = cameras.c2w[:, :3, :3].transpose(1, 2)
        # The direction towards the light and the upward direction, along the camera's axes.
        # Numbers instead of a tensor, which a CUDA graph could not copy to the device.
        x, y, z = (world_to_camera[:, :, axis] * value for axis, value in enumerate(_LIGHT))
        directions = torch.cat([x + y + z, world_to_camera[:, :, 2]], -1)
        constants = directions[:, :, None, None].expand(-1, -1, *pixels.shape[2:])
        inputs = torch.cat([2.0 * pixels - 1.0, constants.to(pixels)], 1)
        x = self.stem(functional.pixel_unshuffle(inputs, _UNSHUFFLE))
        skips = []
        for level, block in enumerate(self.down):
            x = block(x if level == 0 else functional.avg_pool2d(x, 2))
            skips.append(x)
        x = self.middle(x)
        for level, block in enumerate(self.up):
            if level:
                x = functional.interpolate(x, scale_factor=2.0, mode="nearest")
            x = block(torch.cat([x, skips.pop()], 1))
        return functional.pixel_shuffle(self.head(functional.silu(x)), _UNSHUFFLE).float()

    @classmethod
    def named(cls, name: str, key: str) -> Self:
        """The estimator of a configuration: ``embedded`` for the one in the package, or its folder.

        Args:
            name: Value of the option.
            key: Name of the option, for error messages.

        Raises:
            FieldError: The folder does not contain a surface estimator.
        """
        try:
            return cls.load(None if name == "embedded" else Path(name))
        except FileNotFoundError as error:
            raise FieldError(str(error), key) from error
        except (TypeError, RuntimeError) as error:
            raise FieldError(f"the network in {name} is not a surface estimator: {error}", key) from error

    def config(self) -> dict[str, object]:
        """The arguments of the constructor, which :meth:`load` reads from ``config.json``."""
        return {"channels": list(self.channels)}


class _ResidualBlock(nn.Module):
    """Residual block of two 3x3 convolutions with group normalization."""

    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.GroupNorm(8, inner),
            nn.SiLU(),
            nn.Conv2d(inner, outer, 3, padding=1),
            nn.GroupNorm(8, outer),
            nn.SiLU(),
            nn.Conv2d(outer, outer, 3, padding=1),
        )
        self.skip = nn.Conv2d(inner, outer, 1) if inner != outer else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, outer, h, w) from (B, inner, h, w)."""
        return cast(Tensor, self.skip(x) + self.body(x))


def normal_error(first: Tensor, second: Tensor) -> Tensor:
    """MonoSDF's difference ||N - N'||_1 + 1 - <N, N'> of unit normals (..., 3)."""
    return (first - second).abs().sum(-1) + 1.0 - (first * second).sum(-1)


def surface_difference(
    estimate: SurfaceEstimate,
    normal: Tensor,
    depth: Tensor,
    opacity: Tensor,
    *,
    normal_weight: Tensor | float,
    depth_weight: Tensor | float,
) -> Tensor:
    """MonoSDF's differences (arXiv 2206.00665) of a rendered surface from an estimated one, (B, H, W).

    lambda_n (||N - N'||_1 + 1 - <N, N'>) / b_n + lambda_d |D - D'| / b_d with estimates N', D' and their expected
    errors b, by which the paper does not divide. The authors' depth term has an unknown scale and offset for every
    image; the estimator knows the camera, so its depths are compared directly. The difference is 0 outside of the
    pixels whose 3x3 neighborhood the object covers in both images with continuous depths: an outline that is shifted by
    a pixel would pull the surface behind it forward.

    Args:
        estimate: Estimate for B images of the same size.
        normal: (B, H, W, 3), rendered unit normals in the world.
        depth: (B, H, W, 1), rendered distance along the ray, scene units.
        opacity: (B, H, W, 1), of the render.
        normal_weight, depth_weight: Weights lambda_n and lambda_d, which broadcast to (B, H, W).
    """
    covered = ((estimate.opacity > _COVERED) & (opacity > _COVERED)).to(normal).movedim(-1, 1)
    covered = -functional.max_pool2d(-covered, 3, stride=1, padding=1)[:, 0]
    covered = covered * _continuous(estimate.depth) * _continuous(depth.detach())
    angles = normal_error(normal, estimate.normal)
    distances = (depth - estimate.depth)[..., 0].abs()
    angles, distances = angles / estimate.normal_error[..., 0], distances / estimate.depth_error[..., 0]
    return covered * (normal_weight * angles + depth_weight * distances)


def _continuous(depth: Tensor) -> Tensor:
    """(B, H, W), 1 where the depths (B, H, W, 1) of 3x3 pixels differ by less than a jump, else 0."""
    maps = depth.movedim(-1, 1)
    nearest, furthest = (sign * functional.max_pool2d(sign * maps, 3, stride=1, padding=1) for sign in (-1.0, 1.0))
    return (furthest - nearest < _JUMP).to(depth)[:, 0]

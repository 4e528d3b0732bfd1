"""Cameras, rays and their conventions.

The world is right-handed with z up. Cameras follow OpenGL: x right, y up, view along -z; ``c2w`` maps camera to world
coordinates. A camera at azimuth 0 is at +x and sees the front of the object. The azimuth increases counter-clockwise
seen from above (90 degrees is +y), and the elevation increases upwards. The center of the pixel in row i and column j
is at (j + 0.5, i + 0.5) from the top left corner of the image.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rays:
    """Rays of ``B`` images.

    Attributes:
        origins: (B, H, W, 3), world.
        directions: (B, H, W, 3), world, unit length.
        cosines: (B, H, W), cosine between each ray and the viewing axis of its camera. The z-depth is the distance
            along the ray times this cosine.
    """

    origins: Tensor
    directions: Tensor
    cosines: Tensor


@dataclass(frozen=True)
class Cameras:
    """A batch of ``B`` pinhole cameras with square pixels and one image size.

    Attributes:
        c2w: (B, 4, 4), camera to world.
        fovy: (B,), vertical field of view in radians.
        azimuth: (B,), radians in [-pi, pi).
        elevation: (B,), radians in [-pi/2, pi/2].
        distance: (B,), scene units from the target point.
        height, width: Image size in pixels.
    """

    c2w: Tensor
    fovy: Tensor
    azimuth: Tensor
    elevation: Tensor
    distance: Tensor
    height: int
    width: int

    def __post_init__(self) -> None:
        batch = self.c2w.shape[0]
        if self.c2w.shape != (batch, 4, 4):
            raise ValueError(f"c2w must be (B, 4, 4), got {tuple(self.c2w.shape)}")
        for name in ("fovy", "azimuth", "elevation", "distance"):
            shape = tuple(getattr(self, name).shape)
            if shape != (batch,):
                raise ValueError(f"{name} must be ({batch},), got {shape}")

    def __len__(self) -> int:
        return self.c2w.shape[0]

    def __getitem__(self, index: slice | Tensor | int) -> Cameras:
        """Select cameras by slice, index tensor or integer. An integer keeps the batch dimension, with size 1."""
        if isinstance(index, int):
            index = slice(index, index + 1 or None)
        return self._map(lambda tensor: tensor[index])

    def to(self, device: torch.device | str) -> Cameras:
        """The same cameras on another device."""
        return self._map(lambda tensor: tensor.to(device))

    def with_size(self, height: int, width: int) -> Cameras:
        """The same cameras with another image size and the same vertical field of view."""
        return replace(self, height=height, width=width)

    @classmethod
    def cat(cls, batches: list[Cameras]) -> Cameras:
        """Concatenate batches with equal image sizes.

        Raises:
            ValueError: The image sizes differ.
        """
        sizes = {(batch.height, batch.width) for batch in batches}
        if len(sizes) != 1:
            raise ValueError(f"cameras to concatenate must have one image size, got {sorted(sizes)}; use with_size")
        tensors: dict[str, Any] = {
            f.name: torch.cat([getattr(b, f.name) for b in batches]) for f in fields(cls) if f.name not in _SIZE
        }
        return replace(batches[0], **tensors)

    @classmethod
    def from_poses(cls, c2w: Tensor, fovy: Tensor, height: int, width: int) -> Cameras:
        """Cameras with poses (B, 4, 4) and fields of view (B,); angles and distance are relative to the origin."""
        x, y, z = c2w[:, :3, 3].unbind(dim=-1)
        across, azimuth = torch.hypot(x, y), torch.atan2(y, x)
        azimuth = torch.where(azimuth < math.pi, azimuth, -azimuth)
        return cls(c2w, fovy, azimuth, torch.atan2(z, across), torch.hypot(across, z), height, width)

    @property
    def origins(self) -> Tensor:
        """(B, 3), camera centers in the world."""
        return self.c2w[:, :3, 3]

    @property
    def w2c(self) -> Tensor:
        """(B, 4, 4), world to camera."""
        rotation, position = self.c2w[:, :3, :3], self.c2w[:, :3, 3:]
        w2c = torch.zeros_like(self.c2w)
        w2c[:, :3, :3] = rotation.transpose(1, 2)
        # Elementwise, because autocast would reduce the precision of a matrix product.
        w2c[:, :3, 3] = -(rotation * position).sum(dim=1)
        w2c[:, 3, 3] = 1.0
        return w2c

    def projection(self, near: float = 0.1, far: float = 100.0) -> Tensor:
        """(B, 4, 4), OpenGL projection from camera to clip space (y up, z in [-w, w])."""
        cot = 1.0 / torch.tan(self.fovy / 2)
        matrix = torch.zeros_like(self.c2w)
        matrix[:, 0, 0] = cot * self.height / self.width
        matrix[:, 1, 1] = cot
        matrix[:, 2, 2] = -(far + near) / (far - near)
        matrix[:, 2, 3] = -2.0 * far * near / (far - near)
        matrix[:, 3, 2] = -1.0
        return matrix

    def rays(self) -> Rays:
        """Rays through all pixel centers, in the dtype of ``c2w`` even under autocast."""
        device, dtype = self.c2w.device, self.c2w.dtype
        focal = 0.5 * self.height / torch.tan(self.fovy / 2)  # pixels
        x = torch.arange(self.width, device=device, dtype=dtype) + 0.5 - self.width / 2
        y = self.height / 2 - (torch.arange(self.height, device=device, dtype=dtype) + 0.5)
        x = (x / focal[:, None])[:, None, :, None]
        y = (y / focal[:, None])[:, :, None, None]
        cosines = (x.square() + y.square() + 1.0).rsqrt()
        # Elementwise, because a matrix product under autocast would be off by several pixels at a size of 512.
        right, up, backward = self.c2w[:, None, None, :3, :3].unbind(dim=-1)
        directions = (x * right + y * up - backward) * cosines
        origins = self.origins[:, None, None, :].expand_as(directions)
        return Rays(origins=origins, directions=directions, cosines=cosines[..., 0])

    def _map(self, function: Callable[[Tensor], Tensor]) -> Cameras:
        """The cameras with ``function`` applied to all tensors."""
        tensors: dict[str, Any] = {f.name: function(getattr(self, f.name)) for f in fields(self) if f.name not in _SIZE}
        return replace(self, **tensors)


_SIZE = ("height", "width")


def look_at(position: Tensor, target: Tensor, up: Tensor) -> Tensor:
    """(B, 4, 4) ``c2w`` of OpenGL cameras at ``position`` looking at ``target``.

    Args:
        position, target, up: (B, 3), world. If the viewing direction is parallel to ``up``, the camera's up direction
            is the limit for azimuth 0: world -x for a view straight down, +x for a view straight up.
    """
    backward = torch.nn.functional.normalize(position - target, dim=-1)
    right = torch.linalg.cross(up, backward, dim=-1)
    degenerate = right.norm(dim=-1, keepdim=True) < 1e-6
    right = torch.where(degenerate, right.new_tensor([0.0, 1.0, 0.0]).expand_as(right), right)
    right = torch.nn.functional.normalize(right, dim=-1)
    c2w = torch.zeros(*position.shape[:-1], 4, 4, device=position.device, dtype=position.dtype)
    c2w[..., :3, 0] = right
    c2w[..., :3, 1] = torch.linalg.cross(backward, right, dim=-1)
    c2w[..., :3, 2] = backward
    c2w[..., :3, 3] = position
    c2w[..., 3, 3] = 1.0
    return c2w


def spherical(azimuth: Tensor, elevation: Tensor, distance: Tensor) -> Tensor:
    """(B, 3) positions at (B,) azimuths and elevations, in radians, and (B,) distances."""
    return distance[:, None] * torch.stack(
        [elevation.cos() * azimuth.cos(), elevation.cos() * azimuth.sin(), elevation.sin()], dim=-1
    )


def orbit(
    azimuth_deg: Tensor,
    elevation_deg: Tensor,
    distance: Tensor,
    fovy_deg: Tensor,
    height: int,
    width: int,
    *,
    offset: Tensor | None = None,
    target: Tensor | None = None,
    up: Tensor | None = None,
) -> Cameras:
    """Cameras on spheres around the origin.

    Args:
        azimuth_deg, elevation_deg, distance, fovy_deg: (B,); distances in scene units.
        height, width: Image size in pixels.
        offset: (B, 3), perturbations added to the positions.
        target: (B, 3), points that appear in the image center; the origin by default.
        up: (B, 3), up directions; world z by default.
    """
    azimuth, elevation = torch.deg2rad(azimuth_deg), torch.deg2rad(elevation_deg)
    position = spherical(azimuth, elevation, distance)
    if offset is not None:
        position = position + offset
    target = torch.zeros_like(position) if target is None else target
    up = position.new_tensor([0.0, 0.0, 1.0]).expand_as(position) if up is None else up
    if up.shape == position.shape and offset is None:
        # At the poles, the cross product with the up direction vanishes; use its limit for the given azimuth.
        pole = elevation.cos().abs()[:, None] < 1e-4
        limit = (
            torch.stack([-azimuth.cos(), -azimuth.sin(), torch.zeros_like(azimuth)], -1)
            * elevation.sin()[:, None].sign()
        )
        up = torch.where(pole, limit, up)
    wrapped = torch.remainder(azimuth + math.pi, 2 * math.pi) - math.pi
    return Cameras(
        c2w=look_at(position, target, up),
        fovy=torch.deg2rad(fovy_deg),
        azimuth=wrapped,
        elevation=elevation,
        distance=distance,
        height=height,
        width=width,
    )


def sphere_cameras(count: int, *, distance: float, fovy_deg: float, size: int, turn: float = 0.0) -> Cameras:
    """``count`` cameras that lie on a golden spiral around the origin and look at the origin.

    ``turn`` is the rotation of the spiral in units of the azimuth step between consecutive cameras. Values in (0, 1)
    give views between those of ``turn=0``.
    """
    index = torch.arange(count, dtype=torch.float32) + 0.5
    elevation = torch.rad2deg(torch.asin(1.0 - 2.0 * index / count))
    azimuth = (360.0 * ((index + turn) * (math.sqrt(5.0) - 1.0) / 2.0)) % 360.0
    ones = torch.ones(count)
    return orbit(azimuth, elevation, distance * ones, fovy_deg * ones, size, size)

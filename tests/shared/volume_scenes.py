"""Fields with known images, for the tests of the volume renderers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from scoredist3d import registry
from scoredist3d.cameras import Cameras, orbit
from scoredist3d.config.validation import parse_component
from scoredist3d.geometry import Field, GeometryOutput, SignedDistanceField
from scoredist3d.renderers.volume import VolumeRenderer


class FogBall(Field):
    """Constant extinction within ``size`` of the origin, nothing beyond."""

    def __init__(self, extinction: float, size: float = 1.0, radius: float = 1.0) -> None:
        super().__init__(Field.Config(radius=radius))
        self.num_features, self.size = 3, size
        self.level = nn.Parameter(torch.tensor(extinction))

    def forward(self, points: Tensor, *, with_normal: bool = False) -> GeometryOutput:
        normal = nn.functional.normalize(points, dim=-1) if with_normal else None
        return GeometryOutput(self.density(points), points * self.level, normal)

    def density(self, points: Tensor) -> Tensor:
        return self.level * (points.norm(dim=-1) <= self.size)


class SolidSphere(SignedDistanceField):
    """The exact signed distance of a sphere of learnable size, times ``slope``."""

    def __init__(self, size: float = 0.5, slope: float = 1.0) -> None:
        super().__init__(SignedDistanceField.Config())
        self.num_features, self.slope = 3, slope
        self.size = nn.Parameter(torch.tensor(size))

    def sdf(self, points: Tensor) -> Tensor:
        return self.slope * (points.norm(dim=-1) - self.size)

    def extinction(self, points: Tensor) -> Tensor:
        raise AssertionError("NeuS has an extinction of its own")

    def sdf_gradient(self, points: Tensor) -> Tensor:
        return self.slope * nn.functional.normalize(points, dim=-1)

    def forward(self, points: Tensor, *, with_normal: bool = False) -> GeometryOutput:
        sdf, gradient = self.sdf(points), self.sdf_gradient(points) if with_normal else None
        normal = None if gradient is None else gradient / self.slope
        return GeometryOutput(torch.zeros_like(sdf), points, normal, sdf, gradient)


def build(kind: str, name: str, **options: Any) -> Any:
    return registry.build(parse_component(kind, {"type": name, **options}))


def renderer_of(geometry: Any, kind: str = "volume", *, material: Any = None, **options: Any) -> VolumeRenderer:
    result: VolumeRenderer = registry.build(
        parse_component("renderer", {"type": kind, **options}),
        geometry=geometry,
        material=material or build("material", "unlit"),
        background=build("background", "solid"),
    )
    return result


def orbits(*azimuths: float, size: int = 8, fovy: float = 40.0, dtype: torch.dtype = torch.float32) -> Cameras:
    """Views from the distance 3 at the elevation 20 degrees."""
    azimuth = torch.tensor(azimuths)
    ones = torch.ones_like(azimuth)
    cameras = orbit(azimuth, 20.0 * ones, 3.0 * ones, fovy * ones, size, size)
    names = ("c2w", "fovy", "azimuth", "elevation", "distance")
    return Cameras(**{name: getattr(cameras, name).to(dtype) for name in names}, height=size, width=size)


def impact(cameras: Cameras) -> Tensor:
    """(B, H, W) distances at which the rays pass the origin."""
    rays = cameras.rays()
    return torch.linalg.cross(rays.origins, rays.directions).norm(dim=-1)


def rough_volume(dtype: torch.dtype = torch.float32, **options: Any) -> Field:
    """A hash-grid volume with entries that matter."""
    grid = {"num_levels": 3, "log2_hashmap_size": 9, "base_resolution": 4, "backend": "torch"}
    geometry = build("geometry", "implicit-volume", grid=grid, **options)
    with torch.no_grad():
        geometry.table.uniform_(-0.3, 0.3, generator=torch.Generator().manual_seed(0))
    result: Field = geometry.to(dtype)
    return result

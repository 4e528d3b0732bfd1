"""Colors of radiance fields along short rays, beside closed forms and beside the field's own renders."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from scoredist3d.geometry.base import Field, GeometryOutput
from scoredist3d.materials.base import Material, ShadingInputs
from scoredist3d.meshes.exportable import SurfaceChannels
from scoredist3d.systems import volume_channels as module
from scoredist3d.systems.volume_channels import volume_channels

RADIUS = 2.0
UP = torch.tensor([[0.0, 0.0, 1.0]])
IN_FRONT, BEHIND = module._IN_FRONT * RADIUS, module._BEHIND * RADIUS
LENGTH = (IN_FRONT + BEHIND) / module._SAMPLES


class Layers(Field):
    """The half space below z = 0 with a constant density; the feature is the depth below the surface."""

    def __init__(self, density: float) -> None:
        super().__init__(Field.Config(radius=RADIUS))
        self.value = density
        self.seen: list[Tensor] = []

    def forward(self, points: Tensor, *, with_normal: bool = False) -> GeometryOutput:
        """The density and the depth."""
        self.seen.append(points)
        return GeometryOutput((points[:, 2] < 0) * self.value, -points[:, 2:])

    def density(self, points: Tensor) -> Tensor:
        """The density."""
        return self.forward(points).density


class Depth(Material):
    """The depth as the red channel and the roughness; the normals as they are given."""

    num_features = 1

    def forward(self, inputs: ShadingInputs) -> Tensor:
        """The color."""
        return self.channels(inputs).base_color

    def channels(self, inputs: ShadingInputs) -> SurfaceChannels:
        """The channels."""
        red = inputs.features[:, 0]
        color = torch.stack([red, torch.ones_like(red), torch.zeros_like(red)], dim=1)
        return SurfaceChannels(color, roughness=2 * red, normal=(1 + red[:, None]) * inputs.normals)


def found(density: float, height: float = 0.0, count: int = 3) -> tuple[Layers, SurfaceChannels]:
    """The channels at points ``height`` above the surface."""
    field = Layers(density)
    points = torch.tensor([[0.3, -0.2, height]]).repeat(count, 1)
    return field, volume_channels(field, Depth(Depth.Config()), points, UP.repeat(count, 1))


@pytest.mark.parametrize("density", [5.0, 40.0])
def test_a_homogeneous_half_space_has_the_mean_of_an_exponential_distribution(density: float) -> None:
    """Midpoints of the samples below the surface, with the weights of volume rendering."""
    _, channels = found(density)
    depths = torch.tensor([d for k in range(module._SAMPLES) if (d := (k + 0.5) * LENGTH - IN_FRONT) > 0])
    step = 1 - math.exp(-density * LENGTH)
    weights = step * torch.exp(-density * LENGTH * torch.arange(len(depths)))
    alive = torch.exp(-density * LENGTH * torch.arange(len(depths))) > module._OPAQUE
    mean = float((weights * alive * depths).sum() / (weights * alive).sum())
    torch.testing.assert_close(channels.base_color, torch.tensor([[mean, 1.0, 0.0]]).repeat(3, 1))
    assert channels.roughness is not None and channels.normal is not None
    torch.testing.assert_close(channels.roughness, torch.full((3,), 2 * mean))
    torch.testing.assert_close(channels.normal, UP.repeat(3, 1))
    assert channels.metallic is None and channels.occlusion is None


def test_a_dense_field_has_the_color_of_its_first_layer_and_rays_end_there() -> None:
    field, channels = found(1e4)
    first = next(d for k in range(module._SAMPLES) if (d := (k + 0.5) * LENGTH - IN_FRONT) > 0)
    torch.testing.assert_close(channels.base_color[:, 0], torch.full((3,), first))
    assert len(field.seen) == 1 + next(k for k in range(99) if (k + 0.5) * LENGTH > IN_FRONT) + 1


def test_no_points_have_no_colors() -> None:
    assert found(40.0, count=0)[1].base_color.shape == (0, 3)


def test_rays_through_empty_space_have_the_color_of_the_point() -> None:
    _, channels = found(40.0, height=2 * BEHIND)
    torch.testing.assert_close(channels.base_color[:, 0], torch.full((3,), -2 * BEHIND))


def test_each_ray_follows_its_own_normal() -> None:
    field = Layers(40.0)
    points, normals = torch.zeros(2, 3), torch.cat([UP, -UP])
    volume_channels(field, Depth(Depth.Config()), points, normals)
    directions = torch.stack([where[:2, 2].sign() for where in field.seen[1:2]])
    assert directions.tolist() == [[1.0, -1.0]]

"""Gaussians: saved states, copies, the density used for export, and exported splats."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from shared.gaussian_clouds import BUSY, NAMES, gaussians, icosphere, material, optimizer_of, train, view

from scoredist3d.geometry.base import GaussianSet, GeometryInit, prepare_loading
from scoredist3d.geometry.gaussians.field import GaussianField
from scoredist3d.geometry.gaussians.model import Gaussians
from scoredist3d.materials import ShadingInputs
from scoredist3d.meshes.isosurface_extraction import find_surface
from scoredist3d.meshes.mesh import topology
from scoredist3d.meshes.splats import Splats
from scoredist3d.ops.rotations import rotation_matrices
from scoredist3d.seeding import Rng
from scoredist3d.training.checkpoint import load_weights


def test_loading_takes_the_number_but_no_other_size():
    geometry, other = gaussians(num_points=10), gaussians(num_points=25)
    geometry.load_state_dict(other.state_dict())
    assert torch.equal(geometry.means, other.means) and geometry.means.requires_grad
    harmonics = gaussians(num_points=30, material=material("spherical-harmonics", degree=1))
    with pytest.raises(ValueError, match=r"another configuration.*features"):
        load_weights(geometry, harmonics.state_dict())
    assert len(geometry) == 25 and geometry.features.shape == (25, 3)
    nested = torch.nn.ModuleDict({"a": gaussians(num_points=10), "b": gaussians(num_points=11)})
    wanted = torch.nn.ModuleDict({"a": gaussians(num_points=5), "b": gaussians(num_points=6)}).state_dict()
    prepare_loading(nested, wanted)
    assert [len(part) for part in nested.values()] == [5, 6]


def test_names_in_the_state():
    assert set(gaussians(num_points=4).state_dict()) == {*NAMES, "gradient_sum", "views_seen"}


def test_a_copy_is_independent():
    geometry = gaussians(num_points=30, densify=BUSY)
    optimizer = optimizer_of(geometry)
    train(geometry, optimizer, range(3))
    geometry.density(torch.zeros(1, 3))
    frozen = copy.deepcopy(geometry).requires_grad_(False)
    before, seen = frozen.means.clone(), frozen.views_seen.clone()
    train(geometry, optimizer, range(3, 6))
    assert torch.equal(frozen.means, before)
    view(frozen)  # frozen means have no gradients to retain
    frozen.densification.step_post_backward(6, optimizer, Rng())
    assert torch.equal(frozen.views_seen, seen) and torch.equal(frozen.means, before)


class Shaped:
    """Adapter that exposes the density of Gaussians to the surface extraction."""

    radius, iso_level, device = 1.0, None, torch.device("cpu")

    def __init__(self, geometry: Gaussians) -> None:
        self.density = geometry.density

    def surface(self) -> None:
        return None


def test_the_extinction_dims_a_ray_as_the_gaussian_does():
    """Along the shortest axis through the center, 1 - exp(-integral) equals the opacity, up to the cutoff."""
    cloud = GaussianSet(
        torch.tensor([[0.1, 0.0, 0.0]]),
        torch.tensor([[0.2, 0.05, 0.3]]),
        torch.tensor([[1.0, 0, 0, 0]]),
        torch.tensor([0.6]),
        torch.zeros(1, 3),
    )
    field = GaussianField(cloud, 1.0, 1e-6)
    y = torch.linspace(-0.5, 0.5, 2001)
    ray = torch.stack([torch.full_like(y, 0.1), y, torch.zeros_like(y)], dim=-1)
    opacity = 1 - torch.exp(-torch.trapezoid(field.density(ray), y))
    assert opacity.item() == pytest.approx(0.6, abs=3e-3)


def test_the_field_is_the_sum_over_all_gaussians():
    """The lists by cell agree with the sum over all pairs, for Gaussians of all levels; 0 outside the ball."""
    generator = torch.Generator().manual_seed(0)
    count = 300
    cloud = GaussianSet(
        torch.rand(count, 3, generator=generator) * 2 - 1,
        0.005 * 100 ** torch.rand(count, 3, generator=generator),
        torch.randn(count, 4, generator=generator),
        torch.rand(count, generator=generator),
        torch.randn(count, 5, generator=generator),
    )
    points = torch.rand(2000, 3, generator=generator) * 2.2 - 1.1
    axes = rotation_matrices(cloud.quaternions)
    scales = (cloud.scales.square() + 0.01**2).sqrt()
    away = torch.einsum("nij,pni->pnj", axes, points[:, None] - cloud.means)
    square = (away / scales).square().sum(-1)
    strength = -torch.log(1 - cloud.opacities.clamp_max(0.999)) / (math.sqrt(2 * math.pi) * scales.amin(-1))
    weights = torch.where(square <= 9, strength * torch.exp(-square / 2), 0.0) * (points.norm(dim=-1) <= 1)[:, None]
    field = GaussianField(cloud, 1.0, 0.01)
    torch.testing.assert_close(field.density(points), weights.sum(1), rtol=2e-3, atol=1e-3)
    near = weights.sum(1) > 1e-3
    mean = (weights @ cloud.features)[near] / weights.sum(1, keepdim=True)[near]
    torch.testing.assert_close(field.features_at(points)[near], mean, rtol=2e-3, atol=2e-3)
    alone = weights.sum(1) == 0
    nearest = (points[alone][:, None] - cloud.means).norm(dim=-1).argmin(1)
    assert alone.any() and torch.equal(field.features_at(points)[alone], cloud.features[nearest])


def test_the_surface_of_a_shell_is_a_closed_sphere():
    geometry = gaussians(num_points=3000)
    geometry.init_from(GeometryInit(icosphere(0.6, 4), lambda points: 5 * points), Rng())
    found = find_surface(Shaped(geometry), 64)
    radius = np.linalg.norm(found.mesh.vertices, axis=1)
    assert topology(found.mesh).watertight and topology(found.mesh).components == 1
    # The shell is as thick as its Gaussians, and its outer surface is found.
    assert radius.min() > 0.56 and radius.max() < 0.66 and 0.6 < radius.mean() < 0.64 and found.mesh.volume > 0
    points = torch.from_numpy(found.mesh.vertices)
    features = geometry.features_at(points)
    torch.testing.assert_close(
        torch.nn.functional.normalize(features, dim=-1),
        torch.nn.functional.normalize(points, dim=-1),
        atol=0.15,
        rtol=0,
    )


def test_the_field_follows_the_parameters():
    geometry = gaussians(num_points=500)
    point = torch.tensor([[0.0, 0.0, 0.99]])
    assert geometry.density(point).item() == 0.0
    with torch.no_grad():
        geometry.means.copy_(point.expand(500, -1))
    assert geometry.density(point).item() > 0.0
    assert geometry.density(torch.tensor([[0.0, 0.0, 1.01]])).item() == 0.0


def test_splats_hold_the_gaussians():
    built = material("spherical-harmonics", degree=2, degree_every=0)
    geometry = gaussians(num_points=20, material=built)
    with torch.no_grad():
        geometry.features.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
        geometry.quaternions.mul_(3.0)
    splats = geometry.splats(lambda features: built.channels(ShadingInputs(features)).base_color, built.harmonics)
    assert isinstance(splats, Splats) and splats.harmonics.shape == (20, 8, 3)
    torch.testing.assert_close(splats.quaternions.norm(dim=-1), torch.ones(20))
    torch.testing.assert_close(splats.colors, 0.5 + 0.28209479 * geometry.features[:, :3])
    assert not any(value.requires_grad for value in vars(splats).values())
    assert gaussians(num_points=20).splats(torch.sigmoid).harmonics is None

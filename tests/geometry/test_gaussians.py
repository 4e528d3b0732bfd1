"""Gaussians: saved states, copies, the surface used for export, and exported splats."""

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
from scoredist3d.meshes.mesh import Mesh, topology
from scoredist3d.meshes.quality import dihedrals, genus
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
    """Adapter that exposes the surface of Gaussians to the extraction."""

    radius, iso_level, device = 1.0, Gaussians.iso_level, torch.device("cpu")

    def __init__(self, geometry: Gaussians) -> None:
        self.density = geometry.density

    def surface(self) -> None:
        return None


def surface_of(geometry: Gaussians) -> Mesh:
    return find_surface(Shaped(geometry), 64).mesh


def test_features_are_means_over_all_gaussians():
    """The lists by cell agree with the sum over all pairs, for Gaussians of all levels."""
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
    field = GaussianField(cloud, 1.0, 0.01, 32)
    near = weights.sum(1) > 1e-3
    mean = (weights @ cloud.features)[near] / weights.sum(1, keepdim=True)[near]
    torch.testing.assert_close(field.features_at(points)[near], mean, rtol=2e-3, atol=2e-3)
    alone = weights.sum(1) == 0
    nearest = (points[alone][:, None] - cloud.means).norm(dim=-1).argmin(1)
    assert alone.any() and torch.equal(field.features_at(points)[alone], cloud.features[nearest])


def test_the_surface_of_a_shell_is_a_closed_sphere():
    geometry = gaussians(num_points=3000, export_resolution=64)
    geometry.init_from(GeometryInit(icosphere(0.6, 4), lambda points: 5 * points), Rng())
    mesh = surface_of(geometry)
    radius = np.linalg.norm(mesh.vertices, axis=1)
    assert topology(mesh).watertight and topology(mesh).components == 1 and genus(mesh) == 0 and mesh.volume > 0
    # At grazing angles, the near side of a Gaussian is one standard deviation in the surface (0.037) before it.
    assert radius.min() > 0.6 and radius.max() < 0.6 + 0.04
    assert dihedrals(mesh).mean_deg < 3
    points = torch.from_numpy(mesh.vertices)
    features = geometry.features_at(points)
    torch.testing.assert_close(
        torch.nn.functional.normalize(features, dim=-1),
        torch.nn.functional.normalize(points, dim=-1),
        atol=0.3,  # twice the distance between neighbors, in radii of the sphere
        rtol=0,
    )


def test_the_surface_of_a_shell_with_a_gap_is_closed():
    """Where Gaussians are missing on one side, rays hit the far side, and the surface has a dent but no hole."""
    geometry = gaussians(num_points=3000, export_resolution=64)
    geometry.init_from(GeometryInit(icosphere(0.6, 4)), Rng())
    with torch.no_grad():
        geometry.opacity_logits[geometry.means[:, 2] > 0.45] = -20.0
    mesh = surface_of(geometry)
    assert topology(mesh).watertight and topology(mesh).components == 1
    top = mesh.vertices[np.hypot(mesh.vertices[:, 0], mesh.vertices[:, 1]) < 0.1]
    assert top[:, 2].max() < -0.4, "one sees through the gap to the inside of the bottom"


def test_the_surface_of_one_gaussian_is_its_outline():
    """Half of the opacity 0.999 is at 1.18 standard deviations, and the near side at 1."""
    geometry = gaussians(num_points=4, export_resolution=64)
    with torch.no_grad():
        geometry.means.copy_(torch.tensor([0.1, -0.2, 0.15]).expand(4, 3))
        geometry.log_scales.fill_(math.log(0.3))
        geometry.opacity_logits.copy_(torch.tensor([10.0, -20.0, -20.0, -20.0]))
    mesh = surface_of(geometry)
    distance = np.linalg.norm(mesh.vertices - [0.1, -0.2, 0.15], axis=1)
    assert genus(mesh) == 0 and distance.min() > 0.9 * 0.3 and distance.max() < 1.3 * 0.3


def test_gaussians_without_a_surface_are_reported():
    geometry = gaussians(num_points=30)
    with torch.no_grad():
        geometry.opacity_logits.fill_(-9.0)
    with pytest.raises(ValueError, match=r"no surface: no ray through the Gaussians is more than .* % opaque"):
        surface_of(geometry)


def test_the_surface_follows_the_parameters():
    geometry = gaussians(num_points=500, export_resolution=32, init_opacity=0.9)
    point = torch.tensor([[0.0, 0.0, 0.7]])
    assert geometry.density(point).item() < 1.0
    with torch.no_grad():
        geometry.means.add_(point / 2)
    assert geometry.density(point).item() > 1.0
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

"""Initialization of Gaussians: in a ball, on a surface, and from files."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.spatial import cKDTree
from shared.gaussian_clouds import NAMES, gaussians, icosphere, material
from torch import Tensor

from scoredist3d.config.fields import ConfigError
from scoredist3d.export.formats.splats import write_splats
from scoredist3d.geometry.base import GeometryInit
from scoredist3d.materials.base import ShadingInputs
from scoredist3d.meshes.splats import Splats
from scoredist3d.ops.rotations import quaternions_to, rotation_matrices
from scoredist3d.seeding import Rng


def test_a_ball_of_seeded_gray_gaussians():
    state = torch.random.get_rng_state()
    first, again, other = (gaussians(num_points=500, rng=rng) for rng in (Rng(1), Rng(1, rank=2), Rng(2)))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(getattr(first, name), getattr(again, name)) for name in NAMES)
    assert not torch.equal(first.means, other.means)
    cloud = first()
    distance = torch.cat([first.means, other.means]).norm(dim=-1)
    assert distance.max() <= 0.5 + 1e-6
    # Half of the ball's volume; the tolerance is five standard errors of a fraction of 1000 draws.
    assert (distance > 0.5 * 0.5 ** (1 / 3)).float().mean() == pytest.approx(0.5, abs=0.08)
    near, _ = cKDTree(first.means.detach().numpy()).query(first.means.detach().numpy(), k=4)
    torch.testing.assert_close(cloud.scales[:, 0], torch.from_numpy(near[:, 1:].mean(1)).float())
    torch.testing.assert_close(cloud.opacities, torch.full((500,), 0.1))
    assert (cloud.features == 0).all()  # the logit of gray
    assert {group["name"] for group in first.parameter_groups()} == {
        "means",
        "scales",
        "quaternions",
        "opacities",
        "features",
    }


def test_features_are_those_of_the_material():
    built = material("spherical-harmonics", degree=1)
    geometry = gaussians(num_points=10, material=built)
    assert geometry.features.shape == (10, 12)
    torch.testing.assert_close(built.channels(ShadingInputs(geometry.features)).base_color, torch.full((10, 3), 0.5))


def test_gaussians_on_a_surface_are_flat_and_aligned():
    """Uniform by area on a sphere: the mean is 0, the covariance r^2 / 3; the shortest axes are radial."""
    geometry, mesh = gaussians(num_points=4000, surface={"thickness": 0.2, "opacity": 0.7}), icosphere(0.6, 4)

    def features(points: Tensor) -> Tensor:
        return 10 * points

    said = geometry.init_from(GeometryInit(mesh, features), Rng(3))
    assert "4,000 Gaussians" in said
    cloud = geometry()
    radial = torch.nn.functional.normalize(cloud.means, dim=-1)
    torch.testing.assert_close(cloud.means.norm(dim=-1), torch.full((4000,), 0.6), atol=3e-3, rtol=0)
    assert cloud.means.mean(0).abs().max() < 0.03
    torch.testing.assert_close(torch.cov(cloud.means.T), torch.eye(3) * 0.12, atol=0.01, rtol=0)
    axes = rotation_matrices(cloud.quaternions)
    assert ((axes[:, :, 2] * radial).sum(-1) > 0.99).all()
    torch.testing.assert_close(cloud.scales[:, 2], 0.2 * cloud.scales[:, 0])
    torch.testing.assert_close(cloud.scales[:, 1], cloud.scales[:, 0])
    torch.testing.assert_close(cloud.opacities, torch.full((4000,), 0.7))
    torch.testing.assert_close(cloud.features, 10 * cloud.means)
    assert geometry.gradient_sum.shape == (4000,)


def test_further_gaussians_around_a_surface():
    geometry = gaussians(num_points=1000, surface={"around": 0.5, "distance": 0.1})
    geometry.init_from(GeometryInit(icosphere(0.6), lambda points: points), Rng())
    assert len(geometry) == 1500
    away = (geometry.means.detach().norm(dim=-1) - 0.6).abs()
    assert away[:1000].max() < 0.01
    # N(0, 0.1^2) along each axis, hence also along the radius.
    assert away[1000:].square().mean().sqrt() == pytest.approx(0.1, rel=0.15)
    torch.testing.assert_close(
        geometry.features.detach()[1000:].norm(dim=-1), torch.full((500,), 0.6), atol=0.01, rtol=0
    )


def test_rotations_to_directions():
    directions = torch.nn.functional.normalize(torch.randn(50, 3, generator=torch.Generator().manual_seed(0)), dim=-1)
    directions[0], directions[1] = torch.tensor([0.0, 0, 1]), torch.tensor([0.0, 0, -1])
    turned = rotation_matrices(quaternions_to(directions))
    torch.testing.assert_close(turned[:, :, 2], directions, atol=1e-5, rtol=0)
    torch.testing.assert_close(torch.linalg.det(turned), torch.ones(50))


def test_initialization_from_files(tmp_path):
    import trimesh

    trimesh.creation.box((1, 2, 1)).export(tmp_path / "box.stl")
    boxed = gaussians(num_points=300, init="mesh", init_file=str(tmp_path / "box.stl"), radius=2.0)
    extent = boxed.means.detach().abs().amax(0)
    reach = 0.9 * 2.0 / math.sqrt(0.25 + 1 + 0.25)
    torch.testing.assert_close(extent, reach * torch.tensor([0.5, 1.0, 0.5]), atol=0.05, rtol=0)
    assert (boxed.features == 0).all()
    points = np.random.default_rng(0).normal(size=(60, 3))
    colors = np.random.default_rng(1).integers(0, 255, (60, 4), dtype=np.uint8)
    trimesh.PointCloud(points, colors).export(tmp_path / "cloud.ply")
    scattered = gaussians(num_points=40, init="points", init_file=str(tmp_path / "cloud.ply"), material=material())
    assert len(scattered) == 40 and scattered.means.norm(dim=-1).max() <= 0.9 + 1e-6
    # Features still belong to their points.
    _, found = cKDTree(points - 0.5 * (points.min(0) + points.max(0))).query(
        scattered.means.detach().numpy()
        / 0.9
        * np.linalg.norm(points - 0.5 * (points.min(0) + points.max(0)), axis=1).max()
    )
    expected = torch.from_numpy(colors[found, :3] / 255.0).float()
    torch.testing.assert_close(scattered.features.sigmoid(), expected, atol=2e-3, rtol=0)


def test_initialization_from_exported_gaussians(tmp_path):
    source = gaussians(num_points=30, material=material())
    with torch.no_grad():
        source.features.normal_(generator=torch.Generator().manual_seed(0))
        source.log_scales.add_(torch.tensor([0.0, 1.0, -1.0]))
    write_splats(tmp_path / "a.ply", source.splats(torch.sigmoid))
    again = gaussians(init="points", init_file=str(tmp_path / "a.ply"), init_fit=False, material=material())
    for one, other in zip(vars(source()).values(), vars(again()).values(), strict=True):
        if one.shape[-1] != 4:
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)
    turned = [rotation_matrices(geometry.quaternions) for geometry in (source, again)]
    torch.testing.assert_close(*turned, atol=1e-5, rtol=0)


def test_a_mesh_file_has_gaussians_around_it_too(tmp_path):
    icosphere_file = tmp_path / "ball.ply"
    import trimesh

    trimesh.creation.icosphere(3, radius=1.0).export(icosphere_file)
    options = {"init": "mesh", "init_file": str(icosphere_file), "num_points": 1000, "radius": 2.0}
    geometry = gaussians(**options, surface={"around": 0.5, "distance": 0.05})
    assert len(geometry) == 1500 and len(gaussians(**options)) == 1000
    away = (geometry.means.detach().norm(dim=-1) - 1.8).abs()
    assert away[:1000].max() < 0.02
    assert away[1000:].square().mean().sqrt() == pytest.approx(0.1, rel=0.15)
    with pytest.raises(ConfigError, match=r"surface\.around: 500 Gaussians around .* exceed densify\.max_points"):
        gaussians(**options, surface={"around": 0.5}, densify={"max_points": 1200})


def splat_file(path: Path, degree: int) -> str:
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(20, 3, generator=generator)
    harmonics = torch.randn(20, (degree + 1) ** 2 - 1, 3, generator=generator) if degree else None
    quaternions = torch.tensor([1.0, 0.0, 0.0, 0.0]).expand(20, -1)
    shades = torch.rand(20, 3, generator=generator)
    write_splats(
        path, Splats(means, torch.full_like(means, 0.1), quaternions, torch.full((20,), 0.5), shades, harmonics)
    )
    return str(path)


def test_a_file_of_more_gaussians_than_are_allowed_is_refused(tmp_path):
    options = {"init": "points", "init_file": splat_file(tmp_path / "a.ply", 0), "num_points": 8}
    with pytest.raises(ValueError, match=r"a\.ply has 20 Gaussians, more than densify\.max_points = 19"):
        gaussians(**options, densify={"max_points": 19})
    assert len(gaussians(**options, densify={"max_points": 20})) == 20
    assert len(gaussians(**options, densify={"max_points": 19, "enabled": False})) == 20


def test_dropped_view_dependent_colors_are_logged(tmp_path, caplog):
    with caplog.at_level("WARNING", logger="scoredist3d"):
        gaussians(init="points", init_file=splat_file(tmp_path / "plain.ply", 0), num_points=8)
        assert not caplog.records
        gaussians(init="points", init_file=splat_file(tmp_path / "shiny.ply", 2), num_points=8)
    (record,) = caplog.records
    assert "view-dependent colors of shiny.ply (spherical harmonics up to degree 2) are dropped" in record.getMessage()


def test_mistakes_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="init_file: init=mesh needs a file"):
        gaussians(init="mesh")
    with pytest.raises(ConfigError, match="init_file: init=sphere uses no file"):
        gaussians(init_file="a.ply")
    with pytest.raises(ConfigError, match=r"exceeds densify\.max_points"):
        gaussians(num_points=10, densify={"max_points": 5})
    (tmp_path / "a.ply").write_text(
        "ply\nformat ascii 1.0\nelement vertex 1\n"
        "property float x\nproperty float y\nproperty float z\nend_header\n0 0 0\n"
    )
    with pytest.raises(ValueError, match="has 1 points, but at least 4"):
        gaussians(init="points", init_file=str(tmp_path / "a.ply"))

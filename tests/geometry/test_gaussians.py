"""Gaussians: starts, growth with the optimiser's moments, resuming, and their surface."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.spatial import cKDTree
from torch import Tensor

from scoredist3d import registry
from scoredist3d.config.fields import ConfigError
from scoredist3d.config.validation import parse_component
from scoredist3d.geometry.base import GaussianSet, GeometryInit, prepare_loading
from scoredist3d.geometry.gaussians.density_control import DensifyConfig, choose_growth, resize_rows, split_means
from scoredist3d.geometry.gaussians.field import GaussianField
from scoredist3d.geometry.gaussians.model import Gaussians
from scoredist3d.meshes.isosurface_extraction import find_surface
from scoredist3d.meshes.mesh import Mesh, topology
from scoredist3d.meshes.splats import Splats, write_splats
from scoredist3d.ops.rotations import quaternions_to, rotation_matrices
from scoredist3d.ops.splatting.splat import Projected, project, splat
from scoredist3d.seeding import Rng
from scoredist3d.systems.optimizer import OptimizerConfig, build_optimizer
from scoredist3d.training.checkpoint import load_weights

NAMES = ("means", "log_scales", "quaternions", "opacity_logits", "features")


def gaussians(*, rng: Rng | None = None, material: Any = None, **options: Any) -> Gaussians:
    return registry.build(
        parse_component("geometry", {"type": "gaussians", **options}), rng=rng or Rng(), material=material
    )


def material(name: str = "no-material", **options: Any) -> Any:
    return registry.build(parse_component("material", {"type": name, **options}))


def icosphere(radius: float = 0.6, subdivisions: int = 3) -> Mesh:
    import trimesh

    made = trimesh.creation.icosphere(subdivisions, radius=radius)
    return Mesh(np.asarray(made.vertices, np.float32), np.asarray(made.faces, np.int64))


def optimizer_of(geometry: Gaussians, name: str = "adam", *, several: bool = False) -> torch.optim.Optimizer:
    groups = geometry.parameter_groups()
    if several:  # as with parts of a scene that bring their own optimiser
        groups[-1] = groups[-1] | {"optimizer": OptimizerConfig(lr=0.1)}
    return build_optimizer(OptimizerConfig(name=name, lr=0.01, eps=1e-8), groups)


def view(geometry: Gaussians, size: int = 24) -> tuple[Projected, Tensor]:
    """Two cameras on +x and +y at distance 3; the projected Gaussians and their colours (2, H, W, 3)."""
    right = torch.tensor([[[0.0, 1, 0], [0, 0, 1], [1, 0, 0]], [[-1.0, 0, 0], [0, 0, 1], [0, 1, 0]]])
    w2c = torch.eye(4).repeat(2, 1, 1)
    w2c[:, :3, :3] = right
    w2c[:, 2, 3] = -3.0
    cloud = geometry()
    focal = torch.full((2,), 1.5 * size)
    projected = project(cloud.means, cloud.scales, cloud.quaternions, w2c, focal, size, size)
    geometry.observe(projected, size, size)
    return projected, splat(projected, cloud.features.sigmoid(), cloud.opacities, size, size, backend="torch").color


def train(geometry: Gaussians, optimizer: torch.optim.Optimizer, steps: range, rng: Rng | None = None) -> None:
    for step in steps:
        optimizer.zero_grad()
        _, color = view(geometry)
        target = torch.linspace(0, 1, 24)[None, :, None, None].expand_as(color)
        (color - target).square().mean().backward()
        optimizer.step()
        geometry.after_step(step, optimizer, rng or Rng())


BUSY = {"start": 2, "every": 2, "end": 100, "grad_threshold": 1e-4, "opacity_reset_every": 5, "size_threshold": 0.05}


# Starts


def test_a_ball_of_seeded_gray_gaussians():
    state = torch.random.get_rng_state()
    first, again, other = (gaussians(num_points=500, rng=rng) for rng in (Rng(1), Rng(1, rank=2), Rng(2)))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(getattr(first, name), getattr(again, name)) for name in NAMES)
    assert not torch.equal(first.means, other.means)
    cloud = first()
    distance = torch.cat([first.means, other.means]).norm(dim=-1)
    assert distance.max() <= 0.5 + 1e-6
    # Half of a ball's volume: five standard errors of a share of 1000 draws.
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
    torch.testing.assert_close(built.channels(geometry.features).base_color, torch.full((10, 3), 0.5))


def test_a_start_on_a_surface_is_flat_and_aligned():
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
    # N(0, 0.1^2) along each axis, so along the radius too.
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


def test_a_start_from_files(tmp_path):
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


def test_a_start_from_exported_gaussians(tmp_path):
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
    with pytest.raises(ValueError, match=r"a\.ply holds 20 Gaussians, more than densify\.max_points = 19"):
        gaussians(**options, densify={"max_points": 19})
    assert len(gaussians(**options, densify={"max_points": 20})) == 20
    assert len(gaussians(**options, densify={"max_points": 19, "enabled": False})) == 20


def test_view_dependent_colors_that_are_left_out_are_told(tmp_path, caplog):
    with caplog.at_level("WARNING", logger="scoredist3d"):
        gaussians(init="points", init_file=splat_file(tmp_path / "plain.ply", 0), num_points=8)
        assert not caplog.records
        gaussians(init="points", init_file=splat_file(tmp_path / "shiny.ply", 2), num_points=8)
    (record,) = caplog.records
    assert "view-dependent colours of shiny.ply (harmonics up to degree 2) are left out" in record.getMessage()


def test_mistakes_are_told(tmp_path):
    with pytest.raises(ConfigError, match="init_file: init=mesh starts on the surface"):
        gaussians(init="mesh")
    with pytest.raises(ConfigError, match="init_file: init=sphere starts without a file; drop it"):
        gaussians(init_file="a.ply")
    with pytest.raises(ConfigError, match=r"exceeds densify\.max_points"):
        gaussians(num_points=10, densify={"max_points": 5})
    (tmp_path / "a.ply").write_text(
        "ply\nformat ascii 1.0\nelement vertex 1\n"
        "property float x\nproperty float y\nproperty float z\nend_header\n0 0 0\n"
    )
    with pytest.raises(ValueError, match="holds 1 points, at least 4"):
        gaussians(init="points", init_file=str(tmp_path / "a.ply"))


# Growth


def test_which_gaussians_grow():
    config = DensifyConfig(grad_threshold=1.0, size_threshold=0.1, max_points=8)
    gradients = torch.tensor([0.5, 1.0, 2.0, 3.0, -1.0])
    scales = torch.tensor([[0.1], [0.3], [0.05], [0.21], [0.05]]).expand(-1, 3)
    growth = choose_growth(config, gradients, scales, 2.0)
    assert growth.clone.tolist() == [False, False, True, False, False]
    assert growth.split.tolist() == [False, True, False, True, False]
    one = choose_growth(
        DensifyConfig(grad_threshold=1.0, size_threshold=0.1, grow_fraction=0.2), gradients, scales, 2.0
    )
    assert one.split.tolist() == [False, False, False, True, False] and not one.clone.any()
    full = choose_growth(DensifyConfig(grad_threshold=0.0, max_points=5), gradients, scales, 2.0)
    assert not full.clone.any() and not full.split.any()


def test_parts_are_drawn_from_the_gaussian_itself():
    quaternion = torch.nn.functional.normalize(torch.tensor([[0.3, -0.5, 0.7, 0.2]]), dim=-1)
    scales = torch.tensor([[0.1, 0.5, 0.02]])
    count = 20000
    cloud = GaussianSet(
        torch.tensor([[1.0, 2.0, 3.0]]).expand(count, -1),
        scales.expand(count, -1),
        quaternion.expand(count, -1),
        torch.ones(count),
        torch.zeros(count, 3),
    )
    parts = split_means(cloud, torch.Generator().manual_seed(0))
    rotation = rotation_matrices(quaternion)[0]
    covariance = rotation @ torch.diag(scales[0] ** 2) @ rotation.T
    torch.testing.assert_close(torch.cov(parts.T), covariance, atol=3e-3, rtol=0)
    torch.testing.assert_close(parts.mean(0), torch.tensor([1.0, 2.0, 3.0]), atol=0.01, rtol=0)


def test_a_clone_a_split_and_a_removal_by_hand():
    """Gaussian 0 stays, 1 is cloned, 2 split, 3 too transparent, 4 too large."""
    geometry = gaussians(num_points=5, densify={"start": 1, "every": 1, "grad_threshold": 1.0, "size_threshold": 0.1})
    optimizer = optimizer_of(geometry)
    with torch.no_grad():
        geometry.log_scales.copy_(torch.tensor([0.05, 0.05, 0.2, 0.05, 0.6]).log()[:, None].expand(-1, 3))
        geometry.opacity_logits.copy_(torch.logit(torch.tensor([0.5, 0.6, 0.7, 0.001, 0.5])))
        geometry.features.copy_(torch.arange(5.0)[:, None].expand(-1, 3))
    sum(
        (getattr(geometry, name) * torch.arange(1.0, 6).view(5, *[1] * (getattr(geometry, name).ndim - 1))).sum()
        for name in NAMES
    ).backward()
    optimizer.step()
    before = {name: getattr(geometry, name).detach().clone() for name in NAMES}
    moments = {name: copy.deepcopy(optimizer.state[getattr(geometry, name)]) for name in NAMES}
    geometry.gradient_sum.copy_(torch.tensor([1.0, 4.0, 6.0, 0.0, 0.0]))
    geometry.views_seen.copy_(torch.tensor([2.0, 2.0, 3.0, 1.0, 0.0]))
    parameters = list(geometry.parameters())
    geometry.after_step(0, optimizer, Rng(4))
    assert all(one is other for one, other in zip(parameters, geometry.parameters(), strict=True))
    assert len(geometry) == 5
    origin = [0, 1, 1, 2, 2]
    for name in NAMES:
        now = getattr(geometry, name)
        assert now.grad is None
        state = optimizer.state[now]
        for moment in ("exp_avg", "exp_avg_sq"):
            assert (moments[name][moment] != 0).all()
            assert torch.equal(state[moment][:2], moments[name][moment][:2])
            assert (state[moment][2:] == 0).all() and state[moment].shape == now.shape
        assert state["step"] == moments[name]["step"]
        if name in ("quaternions", "opacity_logits", "features"):
            assert torch.equal(now, before[name][origin])
    assert torch.equal(geometry.means[:3], before["means"][[0, 1, 1]])
    parts = geometry.means[3:] - before["means"][2]
    assert parts.norm(dim=-1).min() > 0 and parts.norm(dim=-1).max() < 5 * 0.2
    torch.testing.assert_close(geometry.log_scales[3:], before["log_scales"][[2, 2]] - math.log(1.6))
    assert torch.equal(geometry.log_scales[:3], before["log_scales"][[0, 1, 1]])
    assert (geometry.gradient_sum == 0).all() and geometry.views_seen.shape == (5,)


@pytest.mark.parametrize(("name", "several"), [("adam", False), ("adamw", False), ("sgd", False), ("adam", True)])
def test_moments_follow_their_gaussians(name, several):
    """Rows that stay take the very steps that they would take in a cloud that had never held the others."""
    whole = gaussians(num_points=12, densify={"enabled": False})
    keep = torch.arange(12) % 3 != 0
    part = gaussians(num_points=8, densify={"enabled": False})
    part.load_state_dict({key: value[keep] for key, value in whole.state_dict().items()})
    optimizers = [optimizer_of(geometry, name, several=several) for geometry in (whole, part)]

    def step(geometry: Gaussians, optimizer: torch.optim.Optimizer, rows: Tensor | slice, seed: int) -> None:
        for parameter in geometry.parameters():
            generator = torch.Generator().manual_seed(seed)
            gradient = torch.randn(12, *parameter.shape[1:], generator=generator)
            parameter.grad = gradient[rows][: len(parameter)].contiguous()
        optimizer.step()

    for seed in range(3):
        step(whole, optimizers[0], slice(None), seed)
        step(part, optimizers[1], keep, seed)
    rows = {parameter: parameter.new_ones(0, *parameter.shape[1:]) for parameter in whole.parameters()}
    resize_rows(optimizers[0], rows, keep)
    for seed in range(3, 6):
        step(whole, optimizers[0], keep, seed)
        step(part, optimizers[1], keep, seed)
    for one, other in zip(whole.parameters(), part.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=0, rtol=1e-6)


def test_training_goes_on_while_an_old_graph_lives():
    """Autograd remembers a parameter's shape as long as a graph that used it is alive."""
    geometry = gaussians(num_points=6, densify={"enabled": False})
    optimizer = optimizer_of(geometry)
    kept = (geometry.means * 2).sum()
    keep = torch.ones(6, dtype=torch.bool)
    resize_rows(optimizer, {geometry.means: torch.zeros(3, 3)}, keep)
    (geometry.means * 3).sum().backward()
    assert geometry.means.grad.shape == (9, 3) and kept.requires_grad


def test_statistics_are_gradients_per_normalised_coordinate():
    """The same image at twice the size, and twice the cameras, give the same numbers."""
    geometry = gaussians(num_points=40, densify={"start": 50})
    with torch.no_grad():
        geometry.log_scales.fill_(math.log(0.15))
    found = []
    for size in (32, 64):
        projected, color = view(geometry, size)
        projected.means2d.retain_grad()
        ramp = torch.linspace(0, 1, size + 1)[1:] - 0.5 / size
        (color * ramp[:, None]).mean().backward()
        expected = (2 * 0.5 * size * projected.means2d.grad).norm(dim=-1).sum(0)
        geometry.gradient_sum.zero_()
        geometry.views_seen.zero_()
        geometry.after_step(0, optimizer_of(geometry), Rng())
        torch.testing.assert_close(geometry.gradient_sum, expected)
        assert (geometry.views_seen == projected.count).all() and (geometry.views_seen == 2).all()
        found.append(geometry.gradient_sum.clone())
    # Not exactly: the pixel's footprint is smaller.
    torch.testing.assert_close(found[0], found[1], rtol=0.1, atol=0.05 * float(found[1].max()))


def test_growth_follows_its_calendar():
    options = {"start": 4, "every": 3, "end": 9, "grad_threshold": 0.0, "prune_opacity": 0.0}
    geometry = gaussians(num_points=20, densify=options)
    optimizer, sizes = optimizer_of(geometry), []
    for step in range(14):
        train(geometry, optimizer, range(step, step + 1))
        sizes.append(len(geometry))
    assert sizes[:5] == [20] * 5 and sizes[5] > 20 and sizes[6] == sizes[7] == sizes[5]
    assert sizes[8] > sizes[7] and sizes[8:] == [sizes[8]] * 6
    assert gaussians().grows and not gaussians(densify={"enabled": False}).grows


def test_opacities_are_reset_and_their_moments_forgotten():
    geometry = gaussians(num_points=20, densify={"start": 90, "opacity_reset_every": 3, "prune_opacity": 0.01})
    optimizer = optimizer_of(geometry)
    train(geometry, optimizer, range(2))
    assert geometry().opacities.min() > 0.05
    train(geometry, optimizer, range(2, 3))
    torch.testing.assert_close(geometry().opacities, torch.full((20,), 0.02))
    assert (optimizer.state[geometry.opacity_logits]["exp_avg"] == 0).all()
    assert (optimizer.state[geometry.means]["exp_avg"] != 0).any()


def test_nothing_left_is_an_error():
    geometry = gaussians(num_points=20, densify={"start": 1, "every": 1, "prune_opacity": 0.2})
    with pytest.raises(ValueError, match=r"^densify: after step 0 every Gaussian"):
        geometry.after_step(0, optimizer_of(geometry), Rng())


def test_means_stay_in_the_ball():
    geometry = gaussians(num_points=4, radius=0.5, densify={"enabled": False})
    with torch.no_grad():
        geometry.means[0] = torch.tensor([3.0, 0.0, 4.0])
        inside = geometry.means[1:].clone()
    geometry.after_step(0, optimizer_of(geometry), Rng())
    torch.testing.assert_close(geometry.means[0], torch.tensor([0.3, 0.0, 0.4]))
    assert torch.equal(geometry.means[1:], inside)


def test_growth_is_seeded():
    clouds = []
    for seed in (1, 1, 2):
        geometry = gaussians(num_points=40, densify=BUSY)
        train(geometry, optimizer_of(geometry), range(6), Rng(seed))
        clouds.append(geometry.state_dict())
    assert len(clouds[0]["means"]) != 40
    assert all(torch.equal(clouds[0][name], clouds[1][name]) for name in clouds[0])
    assert not torch.equal(clouds[0]["means"], clouds[2]["means"])


# States


@pytest.mark.parametrize("several", [False, True])
def test_a_resumed_run_is_the_uninterrupted_one(several):
    """Saved in the middle of the statistics, after a densification, and loaded into fresh objects."""
    whole = gaussians(num_points=40, densify=BUSY)
    optimizer = optimizer_of(whole, several=several)
    train(whole, optimizer, range(7))
    assert len(whole) != 40 and whole.views_seen.any()
    saved, moments = copy.deepcopy(whole.state_dict()), copy.deepcopy(optimizer.state_dict())
    train(whole, optimizer, range(7, 12))
    fresh = gaussians(num_points=40, densify=BUSY, rng=Rng(9))
    held = list(fresh.parameters())
    again = optimizer_of(fresh, several=several)
    load_weights(fresh, saved)
    again.load_state_dict(moments)
    assert all(one is other for one, other in zip(held, fresh.parameters(), strict=True))
    train(fresh, again, range(7, 12))
    first, second = whole.state_dict(), fresh.state_dict()
    assert len(first["means"]) != len(saved["means"])
    assert all(torch.equal(first[name], second[name]) for name in first)


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


# Surface and files


class Shaped:
    """A cloud as exporters see it."""

    radius, iso_level, device = 1.0, None, torch.device("cpu")

    def __init__(self, geometry: Gaussians) -> None:
        self.density = geometry.density

    def surface(self) -> None:
        return None


def test_the_extinction_dims_a_ray_as_the_gaussian_does():
    """Along the shortest axis through the centre: 1 - exp(-integral) = opacity, up to what is cut off."""
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
    """Lists by cell against every pair, for sizes of all levels; nothing outside of the ball."""
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
    # The shell is as thick as its Gaussians, and seen from outside.
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
    splats = geometry.splats(lambda features: built.channels(features).base_color, built.harmonics)
    assert isinstance(splats, Splats) and splats.harmonics.shape == (20, 8, 3)
    torch.testing.assert_close(splats.quaternions.norm(dim=-1), torch.ones(20))
    torch.testing.assert_close(splats.colors, 0.5 + 0.28209479 * geometry.features[:, :3])
    assert not any(value.requires_grad for value in vars(splats).values())
    assert gaussians(num_points=20).splats(torch.sigmoid).harmonics is None


def test_a_copy_is_independent():
    geometry = gaussians(num_points=30, densify=BUSY)
    optimizer = optimizer_of(geometry)
    train(geometry, optimizer, range(3))
    geometry.density(torch.zeros(1, 3))
    frozen = copy.deepcopy(geometry).requires_grad_(False)
    before = frozen.means.clone()
    train(geometry, optimizer, range(3, 6))
    assert torch.equal(frozen.means, before)
    view(frozen)  # nothing to observe without gradients
    assert frozen._observed == []


def test_files_stay_out_of_the_state(tmp_path: Path):
    assert set(gaussians(num_points=4).state_dict()) == {*NAMES, "gradient_sum", "views_seen"}

"""The estimated surface loss: its value, what its gradient reaches, and what it needs."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from shared.surface_estimators import write_opaque_estimator
from shared.surface_scenes import FixedMesh, build, cube, renderer_of, views
from shared.tiny_runs import Recorder, plain

from scoredist3d.config import FieldError
from scoredist3d.config.validation import validate
from scoredist3d.procedural.surface_estimator import SurfaceEstimator, surface_difference
from scoredist3d.seeding import Rng
from scoredist3d.training.run import run_training


def rendered(size: int = 24):
    geometry, cameras = FixedMesh(cube(0.4)), views(0.0, 40.0, size=size)
    return geometry, replace(renderer_of(geometry)(cameras, step=0, needs={"normal"}), cameras=cameras)


def test_value_is_the_mean_difference_from_the_networks_estimate(tmp_path: Path) -> None:
    folder = write_opaque_estimator(tmp_path)
    geometry, render = rendered()
    loss = build("loss", "estimated-surface", estimator=folder, normal_weight=2.0, depth_weight=3.0)
    value = loss(render, geometry, 0, Rng())
    estimate = SurfaceEstimator.load(tmp_path)(render.rgb, render.background, render.cameras)
    maps = (render.normal, render.depth, render.opacity)
    expected = surface_difference(estimate, *maps, normal_weight=2.0, depth_weight=3.0).mean()
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-7)
    assert value > 0


def test_depths_alone_need_no_normals(tmp_path: Path) -> None:
    folder = write_opaque_estimator(tmp_path)
    geometry, render = rendered()
    both = build("loss", "estimated-surface", estimator=folder, depth_weight=3.0)
    depths = build("loss", "estimated-surface", estimator=folder, normal_weight=0.0, depth_weight=3.0)
    assert both.needs == {"normal"} and depths.needs == set()
    value = depths(replace(render, normal=None), geometry, 0, Rng())
    estimate = SurfaceEstimator.load(tmp_path)(render.rgb, render.background, render.cameras)
    maps = (render.normal, render.depth, render.opacity)
    expected = surface_difference(estimate, *maps, normal_weight=0.0, depth_weight=3.0).mean()
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-7)
    assert 0 < value < both(render, geometry, 0, Rng())


def test_the_gradient_reaches_the_shape_alone(tmp_path: Path) -> None:
    geometry, render = rendered()
    colors = render.rgb.detach().requires_grad_()
    opacity = render.opacity.detach().requires_grad_()
    render = replace(render, rgb=colors, opacity=opacity)
    build("loss", "estimated-surface", estimator=write_opaque_estimator(tmp_path))(
        render, geometry, 0, Rng()
    ).backward()
    assert geometry.vertices.grad.abs().sum() > 0
    assert colors.grad is None and opacity.grad is None


def test_the_packaged_network_finds_a_cube_where_it_is() -> None:
    """The depths of a cube under the light of the prior's images are less wrong than those of a cube that is moved."""
    geometry, render = rendered(64)
    normal = torch.nn.functional.normalize(render.normal, dim=-1)
    light = torch.nn.functional.normalize(torch.tensor([0.6, 0.45, 0.66]), dim=0)
    shade = 0.6 + 0.4 * (normal * light).sum(-1, keepdim=True).clamp_min(0.0)
    colors = torch.tensor([0.8, 0.2, 0.1]) * shade * render.opacity + render.background * (1.0 - render.opacity)
    render = replace(render, rgb=colors.detach())
    loss = build("loss", "estimated-surface", normal_weight=0.0)
    here = loss(render, geometry, 0, Rng())
    for shift in (-0.5, 0.5):
        assert loss(replace(render, depth=render.depth + shift), geometry, 0, Rng()) > here


def test_what_cannot_be_estimated_is_refused(tmp_path: Path) -> None:
    geometry, render = rendered()
    loss = build("loss", "estimated-surface", estimator=write_opaque_estimator(tmp_path))
    with pytest.raises(ValueError, match="needs RGB renders with their cameras"):
        loss(replace(render, cameras=None), geometry, 0, Rng())
    with pytest.raises(FieldError, match="contains no surface-estimator") as caught:
        build("loss", "estimated-surface", estimator=str(tmp_path / "empty"))
    assert caught.value.path == "estimator"


def test_a_run_optimizes_the_loss(tmp_path: Path) -> None:
    block = plain(tmp_path, trainer={"max_steps": 2}, test={"enabled": False})
    block["system"]["loss"] = {
        "estimated-surface": {"weight": 0.1, "estimator": write_opaque_estimator(tmp_path / "network")}
    }
    done = run_training(validate(block), devices="cpu", console=Recorder())
    assert "loss/estimated-surface" in (done.folder / "metrics.csv").read_text()

"""Space carving during text to 3D: when it happens, by which depths, for which scene, and what is refused."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from shared.carving_scenes import carving_block, estimated_views, some
from shared.method_cases import CountingPrior, method
from shared.tiny_runs import plain
from torch import Tensor

from scoredist3d import registry
from scoredist3d.cameras import Cameras
from scoredist3d.config import ConfigError
from scoredist3d.config.validation import parse_component, validate
from scoredist3d.meshes.space_carving import DepthEstimates
from scoredist3d.nn import ranks
from scoredist3d.seeding import Rng

RECIPE = Path(__file__).resolve().parents[2] / "configs" / "recipe" / "embedded-finish.yaml"
SIZE = 8  # of the images of the prior, and so of the targets


def make(folder: Path, *, batch: int = 4, fovy: tuple[float, float] = (40.0, 40.0), **changes: Any) -> Any:
    """A system whose eight cameras are all shown in 8 / ``batch`` steps."""
    prior = registry.build(parse_component("prior", {"type": "gaussian-mixture", "image_size": SIZE}))
    data = {"type": "random-camera", "batch_size": batch, "num_views": 8, "height": 16, "width": 16}
    cameras = registry.build(parse_component("data", data | {"fovy_range": list(fovy)}))
    block = parse_component("system", carving_block(folder, **changes))
    return registry.build(block, prior=prior, prompt="red blob", cameras=cameras, rng=Rng())


def shown(system: Any, steps: int) -> Cameras:
    """The cameras of the first steps, with the size of the targets."""
    return Cameras.cat([system.cameras.sample(step, Rng()) for step in range(steps)]).with_size(SIZE, SIZE)


def train(system: Any, *steps: int) -> None:
    """Steps without the update of an optimizer."""
    for step in steps:
        system.prepare_step(step, Rng())
        system.training_step(step, Rng())


def shape(system: Any, index: int = 0) -> Tensor:
    distances: Tensor = system.scenes[index].geometry.signed_distances().detach().clone()
    return distances


def carved_by(folder: Path, views: DepthEstimates, **changes: Any) -> Tensor:
    """Signed distances of a new system's scene after carving by the given views."""
    system = make(folder, **changes)
    assert system.scenes[0].carve(views) > 20
    return shape(system)


@pytest.mark.parametrize("geometry", ["dmtet", "flexicubes"])
def test_the_scene_is_carved_before_the_chosen_step_by_all_targets(
    geometry: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    changes = {"geometry": {"type": geometry, "resolution": 16, "shape_init_size": 0.7}}
    system = make(tmp_path, **changes)
    before = shape(system)
    train(system, 0, 1)
    assert torch.equal(shape(system), before)
    with caplog.at_level(logging.INFO):
        system.prepare_step(2, Rng())
    after = shape(system)
    count = int(((before < 0) & (after >= 0)).sum())
    assert count > 20 and f"space carving before step 2 removed {count:,} grid points" in caplog.text
    expected = carved_by(tmp_path, estimated_views(shown(system, 2)), **changes)
    torch.testing.assert_close(after, expected, rtol=0, atol=1e-5)
    train(system, 3)
    assert torch.equal(shape(system), after)


def test_only_targets_that_exist_carve(tmp_path: Path) -> None:
    """Before the first target there are no depths; with four of eight views, there is less evidence."""
    system = make(tmp_path, guidance={"carve_steps": [1, 2]})
    before = shape(system)
    for step in (1, 2):
        system.prepare_step(step, Rng())
    assert torch.equal(shape(system), before)
    train(system, 0)
    system.prepare_step(1, Rng())
    few = estimated_views(shown(system, 1))
    torch.testing.assert_close(shape(system), carved_by(tmp_path, few), rtol=0, atol=1e-5)


def test_a_scene_is_carved_by_its_own_targets(tmp_path: Path) -> None:
    system = make(tmp_path, batch=8, particles=2, guidance={"carve_steps": [1]})
    before = [shape(system, index) for index in range(2)]
    train(system, 0)
    (drawn,) = system._draw(0, Rng())
    system.prepare_step(1, Rng())
    changed = [not torch.equal(shape(system, index), before[index]) for index in range(2)]
    assert changed == [index == drawn for index in range(2)]
    found = [system.guidance.depth_estimates(index) for index in range(3)]
    assert [estimate is None for estimate in found] == [index != drawn for index in range(3)]


def test_the_depths_are_those_of_the_estimator_in_the_cameras_of_the_targets(tmp_path: Path) -> None:
    """The cameras have different fields of view."""
    system = make(tmp_path, fovy=(25.0, 60.0))
    assert system.guidance.depth_estimates(0) is None
    train(system, 0, 1)
    found, cameras = system.guidance.depth_estimates(0), shown(system, 2)
    assert len(cameras.fovy.unique()) == 8
    for name in ("c2w", "fovy", "azimuth", "elevation", "distance"):
        torch.testing.assert_close(getattr(found.cameras, name), getattr(cameras, name), rtol=1e-6, atol=1e-6)
    assert (found.cameras.height, found.cameras.width) == (SIZE, SIZE)
    expected = estimated_views(cameras)
    for name in ("depth", "error", "opacity"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=0, atol=1e-5)


def test_methods_without_depths_do_not_carve(tmp_path: Path) -> None:
    sds = method("sds", CountingPrior())
    plain_hifa = method("hifa", CountingPrior(), latent_weight=0, update_every=2)
    for guidance in (sds, plain_hifa, method("hifa", CountingPrior())):
        assert not guidance.config.carves and not any(guidance.carves_at(step) for step in range(9))
        assert guidance.depth_estimates(0) is None
    carving = make(tmp_path, guidance={"carve_steps": [2, 5]}).guidance
    assert carving.config.carves and [step for step in range(9) if carving.carves_at(step)] == [2, 5]


def test_the_evidence_of_all_ranks_is_added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another rank adds its evidence in the sum; it knows the other views, or all of them."""
    whole = estimated_views(shown(make(tmp_path), 2))
    expected = carved_by(tmp_path, whole)
    halves = some(whole, slice(0, 4)), some(whole, slice(4, 8))
    assert not torch.allclose(carved_by(tmp_path, halves[0]), expected, rtol=0, atol=1e-3)
    for mine, others in (halves, halves[::-1], (None, whole), (whole, None)):
        scene = make(tmp_path).scenes[0]
        other = scene.geometry.carving_evidence(others)
        monkeypatch.setattr(ranks.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(ranks.distributed, "all_reduce", lambda tensor, other=other: tensor.add_(other))
        scene.carve(mine)
        monkeypatch.undo()
        torch.testing.assert_close(scene.geometry.signed_distances(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["implicit-volume", "implicit-sdf", "textured-mesh", "gaussians"])
def test_a_geometry_without_a_grid_is_refused(kind: str, tmp_path: Path) -> None:
    renderer = {"implicit-volume": "volume", "implicit-sdf": "neus-volume", "gaussians": "gaussian-splatting"}
    config = plain(tmp_path)
    parts = {"geometry": {"type": kind}, "renderer": {"type": renderer.get(kind, "mesh-rasterizer")}}
    config["system"] = carving_block(tmp_path, **parts)
    with pytest.raises(
        ConfigError, match=rf"system\.guidance\.carve_steps: {kind} has no signed distances on a grid; set it to \[\]"
    ):
        validate(config)
    config["system"]["guidance"] |= {"carve_steps": [], "depth_weight": 0}
    validate(config)


@pytest.mark.parametrize(
    ("guidance", "geometry", "message"),
    [
        ({"depth_weight": 0}, {}, r"guidance\.carve_steps: needs estimated depths; set normal_weight or depth_weight"),
        ({"update_every": 1}, {}, r"guidance\.update_every: normals and depths are estimated from kept targets"),
        ({"carve_steps": [4, 0]}, {}, r"guidance\.carve_steps.*1"),
        ({"carve_steps": "soon"}, {}, r"guidance\.carve_steps"),
        ({}, {"fix_geometry": True}, r"guidance\.carve_steps: the surface is frozen; .*geometry\.fix_geometry"),
    ],
)
def test_what_cannot_carve_is_refused(
    guidance: dict[str, Any], geometry: dict[str, Any], message: str, tmp_path: Path
) -> None:
    config = plain(tmp_path)
    config["system"] = carving_block(tmp_path, guidance=guidance)
    config["system"]["geometry"] |= geometry
    with pytest.raises(ConfigError, match=message):
        validate(config)


def test_normals_alone_give_depths_as_well(tmp_path: Path) -> None:
    system = make(tmp_path, guidance={"depth_weight": 0, "normal_weight": 0.1})
    before = shape(system)
    train(system, 0, 1, 2)
    assert ((before < 0) & (shape(system) >= 0)).sum() > 20


def test_the_recipe_carves_after_each_view_has_a_target() -> None:
    recipe = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))
    guidance, data = recipe["system"]["guidance"], recipe["data"]
    for step in guidance["carve_steps"]:
        steps_of_round = (step - 1) % guidance["update_every"] + 1
        assert steps_of_round * data["batch_size"] >= data["num_views"]

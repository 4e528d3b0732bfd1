"""Systems without Lightning: wiring, logging, parameter groups, canvas."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from scoredist3d import registry
from scoredist3d.config import ConfigError, Schedule
from scoredist3d.config.experiment import PreviewConfig, TurntableConfig
from scoredist3d.config.optimizer import OptimizerConfig
from scoredist3d.config.validation import parse_component
from scoredist3d.guidance.sds import ScoreDistillationSampling
from scoredist3d.seeding import Rng
from scoredist3d.systems.base import System
from scoredist3d.training.optimizer import build_optimizer, learning_rate, set_learning_rates
from scoredist3d.visualization.previews import scene_rows
from scoredist3d.visualization.turntable import turntable

VOLUME = {
    "type": "text-to-3d",
    "geometry": {"grid": {"num_levels": 2, "log2_hashmap_size": 6}, "network": {"hidden_width": 8}},
    "renderer": {"num_samples": 12, "occupancy": {"resolution": 8}},
    "background": {"type": "environment"},
}
CANVAS = {"type": "text-to-2d", "geometry": {"particles": 3}, "guidance": {"guidance_scale": 1.0}}


def make(block: dict[str, Any], *, prompt: str = "red left blob", seed: int = 0) -> System:
    cameras = registry.build(
        parse_component("data", {"type": "random-camera", "batch_size": 2, "height": 8, "width": 8})
    )
    return registry.build(
        parse_component("system", block),
        prior=registry.build(parse_component("prior", {"type": "gaussian-mixture", "image_size": 8})),
        prompt=prompt,
        cameras=cameras,
        rng=Rng(seed),
    )


def test_every_parameter_of_the_scene_gets_a_gradient_and_none_belongs_to_the_prior() -> None:
    system = make(VOLUME)
    system.prepare_step(0, Rng())
    result = system.training_step(0, Rng())
    result.loss.backward()
    names = [group["name"] for group in system.parameter_groups()]
    assert names == ["geometry.encoding", "geometry.network", "background"]
    grouped = {id(p) for group in system.parameter_groups() for p in group["params"]}
    assert grouped == {id(p) for p in system.parameters()}
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in system.parameters())
    assert not any("prior" in name or "_means" in name for name in system.state_dict())
    assert any("occupied" in name for name in system.state_dict())


def test_terms_are_logged_raw_and_weighted_by_their_schedules() -> None:
    weight = {"from": 0.0, "to": 4.0, "start": 0, "end": 2}
    system = make(VOLUME | {"loss": {"sparsity": weight, "opaque": 0.5}, "guidance": {"weight": 0.25}})
    for step, factor in ((0, 0.0), (1, 2.0), (2, 4.0)):
        result = system.training_step(step, Rng())
        logged = {key: float(value) for key, value in result.scalars.items()}
        assert ("loss/sparsity" in logged) == (factor > 0.0)
        if factor > 0.0:
            assert logged["weighted/sparsity"] == pytest.approx(factor * logged["loss/sparsity"], rel=1e-6)
        assert logged["weighted/guidance"] == pytest.approx(0.25 * logged["loss/guidance"], rel=1e-6)
        total = sum(value for key, value in logged.items() if key.startswith("weighted/"))
        assert float(result.loss.detach()) == pytest.approx(total, rel=1e-5)


def test_ranks_see_other_views_but_keep_the_same_occupancy() -> None:
    first, second = make(VOLUME), make(VOLUME)
    losses = []
    for rank, system in enumerate((first, second)):
        system.prepare_step(0, Rng(0, rank).shared())
        losses.append(float(system.training_step(0, Rng(0, rank)).loss.detach()))
    assert losses[0] != losses[1]
    states = first.state_dict(), second.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_same_seed_same_scene_other_seed_other_scene() -> None:
    def table(seed: int) -> torch.Tensor:
        return make(VOLUME, seed=seed).state_dict()["scenes.0.geometry.table"]

    assert torch.equal(table(3), table(3))
    assert not torch.equal(table(3), table(4))


def test_preview_and_frames_leave_the_state_alone() -> None:
    system = make(VOLUME)
    system.prepare_step(0, Rng())
    before = {name: value.clone() for name, value in system.state_dict().items()}
    rows = scene_rows(system, PreviewConfig(azimuths=[0.0, 120.0, 240.0], size=8))
    assert {name: tuple(row.shape) for name, row in rows.items()} == dict.fromkeys(
        ("rgb", "opacity", "depth"), (3, 8, 8, 3)
    )
    assert all(bool(((row >= 0) & (row <= 1)).all()) for row in rows.values())
    frames = list(turntable(system, TurntableConfig(frames=2, height=8, width=10)).frames)
    assert [tuple(frame.shape) for frame in frames] == [(8, 10, 3)] * 2
    assert all(torch.equal(before[name], value) for name, value in system.state_dict().items())
    assert not any(p.grad is not None for p in system.parameters())


def test_export_field_is_the_geometry_and_the_unlit_colour() -> None:
    system: Any = make(VOLUME)
    (field,) = system.shapes()
    points = 0.5 * torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    assert field.radius == 1.0
    torch.testing.assert_close(field.density(points), system.geometry.density(points).detach())
    colors = field.channels(points).base_color
    assert colors.shape == (20, 3) and bool(((colors >= 0) & (colors <= 1)).all()) and not colors.requires_grad


class Learning(ScoreDistillationSampling):
    """A guidance with a trainable scalar and its own optimizer, as in variational methods."""

    @dataclass
    class Config(ScoreDistillationSampling.Config):
        pass

    def __init__(self, config: Any, *, prior: Any, rng: Any = None) -> None:
        super().__init__(config, prior=prior)
        self.phi = nn.Parameter(torch.zeros(()))
        self.own = torch.optim.Adam([self.phi], lr=0.1)

    def update(self, z: Any, conditions: Any, step: Any) -> dict[str, torch.Tensor]:
        with torch.enable_grad():
            loss = (self.phi - 1.0) ** 2
            self.own.zero_grad()
            loss.backward()
        self.own.step()
        return {"phi_loss": loss.detach()}

    def get_extra_state(self) -> dict[str, Any]:
        return self.own.state_dict()

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.own.load_state_dict(state)


def test_state_of_a_learning_guidance_is_saved_but_not_optimised(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = registry.lookup("guidance", "sds")
    monkeypatch.setitem(
        registry._entries["guidance"], "sds", registry.Entry("guidance", "sds", Learning, entry.summary)
    )
    system = make(CANVAS)
    for step in range(2):
        assert "guidance/phi_loss" in system.training_step(step, Rng()).scalars
    assert [group["name"] for group in system.parameter_groups()] == ["canvas"]
    state = system.state_dict()
    assert float(state["guidance.phi"]) > 0
    other = make(CANVAS)
    other.load_state_dict(state)
    assert other.guidance.own.state_dict()["state"][0]["step"] == 2


@pytest.mark.parametrize("parametrisation", ["pixels", "latents"])
def test_canvas_reaches_the_mode_that_the_prompt_names(parametrisation: str) -> None:
    block = CANVAS | {"geometry": {"particles": 2, "parametrisation": parametrisation, "initial_std": 0.5}}
    system: Any = make(block, prompt="red left blob")
    optimizer = build_optimizer(OptimizerConfig(lr=0.1, eps=1e-8), system.parameter_groups())
    for step in range(120):
        optimizer.zero_grad()
        system.training_step(step, Rng()).loss.backward()
        set_learning_rates(optimizer, OptimizerConfig(lr=Schedule.parse({"from": 0.1, "to": 0.005, "end": 120})), step)
        optimizer.step()
    images = system.images()
    (mode,) = [i for i, words in enumerate(system.prior._labels) if {"red", "left"} <= words]
    target = system.prior.decode(system.prior._means[mode : mode + 1].float()).clamp(0, 1)
    # The mixture's deviation is 0.05 in [0, 1]; the next mode is another colour or side, about 0.1 away on average.
    assert float((images - target).abs().mean()) < 0.03


def test_particles_are_drawn_without_replacement_and_others_stay() -> None:
    system: Any = make(CANVAS | {"particles_per_step": 2})
    drawn = set()
    for step in range(6):
        system.zero_grad()
        system.training_step(step, Rng()).loss.backward()
        moved = (system.canvas.values.grad.flatten(1).abs().sum(1) > 0).nonzero()[:, 0].tolist()
        assert len(moved) == 2
        drawn.update(moved)
    assert drawn == {0, 1, 2}


def test_representation_and_system_must_fit() -> None:
    with pytest.raises(ConfigError, match=r"use system\.type=text-to-2d"):
        parse_component("system", {"type": "text-to-3d", "geometry": {"type": "image-canvas"}})
    with pytest.raises(ConfigError, match="optimizes an image-canvas, not implicit-volume"):
        parse_component("system", {"type": "text-to-2d", "geometry": {"type": "implicit-volume"}})
    with pytest.raises(ConfigError, match=r"exceeds geometry\.particles"):
        parse_component("system", {"type": "text-to-2d", "geometry": {"particles": 2}, "particles_per_step": 3})


def test_learning_rates_follow_the_longest_matching_name() -> None:
    config = OptimizerConfig(
        lr=Schedule.constant(1.0),
        lr_groups={"geometry": Schedule.constant(0.1), "geometry.encoding": Schedule.parse([0, 0.5, 0.0, 10])},
    )
    params = {name: nn.Parameter(torch.zeros(1)) for name in ("geometry.encoding", "geometry.network", "background")}
    optimizer = build_optimizer(config, [{"name": name, "params": [p]} for name, p in params.items()])
    set_learning_rates(optimizer, config, 5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.1, 1.0]
    assert learning_rate(config, "geometryx")(0) == 1.0


def test_unknown_group_and_nothing_trainable_are_named() -> None:
    groups = [{"name": "geometry.encoding", "params": [nn.Parameter(torch.zeros(1))]}]
    with pytest.raises(
        ValueError, match=r"lr_groups\.geometri: no such parameter group.*Groups are geometry\.encoding"
    ):
        build_optimizer(OptimizerConfig(lr_groups={"geometri": Schedule.constant(1.0)}), groups)
    with pytest.raises(ValueError, match="nothing to optimize"):
        build_optimizer(OptimizerConfig(), [{"name": "a", "params": []}])
    with pytest.raises(ConfigError, match="no effect with name=adam"):
        parse_component("system", {"type": "text-to-2d", "optimizer": {"weight_decay": 0.1}})

"""Text-to-3d with several scenes, initialization from another run, and editing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from scoredist3d import registry
from scoredist3d.config import ConfigError
from scoredist3d.config.experiment import PreviewConfig, TurntableConfig
from scoredist3d.config.validation import parse_component
from scoredist3d.guidance import Score, StepContext
from scoredist3d.guidance.sds import ScoreDistillationSampling
from scoredist3d.seeding import Rng
from scoredist3d.visualization.previews import scene_rows
from scoredist3d.visualization.turntable import turntable

VOLUME: dict[str, Any] = {
    "type": "text-to-3d",
    "geometry": {
        "grid": {"num_levels": 3, "log2_hashmap_size": 6, "coarse_to_fine": {"start_level": 1, "every": 2}},
        "network": {"hidden_width": 8},
    },
    "renderer": {"num_samples": 12, "occupancy": {"resolution": 8}},
    "background": {"type": "environment"},
    "loss": {"sparsity": 1.0},
}


def make(block: dict[str, Any], seed: int = 0) -> Any:
    data = {"type": "random-camera", "batch_size": 2, "height": 8, "width": 8}
    return registry.build(
        parse_component("system", block),
        prior=registry.build(parse_component("prior", {"type": "gaussian-mixture", "image_size": 8})),
        prompt="red left blob",
        cameras=registry.build(parse_component("data", data)),
        rng=Rng(seed),
    )


class Edit(ScoreDistillationSampling):
    """Records its inputs; its gradient points towards the source."""

    needs_source = True

    @dataclass
    class Config(ScoreDistillationSampling.Config):
        pass

    def __init__(self, config: Any, *, prior: Any, rng: Any = None) -> None:
        super().__init__(config, prior=prior)
        self.seen: list[tuple[torch.Tensor, StepContext]] = []

    def score_gradient(self, z: Any, conditions: Any, ctx: StepContext) -> Score:
        assert ctx.source is not None
        self.seen.append((z, ctx))
        return Score(z - ctx.source + 1.0)


@pytest.fixture
def editing(monkeypatch: pytest.MonkeyPatch) -> None:
    registry.names("guidance")  # everything else is registered first
    monkeypatch.setitem(registry._entries, "guidance", dict(registry._entries["guidance"]))
    registry.register("guidance", "edit", summary="For tests.")(Edit)


def test_scenes_differ_and_only_drawn_ones_learn() -> None:
    system = make(VOLUME | {"particles": 3})
    tables = [scene.geometry.table.detach().clone() for scene in system.scenes]
    assert torch.equal(tables[0], make(VOLUME).scenes[0].geometry.table)
    assert not torch.equal(tables[0], tables[1]) and not torch.equal(tables[1], tables[2])
    assert not system.steps_everything
    drawn = set()
    for step in range(8):
        system.prepare_step(step, Rng())
        system.zero_grad(set_to_none=True)
        result = system.training_step(step, Rng())
        result.loss.backward()
        learning = [i for i, scene in enumerate(system.scenes) if scene.geometry.table.grad is not None]
        assert len(learning) == 1
        drawn.update(learning)
    assert drawn == {0, 1, 2}
    assert system._draw(3, Rng(0, 0).shared()) == system._draw(3, Rng(0, 1).shared())


def test_scenes_drawn_together_share_the_views_and_the_mean_of_their_losses() -> None:
    both, alone = make(VOLUME | {"particles": 2, "particles_per_step": 2}), make(VOLUME)
    told: list[StepContext] = []
    original = both.guidance.score_gradient
    both.guidance.score_gradient = lambda z, b, step: told.append(step) or original(z, b, step)
    for system in (both, alone):
        system.prepare_step(0, Rng())
    result, single = both.training_step(0, Rng()), alone.training_step(0, Rng())
    assert told[0].particles == (0, 0, 1, 1)
    assert told[0].rgb is not None and told[0].rgb.shape[0] == 4
    result.loss.backward()
    assert all(p.grad is not None for p in both.parameters())
    per_scene = [
        both.objective.losses["sparsity"](
            both.scenes[i](both.cameras.sample(0, Rng()), step=0, rng=Rng()), both.scenes[i].geometry, 0, Rng()
        )
        for i in range(2)
    ]
    assert float(per_scene[0].detach()) == pytest.approx(float(single.scalars["loss/sparsity"]), rel=1e-5)
    mean = sum(float(value.detach()) for value in per_scene) / 2
    assert float(result.scalars["loss/sparsity"]) == pytest.approx(mean, rel=1e-5)


def test_all_scenes_are_shown_and_exported() -> None:
    system = make(VOLUME | {"particles": 2})
    rows = scene_rows(system, PreviewConfig(azimuths=[0.0, 90.0], size=8))
    assert list(rows) == ["rgb", "opacity", "depth", "rgb 2"]
    assert {tuple(row.shape) for row in rows.values()} == {(2, 8, 8, 3)}
    frames = list(turntable(system, TurntableConfig(frames=2, height=8, width=10)).frames)
    assert [tuple(frame.shape) for frame in frames] == [(8, 20, 3)] * 2
    points = torch.zeros(1, 3)
    densities = [float(field.density(points)) for field in system.shapes()]
    assert len(densities) == 2 and densities[0] != densities[1]


def test_starting_from_a_run_takes_its_scene_and_its_step() -> None:
    done, fresh = make(VOLUME, seed=1), make(VOLUME | {"particles": 2})
    done.prepare_step(5, Rng())
    fresh.init_from(done.state_dict())
    for scene in fresh.scenes:
        own, theirs = scene.state_dict(), done.scenes[0].state_dict()
        assert own.keys() == theirs.keys()
        assert all(torch.equal(own[name], theirs[name]) for name in own if name != "steps")
        assert scene.step == 5 and scene.geometry.num_active_levels == 3
    fresh.prepare_step(2, Rng())
    assert fresh.scenes[0].step == 7 and fresh.scenes[0].geometry.num_active_levels == 3
    again = make(VOLUME | {"particles": 2})
    again.load_state_dict(fresh.state_dict())
    again.prepare_step(3, Rng())
    assert again.scenes[0].step == 8
    other = make(VOLUME | {"geometry": {"grid": {"num_levels": 2, "log2_hashmap_size": 6}}})
    with pytest.raises(ValueError, match=r"the scene of that run has another representation"):
        other.init_from(done.state_dict())


def test_a_canvas_cannot_start_from_a_run() -> None:
    with pytest.raises(ValueError, match="cannot start from another run"):
        make({"type": "text-to-2d"}).init_from({})


def test_an_edit_sees_the_scene_it_started_from(editing: None) -> None:
    with pytest.raises(ConfigError, match="init_from: edit edits a scene; give the run folder of that scene"):
        make(VOLUME | {"guidance": {"type": "edit"}})
    done = make(VOLUME, seed=1)
    done.prepare_step(9, Rng())
    whole = {"num_samples": 12, "occupancy": {"resolution": 8}, "min_transmittance": 0}
    system = make(VOLUME | {"guidance": {"type": "edit"}, "init_from": "run", "renderer": whole})
    system.init_from(done.state_dict())
    optimizer = torch.optim.SGD([p for p in system.parameters() if p.requires_grad], lr=1.0)
    grouped = {id(p) for group in system.parameter_groups() for p in group["params"]}
    assert grouped == {id(p) for p in system.parameters() if p.requires_grad}
    for step in range(2):
        optimizer.zero_grad()
        system.training_step(step, Rng()).loss.backward()
        optimizer.step()
    (z, first), (later, second) = system.guidance.seen
    assert first.source is not None and second.source is not None
    # No update has been made yet; views without gradients are rendered in chunks, which changes the rounding.
    torch.testing.assert_close(z, first.source, rtol=0, atol=1e-5)
    assert float((later - second.source).abs().max()) > 1e-3
    source, started = system.source.state_dict(), done.scenes[0].state_dict()
    assert all(torch.equal(source[name], started[name]) for name in source if name != "steps")
    assert system.source.step == 9 and any(name.startswith("source.") for name in system.state_dict())

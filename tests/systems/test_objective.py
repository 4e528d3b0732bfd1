"""The objective shared by distillation and reconstruction: steps, terms, and hooks around the backward pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from scoredist3d import registry
from scoredist3d.cameras import Cameras, orbit
from scoredist3d.config import ComponentConfig
from scoredist3d.config.validation import parse_component
from scoredist3d.losses import Loss
from scoredist3d.renderers.base import Render
from scoredist3d.seeding import Rng
from scoredist3d.systems.base import TrainingStep
from scoredist3d.systems.clock import Clock
from scoredist3d.systems.objective import Objective

CAMERAS = orbit(*(torch.full((1,), value) for value in (0.0, 0.0, 3.0, 40.0)), 2, 2)


@dataclass
class FlatScene:
    """A scene of one value that records the calls of the objective."""

    value: torch.Tensor
    auxiliary: Mapping[str, torch.Tensor] = field(default_factory=dict)
    calls: list[tuple[str, Any]] = field(default_factory=list)
    geometry: Any = None

    def __call__(self, cameras: Cameras, *, step: int, rng: Rng, needs: Set[str]) -> Render:
        self.calls.append(("render", (step, set(needs))))
        image = self.value.expand(1, 2, 2, 1)
        return Render(image.expand(-1, -1, -1, 3), image, image, image, normal=image, auxiliary_losses=self.auxiliary)

    def pre_backward(self, render: Render) -> None:
        self.calls.append(("pre_backward", render))


class MeanOpacity(Loss):
    """The mean opacity; records its steps."""

    needs = frozenset({"normal"})
    steps: list[int] = []  # noqa: RUF012

    @dataclass
    class Config(Loss.Config):
        pass

    def __call__(self, render: Render, geometry: Any, step: int, rng: Rng) -> torch.Tensor:
        self.steps.append(step)
        return render.opacity.mean()


@pytest.fixture
def blocks(monkeypatch: pytest.MonkeyPatch) -> dict[str, ComponentConfig]:
    monkeypatch.setitem(registry._entries, "loss", dict(registry._entries["loss"]))
    registry.register("loss", "mean-opacity", summary="Mean opacity.")(MeanOpacity)
    monkeypatch.setattr(MeanOpacity, "steps", [])
    weights: dict[str, Any] = {"always": 2.0, "later": {"from": 0.0, "to": 1.0, "end": 5, "shape": "step"}}
    return {
        name: parse_component("loss", {"type": "mean-opacity", "weight": weight}) for name, weight in weights.items()
    }


def ten(renders: Sequence[Render], clock: Clock, rng: Rng) -> TrainingStep:
    return TrainingStep(
        10.0 * torch.stack([render.rgb.mean() for render in renders]).sum(), {"data": float(len(renders))}
    )


def test_terms_are_averaged_over_scenes_weighted_and_logged(blocks: dict[str, ComponentConfig]) -> None:
    scenes: list[Any] = [FlatScene(torch.tensor(value), {"inner": torch.tensor(4 * value)}) for value in (0.25, 0.75)]
    result = Objective(blocks)(scenes, CAMERAS, ten, Clock(0), Rng())
    assert float(result.loss) == 10.0 * 1.0 + 2.0 + 2.0 * 0.5
    logged = {name: float(value) for name, value in result.scalars.items()}
    expected = {"data": 2.0, "loss/inner": 2.0, "loss/always": 0.5, "weighted/always": 1.0, "opacity": 0.5}
    assert logged == expected and list(logged) == list(expected), "a term with zero weight is not logged"


def test_renders_use_the_scene_step_and_losses_the_run_step(blocks: dict[str, ComponentConfig]) -> None:
    scene: Any = FlatScene(torch.tensor(0.5))
    clocks: list[Clock] = []
    Objective(blocks)(
        [scene],
        CAMERAS,
        lambda renders, clock, rng: clocks.append(clock) or ten(renders, clock, rng),
        Clock(5, 100),
        Rng(),
    )
    assert scene.calls[0] == ("render", (105, {"normal"}))
    assert MeanOpacity.steps == [5, 5] and clocks == [Clock(5, 100)]


def test_maps_of_inactive_terms_are_not_rendered(blocks: dict[str, ComponentConfig]) -> None:
    scene: Any = FlatScene(torch.tensor(0.5))
    Objective({"later": blocks["later"]})([scene], CAMERAS, ten, Clock(0), Rng())
    assert scene.calls[0] == ("render", (0, set()))


def test_maps_of_the_data_term_are_rendered_in_addition(blocks: dict[str, ComponentConfig]) -> None:
    for names, expected in ((["later"], {"depth_variance"}), (["always", "later"], {"depth_variance", "normal"})):
        scene: Any = FlatScene(torch.tensor(0.5))
        objective = Objective({name: blocks[name] for name in names})
        objective([scene], CAMERAS, ten, Clock(0), Rng(), needs={"depth_variance"})
        assert scene.calls[0] == ("render", (0, expected))


def test_every_render_is_announced_once_before_the_data_term() -> None:
    scenes: list[Any] = [FlatScene(torch.tensor(0.5)) for _ in range(2)]
    seen: list[list[str]] = []

    def data_term(renders: Sequence[Render], clock: Clock, rng: Rng) -> TrainingStep:
        seen.extend([name for name, _ in scene.calls] for scene in scenes)
        assert [scene.calls[1][1] for scene in scenes] == list(renders)
        return ten(renders, clock, rng)

    Objective({})(scenes, CAMERAS, data_term, Clock(0), Rng())
    assert seen == [["render", "pre_backward"]] * 2


def test_a_clock_counts_the_steps_of_the_earlier_run() -> None:
    assert Clock().scene_step == 0 and Clock(3).scene_step == 3
    later = Clock(0, offset=7).at(2)
    assert (later.run_step, later.offset, later.scene_step) == (2, 7, 9)
    assert later.at(0) == Clock(0, 7)

"""Comparison of methods: each computes what it computes alone from the same canvas, and previews are labelled."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from scoredist3d import cli, registry
from scoredist3d.config import ConfigError
from scoredist3d.config.experiment import PreviewConfig, TrainerConfig
from scoredist3d.config.loader import load
from scoredist3d.config.validation import load_experiment, parse_component
from scoredist3d.seeding import Rng
from scoredist3d.systems.base import System
from scoredist3d.training.folder import RunFolder
from scoredist3d.training.lightning_module import TrainingModule
from scoredist3d.training.optimizer import build_optimizer, set_learning_rates
from scoredist3d.training.outputs import save_preview
from scoredist3d.visualization.previews import method_rows

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted(file for file in (ROOT / "configs" / "text-to-2d").glob("*.yaml") if file.stem != "compare")
COMPARE = ROOT / "configs" / "text-to-2d" / "compare.yaml"
CANVAS = {"type": "image-canvas", "particles": 3}
LOW = {
    "type": "text-to-2d",
    "geometry": CANVAS,
    "guidance": {"type": "sds", "guidance_scale": 1.0},
    "optimizer": {"lr": {"from": 0.1, "to": 0.01, "end": 4}, "eps": 1e-8},
}
HIGH = {
    "type": "text-to-2d",
    "geometry": CANVAS,
    "guidance": {"type": "sds", "guidance_scale": 8.0, "weighting": "uniform"},
    "optimizer": {"lr": 0.02, "betas": [0.5, 0.9], "eps": 1e-3},
}
PLAIN = HIGH | {"optimizer": {"name": "sgd", "lr": 0.3}}
BOTH = {"type": "comparison", "methods": {"low": LOW, "high scale": HIGH}, "geometry": CANVAS}


def make(block: dict[str, Any], seed: int = 0) -> System:
    return registry.build(
        parse_component("system", block),
        prior=registry.build(parse_component("prior", {"type": "gaussian-mixture", "image_size": 8})),
        prompt="red left blob",
        rng=Rng(seed),
    )


def trained(system: System, steps: int = 4) -> System:
    config = system.config.optimizer
    optimizer = build_optimizer(config, system.parameter_groups())
    for step in range(steps):
        set_learning_rates(optimizer, config, step)
        optimizer.zero_grad()
        system.prepare_step(step, Rng())
        system.training_step(step, Rng()).loss.backward()
        optimizer.step()
    return system


def test_each_method_does_exactly_what_it_does_alone() -> None:
    blocks = {"low": LOW, "high scale": HIGH, "plain": PLAIN}
    together: Any = trained(make(BOTH | {"methods": blocks}))
    for label, block in blocks.items():
        alone: Any = trained(make(block))
        assert torch.equal(together.methods[label].canvas.values, alone.canvas.values)


def test_all_methods_start_from_the_common_canvas() -> None:
    other_start = HIGH | {"geometry": {"type": "image-canvas", "particles": 2, "initial_std": 0.1}}
    system: Any = make(BOTH | {"methods": {"low": LOW, "high": other_start}})
    first, second = (method.canvas.values for method in system.methods.values())
    assert first is not second and torch.equal(first, second)


def test_a_method_that_edits_keeps_its_own_start() -> None:
    edit = {
        "type": "text-to-2d",
        "geometry": {"type": "image-canvas", "particles": 1, "init_prompt": "blue right blob", "init_steps": 3},
        "guidance": {"type": "dds", "source_prompt": "blue right blob"},
    }
    system: Any = make(BOTH | {"methods": {"low": LOW, "edit": edit}})
    assert [len(method.canvas.values) for method in system.methods.values()] == [3, 1]
    assert method_rows(trained(system), 8)["edit"].shape == (3, 8, 8, 3)


def test_a_resumed_run_goes_on_as_the_uninterrupted_one() -> None:
    block = BOTH | {"methods": {"low": LOW, "plain": PLAIN}}
    config, states = make(block).config.optimizer, []
    for stop in (None, 2):
        system = make(block)
        optimizer = build_optimizer(config, system.parameter_groups())
        for step in range(4):
            if step == stop:
                weights, state = copy.deepcopy(system.state_dict()), copy.deepcopy(optimizer.state_dict())
                system = make(block, seed=1)
                system.load_state_dict(weights)
                optimizer = build_optimizer(config, system.parameter_groups())
                optimizer.load_state_dict(state)
            set_learning_rates(optimizer, config, step)
            optimizer.zero_grad()
            system.training_step(step, Rng()).loss.backward()
            optimizer.step()
        states.append(system.state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_only_chooses_and_orders() -> None:
    system: Any = make(BOTH | {"only": ["high scale"]})
    assert list(system.methods) == ["high scale"]
    system = make(BOTH | {"only": ["high scale", "low"]})
    assert [group["name"] for group in system.parameter_groups()] == ["high scale.canvas", "low.canvas"]


def test_learning_rates_of_the_comparison_itself_win() -> None:
    system: Any = make(BOTH | {"optimizer": {"lr_groups": {"low.canvas": 0.5}}})
    optimizer = build_optimizer(system.config.optimizer, system.parameter_groups())
    set_learning_rates(optimizer, system.config.optimizer, 0)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.02]
    assert [group["eps"] for group in optimizer.param_groups] == [1e-8, 1e-3]


def test_values_are_logged_by_method_and_the_losses_add_up() -> None:
    result = make(BOTH).training_step(2, Rng())
    logged = {key: float(value) for key, value in result.scalars.items()}
    assert {"loss/low", "loss/high scale", "weighted/low", "low/t", "high scale/t", "low/gradient_rms"} <= logged.keys()
    assert logged["low/t"] == logged["high scale/t"]
    assert float(result.loss.detach()) == pytest.approx(logged["weighted/low"] + logged["weighted/high scale"])


def test_what_a_method_trains_itself_is_left_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    system: Any = make(BOTH)
    system.methods["low"].guidance.phi = torch.nn.Parameter(torch.zeros(2))
    module = TrainingModule(system, TrainerConfig(), Rng())
    assert module._ddp_params_and_buffers_to_ignore == ["system.systems.0.guidance.phi"]
    assert [name for name, _ in module._optimized()] == [f"systems.{index}.canvas.values" for index in (0, 1)]
    assert "systems.0.guidance.phi" in system.state_dict()


def test_sheet_has_one_labelled_row_per_method(tmp_path: Path) -> None:
    system = make(BOTH | {"methods": {"low": LOW, "few": HIGH}})
    few: Any = system.methods["few"]  # type: ignore[index]
    few.canvas.values = torch.nn.Parameter(few.canvas.values[:1].detach())
    rows = method_rows(system, 20)
    assert {label: tuple(images.shape) for label, images in rows.items()} == dict.fromkeys(
        ("low", "few"), (3, 20, 20, 3)
    )
    assert bool((rows["few"][1:] == 1.0).all()) and not bool((rows["few"][0] == 1.0).all())
    with Image.open(save_preview(system, PreviewConfig(size=20), RunFolder(tmp_path), 7)) as sheet:
        assert sheet.size == (3 * 20 + 2 * 2, 2 * (20 + 14) + 2)
        darkest = [min(sheet.crop((0, top, 20, top + 14)).convert("L").tobytes()) for top in (20, 20 + 36)]
    assert max(darkest) < 128, "ink under the first image of each row"


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (BOTH | {"only": ["lov"]}, "only: there is no method 'lov'. Did you mean 'low'"),
        ({"methods": {"scene": {"type": "text-to-3d"}}}, "methods.scene.type: a comparison takes text-to-2d"),
        ({"methods": {"low": LOW | {"guidance": {"typo": 1}}}}, "system.methods.low.guidance.typo: unknown key"),
    ],
)
def test_mistakes_are_named(block: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_component("system", {"type": "comparison"} | block)
    assert message in str(caught.value)


def test_nothing_to_compare_is_refused() -> None:
    with pytest.raises(ValueError, match=r"system\.methods is empty"):
        make({"type": "comparison"})


def test_a_block_includes_part_of_another_file(tmp_path: Path) -> None:
    base, top = tmp_path / "base.yaml", tmp_path / "top.yaml"
    base.write_text('system: {a: {high: 3, low: "${system.a.high}", steps: "${trainer.max_steps}"}, other: 1}\n')
    top.write_text('copies: {one: {include: "base.yaml#system.a", high: 5}}\ntrainer: {max_steps: 7}\n')
    assert load([top]) == {"copies": {"one": {"high": 5, "low": 5, "steps": 7}}, "trainer": {"max_steps": 7}}
    for wrong in ("base.yaml", "base.yaml#system.b", "base.yaml#system.other", "gone.yaml#system"):
        top.write_text(f'copies: {{one: {{include: "{wrong}"}}}}\n')
        with pytest.raises(ConfigError, match=r"copies\.one\.include must |gone\.yaml does not exist"):
            load([top])
    top.write_text('copies: {one: {include: "top.yaml#copies"}}\n')
    with pytest.raises(ConfigError, match="include cycle"):
        load([top])


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda file: file.stem)
def test_the_comparison_that_ships_has_every_recipe_as_it_is(recipe: Path) -> None:
    overrides = ["prompt=x", "trainer.max_steps=123", "system.geometry.particles=4"]
    methods = load([COMPARE], overrides)["system"]["methods"]
    assert recipe.stem in methods, "add a line for it to configs/text-to-2d/compare.yaml"
    assert methods[recipe.stem] == load([recipe], overrides)["system"]


def test_the_comparison_that_ships_has_one_number_of_particles() -> None:
    methods = load([COMPARE], ["prompt=x", "system.geometry.particles=3"])["system"]["methods"]
    assert {block["geometry"]["particles"] for block in methods.values()} == {3}


def test_every_method_can_be_chosen() -> None:
    names = ", ".join(file.stem for file in RECIPES)
    config: Any = load_experiment(["text-to-2d/compare.yaml"], ["prompt=a red mug", f"system.only=[{names}]"])
    assert len(config.system.chosen) == len(RECIPES)


def test_a_run_leaves_sheet_and_animation(tmp_path: Path) -> None:
    options = ["prior={type: gaussian-mixture, image_size: 8}", "trainer.max_steps=2", "preview.every_n_steps=1"]
    options += ["preview.size=16", "test.frames=2", "system.only=[sds]", f"output_root={tmp_path}"]
    arguments = ["--config", "text-to-2d/compare.yaml", "--train", "--gpu", "cpu", "prompt=red left blob"]
    assert cli.main([*arguments, *options]) == cli.OK
    (video,) = tmp_path.rglob("optimisation.mp4")
    assert video.stat().st_size > 0
    assert sorted(path.name for path in tmp_path.rglob("step-*.png")) == ["step-000001.png", "step-000002.png"]

"""The configuration of a resumed run: its schedules keep the steps that they were written for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from scoredist3d.config.pipeline import load_pipeline
from scoredist3d.config.resume import changed_schedules, load_resumed, resumed_layers, resumed_stages
from scoredist3d.config.validation import layers_to_yaml, load_experiment, load_plain, to_yaml

WRITTEN: dict[str, Any] = {
    "prompt": "a mug",
    "name": "try",
    "system": {
        "guidance": {"type": "sds", "guidance_scale": {"from": 100, "to": 7.5, "end": "${trainer.max_steps}"}},
        "optimizer": {"lr": {"from": 0.1, "to": 0.01, "end": "${trainer.max_steps}"}},
    },
    "trainer": {"max_steps": 320},
}


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    return write(tmp_path / "config.yaml", WRITTEN)


def write(path: Path, layers: dict[str, Any]) -> Path:
    path.write_text(layers_to_yaml(layers))
    return path


def ends(config: Any) -> tuple[int, int, int]:
    return config.trainer.max_steps, config.system.guidance.guidance_scale.end, config.system.optimizer.lr.end


def test_more_steps_leave_the_schedules_where_they_ended(stored: Path) -> None:
    before, longer = load_experiment([stored]), load_resumed(stored, overrides=["trainer.max_steps=600"])
    assert ends(before) == (320, 320, 320) and ends(longer) == (600, 320, 320)
    assert changed_schedules(before, longer, 320) == []
    assert longer.system.guidance.guidance_scale(321) == longer.system.guidance.guidance_scale(320) == 7.5


def test_repeated_extensions_keep_the_steps_of_the_first_session(stored: Path) -> None:
    for steps in (400, 600, 200, 700):
        write(stored, resumed_layers(stored, overrides=[f"trainer.max_steps={steps}"]))
        assert ends(load_experiment([stored])) == (steps, 320, 320)


def test_schedules_are_stretched_where_that_is_asked_for(stored: Path) -> None:
    for asked in ("600", "null", "${trainer.max_steps}"):
        longer = load_resumed(stored, overrides=["trainer.max_steps=600", f"trainer.schedule_steps={asked}"])
        assert ends(longer) == (600, 600, 600)
    changed = changed_schedules(load_experiment([stored]), longer, 320)
    assert sorted(changed) == ["system.guidance.guidance_scale 7.5 -> 50.67", "system.optimizer.lr 0.01 -> 0.052"]
    extra = stored.with_name("extra.yaml")
    extra.write_text("trainer: {max_steps: 600, schedule_steps: 500}\n")
    assert ends(load_resumed(stored, [extra])) == (600, 500, 500)


def test_other_values_follow_what_is_overridden(stored: Path) -> None:
    write(stored, {**WRITTEN, "negative_prompt": "not ${prompt}"})
    longer = load_resumed(stored, overrides=["prompt=a jug", "trainer.max_steps=600"])
    assert longer.negative_prompt == "not a jug"


def test_nothing_is_added_where_no_value_depends_on_it(stored: Path) -> None:
    same = resumed_layers(stored, overrides=["seed=1"])
    assert "schedule_steps" not in same["trainer"]
    resolved = stored.with_name("resolved.yaml")
    resolved.write_text(to_yaml(load_experiment([stored])))
    longer = load_resumed(resolved, overrides=["trainer.max_steps=600"])
    assert ends(longer) == (600, 320, 320) and longer.trainer.schedule_steps is None


def test_schedule_steps_of_a_new_run(stored: Path) -> None:
    config = load_experiment([stored], ["trainer.schedule_steps=50"])
    assert ends(config) == (320, 50, 50)
    again = stored.with_name("resolved.yaml")
    again.write_text(to_yaml(config))
    assert load_experiment([again]) == config


def test_stages_that_have_begun_keep_their_schedules(tmp_path: Path, stored: Path) -> None:
    file = tmp_path / "stages.yaml"
    file.write_text(yaml.safe_dump({**WRITTEN, "stages": {"coarse": {}, "refine": {}}}))
    pipeline = load_pipeline([file], ["trainer.max_steps=600"])
    assert [ends(config) for config in pipeline.stages.values()] == [(600, 600, 600)] * 2
    layers = resumed_stages(pipeline, {"coarse": stored, "old": stored})
    assert [ends(load_plain(merged)) for merged in layers.values()] == [(600, 320, 320), (600, 600, 600)]
    asked = load_pipeline([file], ["trainer.max_steps=600", "stages.coarse.trainer.schedule_steps=600"])
    assert ends(load_plain(resumed_stages(asked, {"coarse": stored})["coarse"])) == (600, 600, 600)

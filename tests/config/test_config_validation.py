from __future__ import annotations

from typing import Any

import pytest
import yaml

from scoredist3d import registry
from scoredist3d.config import ConfigError, Schedule
from scoredist3d.config.validation import dump, load_experiment, parse_component, to_yaml, validate

pytestmark = pytest.mark.usefixtures("components")

GOOD: dict[str, Any] = {"prompt": "a red mug"}


def validated(**extra: Any) -> Any:
    return validate({**GOOD, **extra})


def test_defaults_fill_every_block() -> None:
    config = validated()
    assert config.trainer.max_steps == 1000
    assert (config.system.kind, config.system.type) == ("system", "text-to-3d")
    assert (config.system.guidance.kind, config.system.guidance.type) == ("guidance", "sds")
    assert config.system.guidance.guidance_scale == Schedule.constant(7.5)
    assert config.system.optimizer.lr == Schedule.constant(0.01)
    assert config.system.geometry.grid.levels == 4, "the owner's default_factory counts, not the block's own default"
    assert config.system.geometry.fine is None
    assert config.system.texture is None
    assert config.system.loss == {}


def test_values_are_converted_to_the_declared_types() -> None:
    config = validated(
        trainer={"max_steps": 1e4, "gradient_clip_norm": 1},
        system={
            "guidance": {"t_range": ["2e-2", 0.5], "clip": "1e-3", "guidance_scale": [0, 100, "7.5", 1000]},
            "geometry": {"grid": {"scale": 2}, "fine": {"levels": "3"}},
            "texture": {"type": "paint", "color": [0, 1, 0.5]},
            "optimizer": {"groups": {"geometry": {"from": "1e-2", "to": 1e-3, "end": 100, "shape": "exp"}}},
        },
        data={"batch_size": [8, 4]},
    )
    assert config.trainer.max_steps == 10000 and isinstance(config.trainer.max_steps, int)
    assert isinstance(config.trainer.gradient_clip_norm, float)
    guidance = config.system.guidance
    assert guidance.t_range == (0.02, 0.5) and isinstance(guidance.t_range, tuple)
    assert guidance.clip == 0.001
    assert guidance.guidance_scale == Schedule.ramp(100.0, 7.5, 0, 1000)
    assert config.system.geometry.grid.scale == 2.0 and config.system.geometry.grid.levels == 4
    assert config.system.geometry.fine.levels == 3
    assert config.system.texture.color == (0.0, 1.0, 0.5)
    assert config.system.optimizer.groups == {"geometry": Schedule.ramp(0.01, 0.001, 0, 100, "exp")}
    assert config.data.batch_size == [8, 4]


def test_a_loss_is_a_weight_a_schedule_a_block_or_taken_out() -> None:
    ramp = {"from": 1.0, "to": 0.1, "end": 2000}
    late = {"type": "sparsity", "weight": 3}
    config = validated(system={"loss": {"sparsity": ramp, "late": late}})
    assert config.system.loss["sparsity"].weight == Schedule.ramp(1.0, 0.1, 0, 2000)
    assert config.system.loss["late"].type == "sparsity"
    assert validated(system={"loss": {"sparsity": 2}}).system.loss["sparsity"].weight(0) == 2.0
    assert validated(system={"loss": {"sparsity": None}}).system.loss == {}


BAD: list[tuple[dict[str, Any], str]] = [
    # Unknown keys.
    (
        {"system": {"guidance": {"guidance_scal": 20}}},
        "system.guidance.guidance_scal: unknown key (value 20). Did you mean 'guidance_scale'?",
    ),
    ({"trainer": {"max_step": 5}}, "trainer.max_step: unknown key (value 5). Did you mean 'max_steps'?"),
    ({"guidance_scale": 20}, "guidance_scale: unknown key (value 20). Did you mean 'system.guidance.guidance_scale'?"),
    ({"max_steps": 5}, "max_steps: unknown key (value 5). Did you mean 'trainer.max_steps'?"),
    (
        {"system": {"geometry": {"grid": {"zzz": None}}}},
        "system.geometry.grid.zzz: unknown key (value null). Known keys: levels, scale",
    ),
    (
        {"system": {"geometry": {"fine": {"level": 3}}}},
        "system.geometry.fine.level: unknown key (value 3). Did you mean 'levels'?",
    ),
    (
        {"trainer": {"type": "x"}},
        "trainer.type: unknown key (value 'x'). Known keys: max_steps, precision, accumulate, "
        "gradient_clip_norm, grace_seconds, detect_anomaly, schedule_steps",
    ),
    # Component names.
    (
        {"system": {"guidance": {"type": "sbs", "guidance_scale": "ignored"}}},
        "system.guidance.type: no guidance is called 'sbs'. Did you mean 'sds'? Known: sdi, sds",
    ),
    (
        {"system": {"type": "text-to-4d"}},
        "system.type: no system is called 'text-to-4d'. Did you mean 'text-to-3d' or 'text-to-2d'? Known: "
        "text-to-2d, text-to-3d",
    ),
    (
        {"system": {"loss": {"sparsty": 1.0}}},
        "system.loss.sparsty: no loss is called 'sparsty'. Did you mean 'sparsity'? Known: sparsity",
    ),
    ({"system": {"texture": {"color": [1, 1, 1]}}}, "system.texture.type: is required but missing; known types: paint"),
    (
        {"system": {"guidance": "sdi"}},
        "system.guidance: must be a block whose type names a guidance, as in {type: sdi}; got 'sdi'",
    ),
    ({"prior": {"type": 3}}, "prior.type: no prior is called '3'. Known: diffusers"),
    # Types and ranges of leaves.
    ({"trainer": {"max_steps": 0}}, "trainer.max_steps: must be a whole number >= 1, got 0"),
    ({"trainer": {"max_steps": 10.5}}, "trainer.max_steps: must be a whole number >= 1, got 10.5"),
    ({"trainer": {"max_steps": True}}, "trainer.max_steps: must be a whole number >= 1, got true"),
    ({"trainer": {"max_steps": None}}, "trainer.max_steps: must be a whole number >= 1, got null"),
    ({"trainer": {"gradient_clip_norm": 0}}, "trainer.gradient_clip_norm: must be a number > 0 or null, got 0"),
    (
        {"trainer": {"gradient_clip_norm": float("nan")}},
        "trainer.gradient_clip_norm: must be a number > 0 or null, got nan",
    ),
    (
        {"trainer": {"precision": "16-mixd"}},
        "trainer.precision: must be one of '32-true', '16-mixed', 'bf16-mixed', got '16-mixd'. Did you mean "
        "'16-mixed' or 'bf16-mixed'?",
    ),
    ({"log": {"tensorboard": "yes"}}, "log.tensorboard: must be true or false, got 'yes'"),
    ({"log": {"tensorboard": 1}}, "log.tensorboard: must be true or false, got 1"),
    ({"tag": 7}, "tag: must be text, got 7; put quotes around it"),
    (
        {"system": {"geometry": {"grid": {"levels": 33}}}},
        "system.geometry.grid.levels: must be a whole number from 1 to 32, got 33",
    ),
    ({"system": {"geometry": {"grid": 3}}}, "system.geometry.grid: must be a block of keys (levels, scale), got 3"),
    (
        {"trainer": None},
        "trainer: must be a block of keys (max_steps, precision, accumulate, gradient_clip_norm, "
        "grace_seconds, detect_anomaly, schedule_steps), got null",
    ),
    # Lists and mappings.
    ({"preview": {"azimuths": [0, "east"]}}, "preview.azimuths.1: must be a number from -360 to 360, got 'east'"),
    ({"preview": {"azimuths": 30}}, "preview.azimuths: must be a list, each item a number from -360 to 360, got 30"),
    (
        {"system": {"optimizer": {"betas": [0.9]}}},
        "system.optimizer.betas: must be a list of 2 values (a number >= 0 and < 1, a number >= 0 and < 1), got [0.9]",
    ),
    ({"system": {"optimizer": {"betas": [0.9, 1]}}}, "system.optimizer.betas.1: must be a number >= 0 and < 1, got 1"),
    (
        {"exporter": {"formats": ["gbl"]}},
        "exporter.formats.0: must be one of 'glb', 'obj', got 'gbl'. Did you mean 'glb'?",
    ),
    (
        {"data": {"batch_size": 0}},
        "data.batch_size: must be a whole number >= 1 or a list, each item a whole number >= 1, got 0",
    ),
    ({"system": {"loss": [1.0]}}, "system.loss: must be a mapping from loss names to weights or blocks, got [1.0]"),
    (
        {"system": {"optimizer": {"groups": {1: 0.1}}}},
        "system.optimizer.groups: must be a mapping from names to values, each value a number >= 0 or a schedule "
        "{from, to, start, end, shape}; the name 1 is not text; put quotes around it",
    ),
    # Schedules.
    (
        {"system": {"guidance": {"guidance_scale": "abc"}}},
        "system.guidance.guidance_scale: must be a number >= 0 or a schedule {from, to, start, end, shape}, got 'abc'",
    ),
    (
        {"system": {"guidance": {"guidance_scale": -1}}},
        "system.guidance.guidance_scale: must be a number >= 0 or a schedule {from, to, start, end, shape}, got -1",
    ),
    (
        {"system": {"guidance": {"guidance_scale": {"from": 1, "to": -2, "end": 5}}}},
        "system.guidance.guidance_scale: must be a number >= 0 or a schedule {from, to, start, end, shape}, "
        "got {'from': 1, 'to': -2, 'end': 5}",
    ),
    (
        {"system": {"guidance": {"guidance_scale": {"from": 1, "to": 2}}}},
        "system.guidance.guidance_scale: a schedule requires the key 'end' "
        "(required: from, to, end; optional: start, shape)",
    ),
    (
        {"system": {"guidance": {"guidance_scale": {"from": 1, "to": 2, "end": 5, "shape": "linaer"}}}},
        "system.guidance.guidance_scale: the shape of a schedule must be one of linear, cosine, exp, sqrt, step, "
        "got 'linaer'",
    ),
    (
        {"system": {"guidance": {"guidance_scale": {"from": 1, "to": 2, "stop": 5}}}},
        "system.guidance.guidance_scale: the keys of a schedule are from, to, start, end, shape; got 'stop'",
    ),
    (
        {"system": {"guidance": {"guidance_scale": {"from": 0, "to": 2, "end": 5, "shape": "exp"}}}},
        "system.guidance.guidance_scale: a schedule of shape exp requires from > 0 and to > 0",
    ),
    (
        {"system": {"guidance": {"guidance_scale": {"from": 0, "to": 2, "start": 9, "end": 5}}}},
        "system.guidance.guidance_scale: the steps of a schedule must be whole numbers with 0 <= start <= end, "
        "got start=9, end=5",
    ),
    (
        {"system": {"guidance": {"guidance_scale": [0, 1, 2]}}},
        "system.guidance.guidance_scale: a schedule list must consist of numbers: [start_step, from, to, "
        "end_step], and a further pair (to, end_step) for each additional segment; got [0, 1, 2]",
    ),
    (
        {"system": {"loss": {"sparsity": -1}}},
        "system.loss.sparsity.weight: must be a number >= 0 or a schedule {from, to, start, end, shape}, got -1",
    ),
    # Missing keys and relations.
    (
        {"prompt": "???"},
        'prompt: is required but missing; set it in a config file or on the command line: prompt="a red mug"',
    ),
    ({"seed": "???"}, "seed: is required but missing; set it in a config file or on the command line: seed=..."),
    (
        {"system": {"texture": {"type": "paint"}}},
        "system.texture.color: is required but missing; set it in a config file or on the command line: "
        "system.texture.color=...",
    ),
    ({"prompt": " "}, 'prompt: must not be empty; set it, for example with prompt="a red mug"'),
    ({"name": "a/b"}, "name: must be a single folder name without slashes, got 'a/b'"),
    ({"test": {"width": 33}}, "test.width: must be even for mp4, got 33"),
    (
        {"system": {"guidance": {"t_range": [0.9, 0.1]}}},
        "system.guidance.t_range: the first value must not exceed the second, got [0.9, 0.1]",
    ),
]


@pytest.mark.parametrize(("extra", "message"), BAD, ids=[message.split(": ")[0] for _, message in BAD])
def test_a_bad_config_says_where_and_what(extra: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        validated(**extra)
    assert str(caught.value) == message


def test_the_table_above_is_long_enough() -> None:
    assert len(BAD) >= 25


def test_all_mistakes_are_reported_together_in_order() -> None:
    with pytest.raises(ConfigError) as caught:
        validate({"sed": 1, "trainer": {"max_steps": "x", "precison": "32"}, "system": {"guidance": {"type": "sdx"}}})
    assert [line.split(":")[0] for line in str(caught.value).splitlines()] == [
        "sed",
        "prompt",
        "system.guidance.type",
        "trainer.precison",
        "trainer.max_steps",
    ]


def test_dump_and_validate_are_inverse() -> None:
    config = validated(
        seed=3,
        system={
            "guidance": {"type": "sdi", "guidance_scale": {"from": 2, "to": 2, "start": 1, "end": 7}},
            "geometry": {"fine": {"levels": 2}},
            "texture": {"type": "paint", "color": [0, 0, 1]},
            "loss": {"sparsity": [0, 1, 2, 30], "late": {"type": "sparsity"}},
            "optimizer": {"betas": [0.5, 0.6], "lr": 1e-15, "groups": {"a.b": 1}},
        },
        data={"batch_size": [2, 1], "milestones": [5]},
    )
    plain = dump(config)
    assert validate(plain) == config
    assert dump(validate(plain)) == plain
    assert plain["system"]["guidance"]["type"] == "sdi" and "kind" not in plain["system"]


def test_the_saved_config_runs_again_by_itself(tmp_path: Any) -> None:
    config = validated(
        prompt="100 % ${art} — ja",
        tag="1e-3",
        name="007",
        system={"loss": {"sparsity": {"from": 1, "to": 0.1, "end": 5}}},
    )
    file = tmp_path / "resolved.yaml"
    file.write_text(to_yaml(config), encoding="utf-8")
    assert load_experiment([file]) == config
    assert yaml.safe_load(file.read_text(encoding="utf-8"))["trainer"]["max_steps"] == 1000


def test_one_component_can_be_parsed_alone() -> None:
    config = parse_component("guidance", {"type": "sdi", "inversion_steps": 3})
    assert (config.inversion_steps, config.type) == (3, "sdi")
    with pytest.raises(ConfigError, match=r"^guidance.type: is required but missing; known types: sdi, sds$"):
        parse_component("guidance", {"inversion_steps": 3})


def test_a_config_made_in_code_has_schedules_too() -> None:
    config_cls = registry.lookup("guidance", "sds").config_cls
    assert config_cls(guidance_scale=20).guidance_scale(7) == 20.0
    assert config_cls().guidance_scale == Schedule.constant(7.5)

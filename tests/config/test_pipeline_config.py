"""Files with stages: what each stage is made of, and what wins over what."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from scoredist3d.config import ConfigError
from scoredist3d.config.pipeline import is_pipeline, load_pipeline
from scoredist3d.config.validation import layers_to_yaml

RECIPE = """
name: recipe
prompt: ???
prior: {type: gaussian-mixture}
system:
  loss: {sparsity: 1.0}
  optimizer: {lr: {from: 0.02, to: 0.01, end: "${trainer.max_steps}"}}
trainer: {max_steps: 50}
"""
PIPELINE = """
name: two-steps
prompt: ???
seed: 3
stages:
  coarse: {include: recipe.yaml}
  refine:
    include: [recipe.yaml, more.yaml]
    trainer: {max_steps: 20}
    system: {loss: {sparsity: 2.0}}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    (tmp_path / "more.yaml").write_text("data: {batch_size: 7}\n")
    (tmp_path / "pipeline.yaml").write_text(PIPELINE)
    return tmp_path / "pipeline.yaml"


def changed(file: Path, old: str, new: str) -> Path:
    assert old in PIPELINE
    file.write_text(PIPELINE.replace(old, new))
    return file


def test_stages_include_files_and_share_the_keys_next_to_them(file: Path) -> None:
    stages = load_pipeline([file], ["prompt=a red mug"]).stages
    assert list(stages) == ["coarse", "refine"]
    for config in stages.values():
        assert (config.prompt, config.seed, config.name) == ("a red mug", 3, "two-steps")
    assert [config.trainer.max_steps for config in stages.values()] == [50, 20]
    assert [config.system.loss["sparsity"].weight(0) for config in stages.values()] == [1.0, 2.0]
    assert [config.data.batch_size for config in stages.values()] == [4, 7]
    # An interpolation means the stage's own value.
    assert [config.system.optimizer.lr.end for config in stages.values()] == [50, 20]


def test_a_stage_starts_from_the_one_before_unless_it_says_otherwise(file: Path) -> None:
    assert [c.system.init_from for c in load_pipeline([file], ["prompt=x"]).stages.values()] == [None, "stage:coarse"]
    alone = load_pipeline([file], ["prompt=x", "stages.refine.system.init_from=null"]).stages["refine"]
    assert alone.system.init_from is None
    with pytest.raises(ConfigError, match=r"stages\.coarse\.system\.init_from: stage:refine is not an earlier stage"):
        load_pipeline([file], ["prompt=x", "stages.coarse.system.init_from=stage:refine"])


def test_the_command_line_wins_over_every_stage(file: Path) -> None:
    stages = load_pipeline([file], ["prompt=x", "trainer.max_steps=5", "stages.refine.trainer.max_steps=6"]).stages
    assert [config.trainer.max_steps for config in stages.values()] == [5, 6]


def test_what_is_saved_means_the_same_again(file: Path, tmp_path: Path) -> None:
    asked = ["prompt=x", "trainer.max_steps=5", "stages.refine.system.loss.sparsity=3"]
    pipeline = load_pipeline([file], asked)
    saved = tmp_path / "elsewhere" / "saved.yaml"
    saved.parent.mkdir()
    saved.write_text(layers_to_yaml(pipeline.written))
    assert is_pipeline(yaml.safe_load(saved.read_text()))
    assert load_pipeline([saved]).stages == pipeline.stages
    longer = load_pipeline([saved], ["trainer.max_steps=9"]).stages["coarse"]
    assert longer.system.optimizer.lr.end == 9


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("coarse: {include: recipe.yaml}", "coarse: 3", r"stages\.coarse must be a block"),
        (
            "coarse: {include: recipe.yaml}",
            "coarse: {include: 3}",
            r"stages\.coarse\.include must be a file or a list of files",
        ),
        ("coarse: {include: recipe.yaml}", "coarse: {include: none.yaml}", r"none\.yaml does not exist"),
        ("coarse: {include: recipe.yaml}", "a/b: {include: recipe.yaml}", r"the name of a stage is a folder name"),
        ("{sparsity: 2.0}", "{sparsty: 2.0}", r"stages\.refine\.system\.loss\.sparsty"),
        ("max_steps: 20", "max_steps: 0", r"stages\.refine\.trainer\.max_steps"),
    ],
)
def test_mistakes_name_the_stage(file: Path, old: str, new: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_pipeline([changed(file, old, new)], ["prompt=x"])


def test_mistakes_of_all_stages_are_reported_together(file: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_pipeline([file], ["stages.refine.trainer.max_steps=0"])
    # What all stages lack is said once.
    assert [line.split(":")[0] for line in str(caught.value).splitlines()] == [
        "prompt",
        "stages.refine.trainer.max_steps",
    ]


def test_stages_that_do_not_exist(file: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"stages\.fine: no such stage; the stages are coarse, refine"):
        load_pipeline([file], ["prompt=x", "stages.fine.trainer.max_steps=1"])
    with pytest.raises(ConfigError, match="override single values"):
        load_pipeline([file], ["prompt=x", "stages=3"])
    empty = tmp_path / "empty.yaml"
    empty.write_text("prompt: x\nstages: {}\n")
    with pytest.raises(ConfigError, match="at least one stage"):
        load_pipeline([empty])
    nested = tmp_path / "nested.yaml"
    nested.write_text("prompt: x\nstages: {all: {include: pipeline.yaml}}\n")
    with pytest.raises(ConfigError, match=r"stages\.all\.include names a pipeline"):
        load_pipeline([nested])


def test_files_that_follow_hold_for_every_stage(file: Path, tmp_path: Path) -> None:
    later = tmp_path / "later.yaml"
    later.write_text("trainer: {max_steps: 7}\nsystem: {loss: {sparsity: 5.0}}\n")
    stages = load_pipeline([file, later], ["prompt=x", "stages.refine.trainer.max_steps=8"]).stages
    assert [config.trainer.max_steps for config in stages.values()] == [7, 8]
    assert [config.system.loss["sparsity"].weight(0) for config in stages.values()] == [5.0, 5.0]


def test_no_layer_replaces_the_geometries_of_all_stages_if_they_differ(file: Path, tmp_path: Path) -> None:
    fragment = tmp_path / "fragment.yaml"
    fragment.write_text("system: {geometry: {type: implicit-sdf}}\n")
    mesh = "system: {geometry: {type: dmtet}, renderer: {type: mesh-rasterizer}}"
    changed(file, "system: {loss: {sparsity: 2.0}}", mesh)
    message = (
        r"^system\.geometry\.type: implicit-sdf would replace the geometry of every stage \(coarse: default, refine: "
        r"dmtet\)\. Use a recipe with one stage, .*, or set the keys of one stage, as in stages\.refine\.system"
    )
    with pytest.raises(ConfigError, match=message):
        load_pipeline([file, fragment], ["prompt=x"])
    with pytest.raises(ConfigError, match=message):
        load_pipeline([file], ["prompt=x", "system.geometry.type=implicit-sdf"])
    alone = load_pipeline([file, fragment], ["prompt=x", "stages.refine=null"]).stages["coarse"]
    assert alone.system.geometry.type == "implicit-sdf"
    load_pipeline([file], ["prompt=x", "stages.coarse.system.geometry.type=implicit-sdf"])


def test_the_name_can_be_changed(file: Path) -> None:
    assert {config.name for config in load_pipeline([file], ["prompt=x", "name=mine"]).stages.values()} == {"mine"}


def test_a_stage_can_be_taken_out(file: Path) -> None:
    (only,) = load_pipeline([file], ["prompt=x", "stages.coarse=null"]).stages.items()
    assert only[0] == "refine" and only[1].system.init_from is None
    with pytest.raises(ConfigError, match="the overrides remove every stage; keep at least one"):
        load_pipeline([file], ["prompt=x", "stages.coarse=null", "stages.refine=null"])
    with pytest.raises(ConfigError, match=r"stages\.refine: must be a block, got 5"):
        load_pipeline([file], ["prompt=x", "stages.refine=5"])
    with pytest.raises(ConfigError, match=r"refine: this is a stage; write stages\.refine instead"):
        load_pipeline([file], ["prompt=x", "refine.trainer.max_steps=5"])

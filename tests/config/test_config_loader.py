from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from scoredist3d import registry
from scoredist3d.config import ConfigError
from scoredist3d.config.loader import find_config, load, merge, parse_overrides
from scoredist3d.config.validation import load_experiment
from scoredist3d.paths import CONFIG_ALIASES


def write(folder: Path, **files: str) -> None:
    for name, text in files.items():
        path = folder / f"{name.replace('__', '/')}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def error_of(*args: Any, **kwargs: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        load(*args, **kwargs)
    return str(caught.value)


# Layers


def test_later_layers_win_key_by_key(here: Path) -> None:
    write(
        here,
        low="a: 1\nb: {x: 1, y: 1}\nl: [1, 2]\n",
        mid="include: [low.yaml]\na: 2\nb: {y: 2}\n",
        top="b: {z: 3}\nl: [9]\n",
    )
    assert load(["mid.yaml", "top.yaml"], ["b.x=7"]) == {"a": 2, "b": {"x": 7, "y": 2, "z": 3}, "l": [9]}


def test_includes_are_relative_to_the_file_then_to_configs(here: Path) -> None:
    write(
        here,
        recipes__r="include: [near.yaml, part/far.yaml]\n",
        recipes__near="near: 1\n",
        configs__part__far="far: 1\n",
    )
    assert load(["recipes/r.yaml"]) == {"near": 1, "far": 1}
    write(here, recipes__s="include: near.yaml\n")
    assert load(["recipes/s.yaml"]) == {"near": 1}


def test_two_files_may_include_the_same_third(here: Path) -> None:
    write(
        here,
        base="n: 1\n",
        a="include: [base.yaml]\na: 1\n",
        b="include: [base.yaml]\nb: 1\n",
        top="include: [a.yaml, b.yaml]\n",
    )
    assert load(["top.yaml"]) == {"n": 1, "a": 1, "b": 1}


def test_a_layer_that_changes_the_type_starts_the_block_afresh(here: Path) -> None:
    write(
        here,
        sds="g: {type: sds, scale: 100, clip: 1}\n",
        sdi="g: {type: sdi, steps: 10}\n",
        same="g: {type: sds, scale: 5}\n",
    )
    assert load(["sds.yaml", "sdi.yaml"]) == {"g": {"type": "sdi", "steps": 10}}
    assert load(["sds.yaml", "same.yaml"]) == {"g": {"type": "sds", "scale": 5, "clip": 1}}
    assert load(["sds.yaml"], ["g.type=sdi"]) == {"g": {"type": "sdi"}}
    assert load(["sds.yaml"], ["g.steps=3", "g.type=sdi"]) == {"g": {"type": "sdi", "steps": 3}}, "one layer, any order"
    assert load(["sds.yaml"], ["g.type=sds", "g.scale=7"]) == {"g": {"type": "sds", "scale": 7, "clip": 1}}


def test_a_block_that_names_no_type_yet_is_kept(here: Path) -> None:
    write(here, fragment="s: {g: {scale: 1}}\n", recipe="include: [fragment.yaml]\ns: {type: text-to-3d}\n")
    assert load(["recipe.yaml"]) == {"s": {"type": "text-to-3d", "g": {"scale": 1}}}


def test_losses_merge_whichever_way_they_are_written() -> None:
    def loss(value: Any) -> dict[str, Any]:
        return {"system": {"loss": {"sparsity": value}}}

    ramp = {"from": 1, "to": 0, "end": 9}
    block = {"weight": 2, "epsilon": 0.1}
    assert merge(loss(block), loss(3)) == loss({"weight": 3, "epsilon": 0.1})
    assert merge(loss(block), loss(ramp)) == loss({"weight": ramp, "epsilon": 0.1})
    assert merge(merge({}, loss(ramp)), loss({"epsilon": 0.2})) == loss({"weight": ramp, "epsilon": 0.2})
    assert merge(loss(block), loss(None)) == loss(None)


def test_a_prior_may_be_a_bare_name(here: Path) -> None:
    write(here, base="prior: {type: diffusers, pretrained_model_name_or_path: embedded, precision: fp32}\n")
    key = "pretrained_model_name_or_path"
    # The name of a model replaces that of the layer below; its other settings stay.
    assert load(["base.yaml"], ["prior=some/model"])["prior"] == {
        "type": "diffusers",
        key: "some/model",
        "precision": "fp32",
    }
    assert load(["base.yaml"], ["prior=some/model", "prior.precision=fp16"])["prior"]["precision"] == "fp16"
    # The name of a registered type starts the block afresh.
    assert load(["base.yaml"], ["prior=gaussian-mixture"])["prior"] == {"type": "gaussian-mixture"}
    stage = merge({}, {"stages": {"coarse": {"prior": "embedded"}}})
    assert stage["stages"]["coarse"]["prior"] == {"type": "diffusers", key: "embedded"}
    assert load(["base.yaml"], ["name=x", "prior=${name}"])["prior"] == "x"  # not known before interpolation


def test_merging_changes_neither_side() -> None:
    base, layer = {"a": {"l": [1]}}, {"a": {"m": [2]}}
    merged = merge(base, layer)
    merged["a"]["l"].append(5)
    merged["a"]["m"].append(5)
    assert (base, layer) == ({"a": {"l": [1]}}, {"a": {"m": [2]}})


# Overrides


def test_override_values_are_yaml() -> None:
    overrides = ["a=1", "b=1e-3", "c=true", "d=null", "e=[1, x]", "f={u: 2}", "g=a=b", "h.i.j=text", "k="]
    assert parse_overrides(overrides) == {
        "a": 1, "b": 0.001, "c": True, "d": None, "e": [1, "x"], "f": {"u": 2}, "g": "a=b",
        "h": {"i": {"j": "text"}}, "k": None,
    }  # fmt: skip


def test_free_text_is_taken_as_it_is() -> None:
    text = "a mug: half red, #2 of [three], yes"
    assert parse_overrides([f"prompt={text}", "tag=007", 'negative_prompt="no"']) == {
        "prompt": text,
        "tag": "007",
        "negative_prompt": "no",
    }


def test_list_items_by_index(here: Path) -> None:
    write(here, base="a: {b: [1, 2, {c: 3}]}\n")
    assert load(["base.yaml"], ["a.b.0=9", "a.b[2].c=4"]) == {"a": {"b": [9, 2, {"c": 4}]}}
    assert error_of(["base.yaml"], ["a.b.3=1"]) == "a.b: there is no item 3; the list has 3 items, counted from 0"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("system.guidance", "override 'system.guidance' is not of the form key.path=value"),
        ("=3", "override '=3' is not of the form key.path=value"),
        ("a..b=3", "override 'a..b=3' is not of the form key.path=value"),
    ],
)
def test_malformed_overrides(override: str, message: str) -> None:
    assert error_of([], [override]) == message


# Interpolation


def test_interpolation_is_resolved_after_the_last_layer(here: Path) -> None:
    write(here, base="n: 5\nend: ${n}\nname: run-${n}\nblock: {k: [1]}\ncopy: ${block}\nmore: ['${n}']\n")
    assert load(["base.yaml"], ["n=8"]) == {
        "n": 8, "end": 8, "name": "run-8", "block": {"k": [1]}, "copy": {"k": [1]}, "more": [8],
    }  # fmt: skip


@pytest.mark.usefixtures("components")
def test_interpolation_reaches_defaults_that_no_file_sets(here: Path) -> None:
    write(
        here,
        base="prompt: x\nsystem: {guidance: {guidance_scale: {from: 100, to: 7.5, end: '${trainer.max_steps}'}}}\n",
    )
    assert load_experiment(["base.yaml"]).system.guidance.guidance_scale.end == 1000
    assert load_experiment(["base.yaml"], ["trainer.max_steps=50"]).system.guidance.guidance_scale.end == 50


def test_all_dangling_interpolations_are_named(here: Path) -> None:
    write(here, base="a: ${nowhere}\nb: {c: 'x${also.gone}'}\n")
    first, second = error_of(["base.yaml"]).splitlines()
    assert first.startswith("a: cannot resolve '${nowhere}': Interpolation key 'nowhere' not found")
    assert second.startswith("b.c: cannot resolve 'x${also.gone}': Interpolation key 'also.gone' not found")


@pytest.mark.usefixtures("components")
def test_what_points_at_a_missing_value_is_missing_too(here: Path) -> None:
    write(here, base="prompt: ???\ntag: ${prompt}\n")
    with pytest.raises(ConfigError) as caught:
        load_experiment(["base.yaml"])
    assert [line.split(":")[0] for line in str(caught.value).splitlines()] == ["prompt", "tag"]


# Files that are wrong


def test_a_cycle_is_named_with_its_chain(here: Path) -> None:
    write(
        here, top="include: [a.yaml]\n", a="include: [b.yaml]\n", b="include: [a.yaml]\n", self="include: [self.yaml]\n"
    )
    assert error_of(["top.yaml"]) == "include cycle: a.yaml -> b.yaml -> a.yaml; remove one of these includes"
    assert error_of(["self.yaml"]) == "include cycle: self.yaml -> self.yaml; remove one of these includes"


def test_a_missing_include_is_named_with_its_chain(here: Path) -> None:
    write(here, top="include: [sub/a.yaml]\n", sub__a="include: [b.yaml]\n")
    assert error_of(["top.yaml"]) == (
        "sub/a.yaml: included file b.yaml does not exist in the folder of the including file or in configs/ "
        "(top.yaml -> sub/a.yaml -> b.yaml)."
    )


def test_a_missing_file_has_near_matches(here: Path) -> None:
    write(here, configs__guidance__frobnicate="a: 1\n")
    assert error_of(["configs/guidance/frobnicat.yaml"]).startswith(
        "config file configs/guidance/frobnicat.yaml does not exist. Did you mean 'guidance/frobnicate'"
    )
    assert (
        error_of(["frobnicate.yaml"])
        == "config file frobnicate.yaml does not exist. Did you mean 'guidance/frobnicate.yaml' in configs/?"
    )


@pytest.mark.parametrize(("text", "line"), [("a: 1\nb: [1, 2\nc: 3\n", 3), ("a: 1\n\tb: 2\n", 2), ("a: 1\na: 2\n", 2)])
def test_bad_yaml_says_file_and_line(here: Path, text: str, line: int) -> None:
    write(here, bad=text, top="include: [bad.yaml]\n")
    for file in ("bad.yaml", "top.yaml"):
        assert error_of([file]).startswith(f"bad.yaml, line {line}: not valid YAML (while ")
    # The reason is the parser's, in one line; its wording depends on how PyYAML was built.
    assert "\n" not in error_of(["bad.yaml"])


def test_an_override_that_is_no_yaml(here: Path) -> None:
    message = error_of([], ["a=[1, 2"])
    assert message.startswith("override 'a=[1, 2': the value is not valid YAML (while parsing a flow sequence ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- 1\n- 2\n", "bad.yaml: must be a mapping (`key: value` lines), got [1, 2]"),
        ("include: {a: b}\n", "bad.yaml: include must be a file or a list of files, got {'a': 'b'}"),
        ("include: [3]\n", "bad.yaml: include must be a file or a list of files, got [3]"),
    ],
)
def test_a_file_of_another_form_is_refused(here: Path, text: str, message: str) -> None:
    write(here, bad=text)
    assert error_of(["bad.yaml"]) == message


def test_a_binary_file_is_not_a_config(here: Path) -> None:
    (here / "last.ckpt").write_bytes(b"PK\xff\xfe\x00")
    assert error_of(["last.ckpt"]) == "last.ckpt: not a UTF-8 text file; save it with the encoding UTF-8"


def test_an_empty_file_is_an_empty_layer(here: Path) -> None:
    write(here, empty="# nothing\n")
    assert load(["empty.yaml"]) == {}


def test_shipped_configs_are_found_from_anywhere(here: Path) -> None:
    assert find_config("configs/quickstart.yaml").is_file()
    assert find_config("quickstart.yaml").samefile(find_config("configs/quickstart.yaml"))


@pytest.mark.parametrize("old", CONFIG_ALIASES)
def test_a_renamed_recipe_is_found_by_its_earlier_path(
    old: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    registry.report_alias.cache_clear()
    monkeypatch.chdir(tmp_path)
    new = find_config(CONFIG_ALIASES[old])
    for spelling in (old, f"configs/{old}", new.parents[1] / old):
        assert find_config(spelling).samefile(new)
        assert load([spelling]) == load([new])
    (tmp_path / "own.yaml").write_text(f"include: [{old}]\nname: own\n", encoding="utf-8")
    assert load(["own.yaml"]) == load([new]) | {"name": "own"}
    included = [record.message for record in caplog.records if f"included file {old}" in record.message]
    assert included == [f"included file {old} is an old name and still works; the new name is {CONFIG_ALIASES[old]}"]


def test_an_earlier_name_of_a_component_keeps_its_block(here: Path) -> None:
    """A layer with an alias as its type changes values of the block; another type starts it afresh."""
    base = {"system": {"guidance": {"type": "dds", "source_prompt": "a mug"}}}
    for name, kept in (("delta-denoising", True), ("dds", True), ("pds", False)):
        merged = merge(base, {"system": {"guidance": {"type": name, "guidance_scale": 3}}})["system"]["guidance"]
        assert ("source_prompt" in merged) == kept


@pytest.mark.parametrize("wrong", [["dds"], {"name": "dds"}, None])
def test_a_type_that_is_no_name_is_left_to_validation(here: Path, wrong: Any) -> None:
    merged = merge({"guidance": {"type": "dds"}}, {"guidance": {"type": wrong}})
    assert merged == {"guidance": {"type": wrong}}

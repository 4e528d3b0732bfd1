"""Mistakes that once ended in tracebacks, internal texts or exhausted memory: each gives one short message."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from scoredist3d import cli
from scoredist3d.config import ConfigError
from scoredist3d.config.coercion import shown
from scoredist3d.config.errors import MAX_MESSAGE, brief
from scoredist3d.config.experiment import ExperimentConfig
from scoredist3d.config.interpolation import escape_interpolations, resolve
from scoredist3d.config.loader import find_config, load, parse_overrides
from scoredist3d.config.pipeline import load_pipeline
from scoredist3d.config.schedule import Schedule
from scoredist3d.config.validation import load_experiment
from scoredist3d.config.yaml_text import parse_yaml


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def message_of(function: Any, *arguments: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        function(*arguments)
    message = str(caught.value)
    assert 0 < len(message) <= MAX_MESSAGE
    return message


LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: " + "[" * 5000, "nested more than 60 levels deep; remove levels"),
        ("a: " + "[" * 90 + "]" * 90, "nested more than 60 levels deep; remove levels"),
        ("a: &x [*x]", "line 1: an alias refers to the block that contains it; write the values out"),
        (LAUGHS, "more than 100,000 values, with aliases expanded; remove some"),
        ("a: 1\nb: !!float y", "line 2: 'y' cannot be read as a value of type float; put quotes around text"),
        ("a: !!int ''", "line 1: '' cannot be read as a value of type int"),
        ("a: !!bool y", "cannot be read as a value of type bool"),
        ("a: !!timestamp x", "line 1: the tag '!!timestamp' is not supported here; write the value without it"),
        ("a: !!python/object/apply:os.system [ls]", "the tag '!!python/object/apply:os.system' is not supported here"),
        ("!!python/x a: 1", "line 1: the tag '!!python/x' is not supported here"),
        ("a: !!set {b}", "the tag '!!set' is not supported here"),
        ("a: " + "9" * 5000, "line 1: '9999"),
        ("a: " + "9" * 400, "is too large for a whole number; use a smaller one"),
        ("a: 0x" + "f" * 5000, "is too large for a whole number; use a smaller one"),
        ('a: "\\ud800"', "line 1: '\\ud800' contains half of a character; write both halves"),
        ("a: 1\nb: \x00", "line 2: not valid YAML (the character '\\x00' is not allowed)"),
        ("a: 1\na: 2", "line 2: not valid YAML (while constructing a mapping: duplicate key 'a')"),
        ("[1]: 2", "line 1: a key must be text; put quotes around it"),
        ("null: 2", "line 1: a key must be text; put quotes around it"),
        ("a: b: c", "line 1: not valid YAML"),
        ("include: ''", "bad.yaml: included file  does not exist"),
        ("include: " + "n" * 5000, "bad.yaml: included file nnnn"),
        ('include: "a\\0b"', "included file a\\x00b does not exist"),
        ("include: .", "included file . does not exist"),
        ("b: {include: '#'}", "b.include must name an existing block"),
        ("stages: 5", "stages must be a mapping with one block per stage, got 5"),
    ],
)
def test_hostile_files(here: Path, text: str, said: str) -> None:
    (here / "bad.yaml").write_text(text)
    message = message_of(load, ["bad.yaml"])
    assert message.startswith("bad.yaml") and said in message and "\n" not in message


def test_files_with_too_much(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "bad.yaml").write_text("#" * 4_000_001)
    assert message_of(load, ["bad.yaml"]).startswith("bad.yaml is too large: it has 4,000,001 bytes")
    for depth in range(12):
        (here / f"f{depth}.yaml").write_text(f"include: [f{depth + 1}.yaml, f{depth + 1}.yaml]\n")
    (here / "f12.yaml").write_text("a: 1\n")
    assert "include reads more than 500 files; remove some" in message_of(load, ["f0.yaml"])


@pytest.mark.parametrize("name", ["", ".", "..", "/", "/etc", "a/" * 3000, "n" * 5000, "a\0b", "\ud800.yaml"])
def test_names_that_are_no_files(name: str) -> None:
    assert message_of(find_config, name).startswith("config file ")


def test_a_folder_is_not_a_config(here: Path) -> None:
    (here / "runs").mkdir()
    assert message_of(find_config, "runs") == "config file runs is a folder; give the path of a YAML file"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("a..b=1", "override 'a..b=1' is not of the form key.path=value"),
        ("=x", "override '=x' is not of the form key.path=value"),
        ("a[=", "override 'a[=' is not of the form key.path=value"),
        ("[0]=1", "override '[0]=1' is not of the form key.path=value"),
        ("a." * 100 + "b=1", "has more than 60 keys; check the dots in it"),
        ("a=!!float y", "override 'a=!!float y': 'y' cannot be read as a value of type float; put quotes around text"),
        ("a=[1, 2", "override 'a=[1, 2': the value is not valid YAML (while parsing a flow sequence"),
        ("a=" + "[" * 5000, "nested more than 60 levels deep"),
        ("a=" + "9" * 5000, "it has too many digits"),
        ("a=\x00", "override 'a=\\x00': the value is not valid YAML (the character '\\x00' is not allowed)"),
    ],
)
def test_hostile_overrides(override: str, said: str) -> None:
    assert said in message_of(parse_overrides, [override])


def test_an_index_with_many_digits_is_a_key(here: Path) -> None:
    (here / "a.yaml").write_text("l: [1]\n")
    assert load(["a.yaml"], [f"l.{'9' * 5000}=1"]) == {"l": {"9" * 5000: 1}}


def test_yaml_values() -> None:
    text = (
        "{a: 1e-3, b: 1_000, c: 2020-01-01, d: 0x10, e: .inf, f: yes, g: ~, h: '1', i: !!float 1, j: =, 5: k, 1.5: m}"
    )
    assert parse_yaml(text) == {
        "a": 1e-3,
        "b": 1000,
        "c": "2020-01-01",
        "d": 16,
        "e": float("inf"),
        "f": True,
        "g": None,
        "h": "1",
        "i": 1.0,
        "j": "=",
        5: "k",
        1.5: "m",
    }
    assert parse_yaml("a: &x {b: 1, c: 2}\nd: {<<: *x, c: 3}") == {"a": {"b": 1, "c": 2}, "d": {"b": 1, "c": 3}}
    assert parse_yaml("") is None and parse_yaml("# nothing") is None


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"a": "${a}"}, "a: cannot resolve '${a}': Recursive interpolation detected"),
        ({"a": "${b}", "b": "${a}"}, "a: cannot resolve '${b}': Recursive interpolation detected"),
        ({"a": {"b": "${a}"}}, "a.b: cannot resolve '${a}': Interpolation to parent node detected"),
        ({"a": "${"}, "a: cannot resolve '${': not a valid interpolation (no viable alternative at input '${'); write"),
        ({"a": "${${b}}", "b": "c"}, "a: cannot resolve '${${b}}': Interpolation key 'c' not found"),
        ({"a": "${oc.env:NOT_SET_AT_ALL}"}, "Environment variable 'NOT_SET_AT_ALL' not found"),
        ({"a": "${oc.decode:'['}"}, "a: cannot resolve"),
        ({"a": "${unknown:1}"}, "Unsupported interpolation type unknown"),
        ({"a": "${.b}"}, "Interpolation key '.b' not found"),
        ({"a": "${}"}, "not a valid interpolation"),
        ({"a": "x" * 20_000 + "${b}", "b": 1}, "may have at most 20,000 characters; shorten it"),
        ({"a": "${b.2}", "b": [1]}, "a: cannot resolve '${b.2}': Interpolation key 'b.2' not found"),
        (
            {"b0": "0123456789"} | {f"b{i}": f"${{b{i - 1}}}${{b{i - 1}}}" for i in range(1, 41)},
            "interpolations produce more than 300000 characters; remove some",
        ),
        (
            {"b0": [0] * 9} | {f"b{i}": [f"${{b{i - 1}}}"] * 9 for i in range(1, 12)},
            "interpolations produce more than 300000 characters; remove some",
        ),
        (
            {f"b{i}": f"${{b{i + 1}}}" for i in range(2000)},
            "more than 40 interpolations refer to each other; write a value",
        ),
    ],
)
def test_hostile_interpolations(values: dict[str, Any], said: str) -> None:
    assert said in message_of(resolve, values)


def test_interpolations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCOREDIST3D_TEST", "0.5")
    values = {"a": 1, "b": {"c": [2, 3]}, "d": "${a}", "e": "x${d}y${b.c.1}", "f": "${b}", "g": "${f.c}", "m": "???"}
    values |= {"h": "\\${a}", "i": "\\\\${a}", "j": "\\\\\\${a}", "k": "50 \\% ${a}", "n": "${m}", "o": "x${m}"}
    resolved = resolve(values)
    assert (resolved["d"], resolved["e"], resolved["f"], resolved["g"]) == (1, "x1y3", {"c": [2, 3]}, [2, 3])
    assert (resolved["h"], resolved["i"], resolved["j"], resolved["k"]) == ("${a}", "\\1", "\\${a}", "50 \\% 1")
    assert resolved["n"] == resolved["o"] == "???"
    values = {"a": {"b": 2, "c": "${.b}", "d": "${..k}", "e": "${oc.env:SCOREDIST3D_TEST}"}, "k": "b", "f": "${a.${k}}"}
    values |= {"g": "${oc.decode:${oc.env:SCOREDIST3D_TEST}}", "h": "${oc.env:NOT_SET_AT_ALL,x}", "i": "${a}"}
    assert (block := resolve(values))["a"] == block["i"] == {"b": 2, "c": 2, "d": "b", "e": "0.5"}
    assert (block["f"], block["g"], block["h"]) == (2, 0.5, "x")
    resolved["f"]["c"].append(4)  # values are copies
    assert resolved["b"] == {"c": [2, 3]}


@pytest.mark.parametrize("text", ["${a}", "\\${a}", "\\\\${", "${", "a\\b", "${${a}}", "$", "\\", "100 % ${art}"])
def test_escaped_texts_are_kept(text: str) -> None:
    assert resolve({"a": escape_interpolations(text)}) == {"a": text}


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("name=" + "n" * 300, "name: must be a folder name of at most 200 bytes without control characters"),
        ("tag=a\x07", "tag: must be a folder name of at most 200 bytes without control characters, got 'a\\x07'"),
        ("output_root=''", "output_root: must be the path of a folder, got ''"),
        ('output_root="a\\0b"', "output_root: must be the path of a folder, got 'a\\x00b'"),
        ("seed=1e999", "seed: must be a whole number >= 0, got"),
        ("system.guidance.guidance_scale=1e999", "must be a number"),
        ("system.guidance.guidance_scale=" + "1" * 300, "is too large for a whole number"),
        ("system.guidance.type=" + "t" * 3000, "no guidance is called"),
        ("k" * 4000 + "=1", "unknown key"),
        ("system=5", "must be a block"),
    ],
)
def test_hostile_values(override: str, said: str) -> None:
    message = message_of(load_experiment, ["configs/fast.yaml"], ["prompt=a red mug", override])
    assert said in message and "\n" not in message


@pytest.mark.parametrize("name", ["p" * 4000, "a\\0b", "~nobody-here/model"])
def test_names_of_priors_that_are_no_folders(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The config is valid, and the run would look for a model on the hub."""
    arguments = [
        "--config",
        "configs/fast.yaml",
        "--dry-run",
        "prompt=a red mug",
        f'prior.pretrained_model_name_or_path="{name}"',
    ]
    assert cli.main([*arguments, "prior.type=diffusers"]) == cli.OK
    assert capsys.readouterr().err == ""


def test_values_in_python() -> None:
    assert "half of a character" in message_of(lambda: ExperimentConfig(prompt="\ud800"))
    assert shown(10**5000) == "a number with too many digits"
    assert "must be" in message_of(lambda: ExperimentConfig(prompt="a", seed=10**5000))
    with pytest.raises(ValueError, match="must be"):
        Schedule.parse({"from": 10**400, "to": 1, "end": 1})


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        ("{1: {}}", "prompt: is required but missing"),
        ("{a: {system: 5}, b: {system: 5}}", "system: must be a block"),
        ("{a: {system: {geometry: {type: [x]}}}, b: {}}", "stages.a.system.geometry.type: no geometry is called"),
        ("{a/b: {}}", "the name of a stage is a folder name"),
    ],
)
def test_hostile_stages(here: Path, stages: str, said: str) -> None:
    (here / "p.yaml").write_text(f"stages: {stages}\n")
    assert said in message_of(load_pipeline, ["p.yaml"])


def test_long_messages_are_cut(here: Path) -> None:
    (here / "a.yaml").write_text("".join(f"unknown{i}: {i}\n" for i in range(200)))
    with pytest.raises(ConfigError) as caught:
        load_experiment(["a.yaml"], ["prompt=x"])
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("unknown0: unknown key") and lines[-1] == f"... and {200 - len(lines) + 1} more mistakes"
    assert len(caught.value.full.splitlines()) == 200
    assert brief("a" * 600 + "; do this").endswith("; do this") and len(brief("a" * 600)) == MAX_MESSAGE
    assert brief("a\x07\ud800b\nc") == "a\\x07\\ud800b\nc"
    assert brief("x\n" * 400).endswith("... and 163 more mistakes") and len(brief("x\n" * 400)) <= MAX_MESSAGE

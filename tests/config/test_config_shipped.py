"""The configs that come with the program, against the components that come with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from scoredist3d import registry
from scoredist3d.config import ConfigError
from scoredist3d.config.describe import describe_component
from scoredist3d.config.fields import MISSING, field_types
from scoredist3d.config.loader import load
from scoredist3d.config.pipeline import load_pipeline
from scoredist3d.config.validation import dump, layers_to_yaml, load_experiment, parse_component, to_yaml, validate
from scoredist3d.config.walker import block_class, own_fields

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
FILES = sorted(CONFIGS.rglob("*.yaml"))
WITH_PROMPT = [file for file in FILES if "prompt" in yaml.safe_load(file.read_text())]
PIPELINES = [file for file in WITH_PROMPT if "stages" in yaml.safe_load(file.read_text())]
RECIPES = [file for file in WITH_PROMPT if file not in PIPELINES]
FRAGMENTS = [file for file in FILES if file not in WITH_PROMPT]


def label(file: Path) -> str:
    return str(file.relative_to(CONFIGS))


def components() -> list[tuple[str, str]]:
    return [(kind, name) for kind in registry.KINDS for name in registry.names(kind)]


@pytest.mark.parametrize("file", RECIPES, ids=label)
def test_a_recipe_validates_and_runs_again_from_its_saved_form(file: Path, tmp_path: Path) -> None:
    config = load_experiment([file], ["prompt=a red mug"])
    assert validate(dump(config)) == config
    saved = tmp_path / "resolved.yaml"
    saved.write_text(to_yaml(config), encoding="utf-8")
    assert load_experiment([saved]) == config


@pytest.mark.parametrize("file", PIPELINES, ids=label)
def test_a_pipeline_validates_and_runs_again_from_its_saved_form(file: Path, tmp_path: Path) -> None:
    pipeline = load_pipeline([file], ["prompt=a red mug"])
    saved = tmp_path / "pipeline.yaml"
    saved.write_text(layers_to_yaml(pipeline.written), encoding="utf-8")
    assert load_pipeline([saved]).stages == pipeline.stages


@pytest.mark.parametrize("file", PIPELINES, ids=label)
def test_a_pipeline_asks_for_its_prompt(file: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_pipeline([file])
    assert str(caught.value).startswith("prompt: is required but missing")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("file", RECIPES, ids=label)
def test_a_recipe_asks_for_its_prompt(file: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_experiment([file])
    assert str(caught.value).startswith("prompt: is required but missing")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("file", FRAGMENTS, ids=label)
def test_a_fragment_goes_on_top_of_the_fast_recipe(file: Path) -> None:
    method = yaml.safe_load(file.read_text()).get("system", {}).get("guidance", {}).get("type", "sds")
    edits = registry.lookup("guidance", method).cls.needs_source  # type: ignore[attr-defined]
    start = ["system.init_from=outputs/source"] if edits else []
    load_experiment([CONFIGS / "fast.yaml", file], ["prompt=a red mug", *start])


@pytest.mark.parametrize("prior", sorted((CONFIGS / "prior").glob("*.yaml")), ids=label)
def test_the_fragment_of_a_method_follows_that_of_a_prior(prior: Path) -> None:
    """The values of the method apply; those of the prior remain where the method has none."""
    for file in sorted((CONFIGS / "guidance").glob("*.yaml")):
        method = yaml.safe_load(file.read_text())["system"]["guidance"]
        edits = registry.lookup("guidance", method["type"]).cls.needs_source  # type: ignore[attr-defined]
        start = ["system.init_from=outputs/source"] if edits else []
        loaded = load_experiment([CONFIGS / "fast.yaml", prior, file], ["prompt=a red mug", *start])
        assert method.get("guidance_scale", ...) in (..., loaded.system.guidance.guidance_scale(0))


@pytest.mark.parametrize("name", ["gaussians-small", "sdf-small", "textured-mesh-small"])
def test_a_representation_on_top_of_the_quickstart_is_told_where_it_belongs(name: str) -> None:
    files = [CONFIGS / "quickstart.yaml", CONFIGS / "representation" / f"{name}.yaml"]
    with pytest.raises(ConfigError, match=r"would replace the geometry of every stage .*such as configs/fast\.yaml"):
        load_pipeline(files, ["prompt=a red mug"])


def test_both_recipes_of_the_first_command_are_there() -> None:
    fast = load_experiment([CONFIGS / "fast.yaml"], ["prompt=a red mug"])
    assert (fast.name, fast.system.geometry.type) == ("fast", "implicit-volume")
    stages = load_pipeline([CONFIGS / "quickstart.yaml"], ["prompt=a red mug"]).stages
    assert {config.name for config in stages.values()} == {"quickstart"}
    assert {name: config.system.geometry.type for name, config in stages.items()} == {
        "coarse": "implicit-sdf",
        "refine": "flexicubes",
    }


@pytest.mark.parametrize("file", FILES, ids=label)
def test_no_file_repeats_what_it_includes(file: Path) -> None:
    own = yaml.safe_load(file.read_text())
    includes = own.pop("include", [])
    includes = [includes] if isinstance(includes, str) else includes
    below = dict(leaves(load([file.parent / name if (file.parent / name).is_file() else name for name in includes])))
    repeated = [path for path, value in leaves(own) if value != "???" and below.get(path, MISSING) == value]
    assert repeated == []


def test_recipes_have_names_of_their_own() -> None:
    names = [yaml.safe_load(file.read_text())["name"] for file in WITH_PROMPT]
    assert len(set(names)) == len(names)


def test_every_component_documents_every_field() -> None:
    undocumented = []
    for kind, name in components():
        undocumented += [
            f"{kind}/{name}.{path}" for path in fields_without_help(registry.lookup(kind, name).config_cls)
        ]
    assert undocumented == []


def test_every_component_can_be_described_and_has_valid_defaults() -> None:
    for kind, name in components():
        assert f"{kind}/{name}" in describe_component(kind, name)
        required = [
            field.name
            for field in own_fields(registry.lookup(kind, name).config_cls)
            if field.default is MISSING and field.default_factory is MISSING
        ]
        if not required:
            config = parse_component(kind, {"type": name})
            assert parse_component(kind, dump(config)) == config


def leaves(value: Any, path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Any]]:
    """Path and value of everything but blocks; types and bare loss weights included."""
    if isinstance(value, dict) and value:
        return [leaf for key, item in value.items() for leaf in leaves(item, (*path, key))]
    return [(path, value)]


def fields_without_help(cls: type, prefix: str = "") -> list[str]:
    missing = []
    types = field_types(cls)
    for field in own_fields(cls):
        if not field.metadata.get("help"):
            missing.append(prefix + field.name)
        hint = types[field.name]
        nested = block_class(hint)
        if nested is not None and "component" not in field.metadata:
            missing += fields_without_help(nested, f"{prefix}{field.name}.")
    return missing

"""Configurations made in Python equal those of YAML, and build systems that train."""

from __future__ import annotations

import copy
import inspect
import pickle
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

import scoredist3d
from scoredist3d import registry
from scoredist3d.backgrounds.environment import Environment
from scoredist3d.config import Block, ConfigError, Schedule, option
from scoredist3d.config.experiment import ExperimentConfig, TrainerConfig
from scoredist3d.config.validation import dump, parse_component, validate
from scoredist3d.data.random_camera import RandomCamera
from scoredist3d.geometry.image_canvas import ImageCanvas
from scoredist3d.geometry.implicit_volume import ImplicitVolume
from scoredist3d.guidance.sds import ScoreDistillationSampling as SDS
from scoredist3d.losses.sparsity import Sparsity
from scoredist3d.priors.analytic import GaussianMixturePrior
from scoredist3d.renderers.volume import OccupancyConfig, VolumeRenderer
from scoredist3d.systems.text_to_2d import TextTo2D
from scoredist3d.systems.text_to_3d import TextTo3D

COMPONENTS = [(kind, name) for kind in registry.KINDS for name in registry.names(kind)]
REQUIRED: dict[str, dict[str, Any]] = {"sketch-shape": {"mesh": "chair.obj"}}
OWN_CONSTRUCTOR = {"image-canvas"}


def prior() -> GaussianMixturePrior:
    made: GaussianMixturePrior = scoredist3d.build(GaussianMixturePrior.Config(image_size=8))
    return made


@pytest.mark.parametrize(("kind", "name"), COMPONENTS)
def test_every_config_made_in_python_equals_the_one_of_yaml(kind: str, name: str) -> None:
    required = REQUIRED.get(name, {})
    ours = registry.lookup(kind, name).config_cls(**required)
    theirs = parse_component(kind, {"type": name, **required})
    assert ours == theirs and type(ours) is type(theirs)
    assert dump(ours) == dump(theirs)
    assert parse_component(kind, dump(ours)) == ours
    assert (ours.kind, ours.type) == (kind, name)
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), replace(ours)):
        assert twin == ours


def test_no_two_components_share_a_config() -> None:
    classes = [registry.lookup(kind, name).config_cls for kind, name in COMPONENTS]
    assert len(set(classes)) == len(classes)


@pytest.mark.parametrize(("kind", "name"), COMPONENTS)
def test_every_constructor_takes_the_arguments_of_its_kind(kind: str, name: str) -> None:
    parameters = list(inspect.signature(registry.lookup(kind, name).cls).parameters.values())
    assert parameters[0].name == "config"
    assert all(parameter.kind is inspect.Parameter.KEYWORD_ONLY for parameter in parameters[1:])
    taken = {parameter.name for parameter in parameters[1:]}
    if name not in OWN_CONSTRUCTOR:
        optional = {parameter.name for parameter in parameters[1:] if parameter.default is not inspect.Parameter.empty}
        assert taken - optional <= set(registry.ARGUMENTS[kind]) <= taken
        assert kind == "prior" or taken == set(registry.ARGUMENTS[kind])


def test_nested_blocks_may_be_configs_dicts_numbers_or_left_out() -> None:
    ours = TextTo3D.Config(
        geometry=ImplicitVolume.Config(grid={"num_levels": 3}),
        guidance=SDS.Config(guidance_scale=[0, 100, 7.5, 1000]),
        background={"type": "environment"},
        renderer=VolumeRenderer.Config(occupancy=OccupancyConfig(every=2)),
        loss={"sparsity": 0.1, "late": Sparsity.Config(weight=2), "opaque": None},
    )
    theirs = parse_component(
        "system",
        {
            "type": "text-to-3d",
            "geometry": {"type": "implicit-volume", "grid": {"num_levels": 3}},
            "guidance": {"type": "sds", "guidance_scale": {"from": 100, "to": 7.5, "end": 1000}},
            "background": {"type": "environment"},
            "renderer": {"occupancy": {"every": 2}},
            "loss": {"sparsity": 0.1, "late": {"type": "sparsity", "weight": 2}},
        },
    )
    assert ours == theirs
    assert ours.guidance.guidance_scale(0) == 100.0  # type: ignore[attr-defined]
    assert isinstance(ours.background, Environment.Config)
    assert ours.material.type == "unlit"


def test_a_whole_run_may_be_made_in_python() -> None:
    ours = ExperimentConfig(prompt="a mug", system=TextTo2D.Config(), trainer=TrainerConfig(max_steps=7))
    assert ours == validate({"prompt": "a mug", "system": {"type": "text-to-2d"}, "trainer": {"max_steps": 7}})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: SDS.Config(guidance_scal=20),
            "guidance_scal: unknown key (value 20). Did you mean 'guidance_scale'",
        ),
        (lambda: SDS.Config(type="csd"), "type: unknown key (value 'csd')."),
        (lambda: SDS.Config(grad_clip=-1), "grad_clip: must be a number > 0 or a schedule {"),
        (lambda: SDS.Config(guidance_scale=True), "guidance_scale: must be a number"),
        (
            lambda: TextTo3D.Config(guidance={"type": "sbs"}),
            "guidance.type: no guidance is called 'sbs'. Did you mean 'sds'?",
        ),
        (
            lambda: TextTo3D.Config(guidance=ImplicitVolume.Config()),
            "guidance: must be the Config of a registered guidance, got the Config of geometry/implicit-volume",
        ),
        (
            lambda: TextTo3D.Config(loss={"sparsity": {"wieght": 1}}),
            "loss.sparsity.wieght: unknown key (value 1). Did you mean 'weight'?",
        ),
        (lambda: TrainerConfig(max_steps=0), "max_steps: must be a whole number >= 1, got 0"),
        (lambda: ExperimentConfig(), "prompt: is required but missing"),
    ],
)
def test_mistakes_are_those_of_yaml(make: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make()
    assert str(caught.value).startswith(message)


def test_relations_are_checked_when_building() -> None:
    config = TextTo3D.Config(geometry=ImageCanvas.Config())
    with pytest.raises(ConfigError, match=r"^geometry\.type: image-canvas cannot be rendered"):
        scoredist3d.build(config, prior=prior(), prompt="a mug")


def test_values_assigned_later_are_checked_and_converted_when_building() -> None:
    config: Any = SDS.Config()
    config.guidance_scale = 20
    assert scoredist3d.build(config, prior=prior()).config.guidance_scale == Schedule.constant(20.0)
    config.guidance_scale = "high"
    with pytest.raises(ConfigError, match=r"^guidance_scale: must be a number"):
        scoredist3d.build(config, prior=prior())


def test_a_wrong_runtime_argument_names_component_and_choices() -> None:
    with pytest.raises(TypeError) as caught:
        scoredist3d.build(SDS.Config(), piror=prior())
    assert str(caught.value) == (
        "guidance/sds: unexpected argument 'piror'. Did you mean 'prior'? Arguments of a guidance: prior, rng"
    )
    with pytest.raises(TypeError, match="missing 1 required keyword-only argument: 'prior'"):
        scoredist3d.build(SDS.Config())
    with pytest.raises(ConfigError, match=r"^build needs the Config of a component, .* got dict$"):
        scoredist3d.build({"type": "sds"})  # type: ignore[arg-type]


def test_a_config_of_an_unregistered_class_is_refused() -> None:
    class Draft(SDS):
        @dataclass
        class Config(SDS.Config):
            extra: int = option(1, "More.", ge=0)

    with pytest.raises(ValueError, match=r"Draft\.Config is not the Config of a registered component"):
        Draft.Config.kind = ""
        scoredist3d.build(Draft.Config(), prior=prior())


def test_an_inherited_config_becomes_a_class_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry._entries, "guidance", dict(registry._entries["guidance"]))

    @registry.register("guidance", "sds-again", summary="For tests.")
    class Again(SDS):
        pass

    config = Again.Config(guidance_scale=3)
    assert (config.type, SDS.Config().type) == ("sds-again", "sds")
    assert isinstance(config, SDS.Config) and config != SDS.Config(guidance_scale=3)
    assert type(scoredist3d.build(config, prior=prior())) is Again


@dataclass
class Renamed(Block):
    """A block with a field that had another name."""

    bounds: float = option(1.0, "Bounds.", gt=0, aliases=("limit",))


def test_the_old_key_of_a_field_works_in_python() -> None:
    assert Renamed(limit=3) == Renamed(bounds=3.0)  # type: ignore[call-arg]


def test_a_system_without_further_arguments_trains() -> None:
    system = scoredist3d.build(
        TextTo3D.Config(geometry=ImplicitVolume.Config(), guidance=SDS.Config()), prior=prior(), prompt="blue blob"
    )
    assert isinstance(system.cameras, RandomCamera)
    before = system.geometry.table.detach().clone()
    losses: list[float] = []
    scoredist3d.fit(system, steps=2, on_step=lambda step, values: losses.append(values["loss"]))
    assert len(losses) == 2 and not torch.equal(system.geometry.table, before)


def test_an_unknown_name_of_the_package_is_an_error() -> None:
    with pytest.raises(AttributeError, match="module 'scoredist3d' has no attribute 'biuld'"):
        scoredist3d.biuld  # type: ignore[attr-defined]  # noqa: B018
    assert {"build", "fit"} <= set(dir(scoredist3d))


@dataclass
class Formats(Block):
    """A block whose text field accepts only some values."""

    names: list[str] = option(["glb"], "Formats.", choices=lambda: ("glb", "obj"))


def test_choices_are_looked_up_when_a_value_is_parsed() -> None:
    assert Formats(names=["obj"]).names == ["obj"]
    with pytest.raises(ConfigError, match=r"^names\.0: must be one of 'glb', 'obj', got 'gbl'\. Did you mean 'glb'\?$"):
        Formats(names=["gbl"])


def test_every_method_and_geometry_has_a_public_name() -> None:
    """``scoredist3d.SDS`` and the other short names are the registered classes."""
    public = {getattr(scoredist3d, name) for name in scoredist3d._LAZY if name not in ("build", "fit", "Rng")}
    for kind in ("guidance", "geometry"):
        assert {registry.lookup(kind, name).cls for name in registry.names(kind)} <= public
    assert scoredist3d.SDS.Config(guidance_scale=5).type == "sds"
    with pytest.raises(AttributeError, match="no attribute 'SSD'"):
        scoredist3d.SSD  # noqa: B018

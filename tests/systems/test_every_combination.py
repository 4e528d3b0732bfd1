"""Every method takes three steps with every representation and prior, or is refused with a one-line reason."""

from __future__ import annotations

import atexit
import functools
import math
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from shared.embedded import HALF
from shared.method_cases import METHODS, case
from shared.surface_scenes import write_cube
from torch import Tensor

from scoredist3d import registry
from scoredist3d.config import ConfigError
from scoredist3d.config.optimizer import OptimizerConfig
from scoredist3d.config.validation import parse_component
from scoredist3d.priors import Prior
from scoredist3d.seeding import Rng
from scoredist3d.systems.base import GuidedSystem
from scoredist3d.training.optimizer import build_optimizer

PRIORS: dict[str, dict[str, Any]] = {
    "gaussian-mixture": {"image_size": 8},
    # The embedded model at a quarter of its image area: 8 x 8 latents.
    "diffusers": HALF,
}
"""Options that make the priors small."""

TINY: dict[str, Any] = {"grid": {"num_levels": 2, "log2_hashmap_size": 6}, "network": {"hidden_width": 8}}


@functools.cache
def cube_file() -> Path:
    """A mesh file for textured-mesh, in a temporary folder of this process."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return write_cube(folder)


def on_surface(geometry: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "text-to-3d",
        "geometry": geometry,
        "renderer": {"type": "mesh-rasterizer"},
        "background": {"type": "environment"},
    }


REPRESENTATIONS: dict[str, list[dict[str, Any]]] = {
    "image-canvas": [
        {"type": "text-to-2d", "geometry": {"type": "image-canvas", "parametrisation": "latents", "particles": 2}},
        {"type": "text-to-2d", "geometry": {"type": "image-canvas", "parametrisation": "pixels", "particles": 1}},
    ],
    "implicit-volume": [
        {
            "type": "text-to-3d",
            "geometry": {
                "type": "implicit-volume",
                "grid": {"num_levels": 2, "log2_hashmap_size": 6},
                "network": {"hidden_width": 8},
            },
            "renderer": {"num_samples": 8, "occupancy": {"resolution": 8}},
            "background": {"type": "environment"},
        }
    ],
    "implicit-sdf": [
        {
            "type": "text-to-3d",
            "geometry": {
                "type": "implicit-sdf",
                "grid": {"num_levels": 2, "log2_hashmap_size": 6},
                "network": {"hidden_width": 8},
                "shape_init_resolution": 8,
            },
            "renderer": {"type": kind, "num_samples": 8, **options},
            "background": {"type": "environment"},
            "loss": {"eikonal": 0.1, "orientation": 0.1},
        }
        for kind, options in (
            ("volume", {"occupancy": {"resolution": 8}}),
            ("neus-volume", {"estimator": "proposal", "training_chunk": 20}),
        )
    ],
    "gaussians": [
        {
            "type": "text-to-3d",
            "geometry": {"type": "gaussians", "num_points": 64},
            "renderer": {"type": "gaussian-splatting"},
            "background": {"type": "environment"},
        }
    ],
    "dmtet": [on_surface({"type": "dmtet", "resolution": 8, **TINY})],
    "flexicubes": [on_surface({"type": "flexicubes", "resolution": 8, **TINY})],
    "textured-mesh": [on_surface({"type": "textured-mesh", "mesh": str(cube_file()), "texture_size": 16})],
}
"""Tiny systems by geometry; other geometries use their defaults."""

REFUSED: dict[tuple[str, str, str], str] = {}
"""Error message of each combination (method, prior, geometry) that cannot work."""

COMBINATIONS = [
    pytest.param(method, prior, index, geometry, id=f"{method}-{prior}-{geometry}{index or ''}")
    for prior in registry.names("prior")
    for geometry in registry.names("geometry")
    for index in range(len(REPRESENTATIONS.get(geometry, [{}])))
    for method in METHODS
    # Methods see latents, not geometries: with the large prior each of them runs on the first two representations.
    if prior == "gaussian-mixture" or geometry in ("image-canvas", "implicit-volume") or method in ("sds", "vsd")
]


@functools.cache
def prior_named(name: str) -> tuple[Prior, Tensor]:
    """The prior, and its output before any method has used it."""
    prior: Prior = registry.build(parse_component("prior", {"type": name, **PRIORS.get(name, {})}))
    return prior, probe(prior)


def block_of(method: str, geometry: str, index: int) -> dict[str, Any]:
    default = {"type": "text-to-3d", "geometry": {"type": geometry}}
    block = REPRESENTATIONS.get(geometry, [default])[index]
    return block | {"guidance": {"type": method, **case(method).options}}


def system_of(block: dict[str, Any], prior: Prior) -> GuidedSystem:
    cameras = parse_component("data", {"type": "random-camera", "batch_size": 1, "height": 8, "width": 8})
    prompt = "red left blob" if "blob" in (prior.vocabulary or ()) else "a red mug"
    system: GuidedSystem = registry.build(
        parse_component("system", block), prior=prior, prompt=prompt, cameras=registry.build(cameras), rng=Rng(1)
    )
    return system


def edited(block: dict[str, Any], prior: Prior) -> GuidedSystem:
    """A system that edits the scene of another run, or samples of the prior."""
    if block["type"] == "text-to-2d":
        return system_of(block | {"geometry": block["geometry"] | {"init_prompt": "red", "init_steps": 2}}, prior)
    source = system_of(block | {"guidance": {"type": "sds"}}, prior)
    system = system_of(block | {"init_from": "outputs/source"}, prior)
    system.init_from(source.state_dict())
    return system


def probe(prior: Prior) -> Tensor:
    """The prior's output for a fixed input."""
    shape = (2, *prior.latent_shape(prior.image_size, prior.image_size))
    x = torch.linspace(-1, 1, math.prod(shape)).reshape(shape)
    with torch.no_grad():
        return prior.predict(x, torch.tensor([0.3, 0.7]), prior.embed(["red"]).expand(2)).output


@pytest.mark.parametrize(("method", "prior", "index", "geometry"), COMBINATIONS)
def test_three_steps(method: str, prior: str, index: int, geometry: str) -> None:
    model, answer = prior_named(prior)
    block = block_of(method, geometry, index)
    try:
        editing = registry.lookup("guidance", method).cls.needs_source  # type: ignore[attr-defined]
        system = edited(block, model) if editing else system_of(block, model)
        take_three_steps(system)
    except ValueError as refusal:
        assert_says_why(str(refusal))
        expected = REFUSED.get((method, prior, geometry))
        assert expected, f"refused, and not in REFUSED: {refusal}"
        assert re.search(expected, str(refusal))
    else:
        assert (method, prior, geometry) not in REFUSED
    assert torch.equal(probe(model), answer), "the frozen prior answers differently now"


def take_three_steps(system: GuidedSystem) -> None:
    optimizer = build_optimizer(OptimizerConfig(lr=0.01, eps=1e-8), system.parameter_groups())
    before = {group["name"]: [p.detach().clone() for p in group["params"]] for group in system.parameter_groups()}
    for step in range(3):
        system.prepare_step(step, Rng())
        optimizer.zero_grad()
        result = system.training_step(step, Rng())
        result.loss.backward()
        optimizer.step()
        expected = {"guidance/t", "guidance/gradient_rms", "guidance/latent_rms", "loss/guidance", "weighted/guidance"}
        assert expected <= set(result.scalars)
        assert all(torch.as_tensor(value).isfinite().all() for value in result.scalars.values())
    for group in system.parameter_groups():
        pairs = list(zip(before[group["name"]], group["params"], strict=True))
        assert all(bool(after.isfinite().all()) for _, after in pairs)
        assert any(not torch.equal(old, new) for old, new in pairs), f"{group['name']} did not move"
    trainable = {id(p) for group in system.parameter_groups() for p in group["params"]}
    assert not trainable & {id(p) for p in system.prior.parameters()}


EDITING = [m for m in METHODS if registry.lookup("guidance", m).cls.needs_source]  # type: ignore[attr-defined]


@pytest.mark.parametrize("method", EDITING)
def test_an_edit_without_a_scene_names_the_missing_key(method: str) -> None:
    with pytest.raises(ConfigError, match="init_from") as refusal:
        parse_component("system", block_of(method, "implicit-volume", 0))
    assert_says_why(str(refusal.value))


@pytest.mark.parametrize("method", EDITING)
def test_an_edit_of_noise_warns(method: str, caplog: pytest.LogCaptureFixture) -> None:
    system_of(block_of(method, "image-canvas", 0), prior_named("gaussian-mixture")[0])
    (message,) = [record.getMessage() for record in caplog.records if "init_prompt" in record.getMessage()]
    assert_says_why(message)


def assert_says_why(message: str) -> None:
    """Check that a message is one line and names a key, as ``init_from: ...`` does."""
    assert "\n" not in message and len(message) < 400, message
    assert re.search(r"\b[a-z]+(_[a-z]+)+\b|\b[a-z_]+\.[a-z_]+\b|^[a-z_.]+:", message), message

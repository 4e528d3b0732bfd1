"""Models that were distilled for sampling without guidance are recognized by their files, and cause one warning."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from diffusers import EulerAncestralDiscreteScheduler, LCMScheduler
from shared.family_checks import copy_with, load
from shared.flux_2_folder import build_flux_2
from shared.flux_folder import build_flux
from shared.sdxl_folder import build_sdxl
from shared.stable_diffusion_folder import build_folder

from scoredist3d import registry
from scoredist3d.config.validation import parse_component
from scoredist3d.priors import Prior
from scoredist3d.seeding import Rng
from scoredist3d.systems.base import System

BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
Build = Callable[[Path], Path]


def stable_diffusion(folder: Path) -> Path:
    """Stable Diffusion 1.x, which predicts noise."""
    built = build_folder(folder / "made", camera=False, vae="kl")
    return copy_with(built, folder / "noise", "scheduler/scheduler_config.json", prediction_type="epsilon")


def with_scheduler(folder: Path, build: Build, kind: Any, **options: Any) -> Path:
    """A folder with another scheduler."""
    built = build(folder)
    kind(**BETAS, **options).save_pretrained(built / "scheduler")
    return copy_with(built, folder / "changed", scheduler=["diffusers", kind.__name__])


def distilled_klein(folder: Path) -> Path:
    """FLUX.2 klein as it is distributed, for four steps."""
    return copy_with(build_flux_2(folder / "base", klein=True), folder / "klein", is_distilled=True)


TRAILING: dict[str, Any] = {"kind": EulerAncestralDiscreteScheduler, "timestep_spacing": "trailing"}
DISTILLED: dict[str, tuple[Build, str]] = {
    "flux-schnell": (partial(build_flux, distilled=False), "no guidance_embeds"),
    "flux-2-klein": (distilled_klein, "is_distilled in its model_index.json"),
    "sdxl-turbo": (partial(with_scheduler, build=build_sdxl, **TRAILING), "the trailing timesteps of its scheduler"),
    "sd-turbo": (partial(with_scheduler, build=stable_diffusion, **TRAILING), "the trailing timesteps"),
    "lcm": (partial(with_scheduler, build=build_sdxl, kind=LCMScheduler), "the scheduler of latent consistency models"),
}
OTHERS: dict[str, Build] = {
    "flux-dev": build_flux,
    "flux-2-dev": build_flux_2,
    "flux-2-klein-base": partial(build_flux_2, klein=True),
    "sdxl": build_sdxl,
    "stable diffusion": stable_diffusion,
    "zero terminal snr": partial(with_scheduler, build=build_sdxl, rescale_betas_zero_snr=True, **TRAILING),
    "velocity": partial(with_scheduler, build=build_sdxl, prediction_type="v_prediction", **TRAILING),
}


def system(prior: Prior, scale: Any, **guidance: Any) -> System:
    """A system with one guidance scale, which may change during the run."""
    canvas = {"type": "image-canvas", "parametrisation": "latents"}
    block = {"type": "text-to-2d", "geometry": canvas, "guidance": {"type": "sds", "guidance_scale": scale, **guidance}}
    return registry.build(parse_component("system", block), prior=prior, prompt="a red mug", rng=Rng(0))


@pytest.mark.parametrize("name", DISTILLED)
def test_a_guidance_scale_causes_one_warning(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    build, evidence = DISTILLED[name]
    prior = load(build(tmp_path), image_size=16)
    with caplog.at_level(logging.WARNING):
        system(prior, 1.0)
        assert not caplog.records
        system(prior, 7.5)
        system(prior, 100.0)
    (record,) = caplog.records
    text = record.getMessage()
    assert f"(it has {evidence}" in text and "guidance_scale is 7.5; set it to 1, or ignore this" in text
    assert "\n" not in text


def test_a_scale_that_changes_counts_with_all_its_values(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    prior = load(build_flux(tmp_path, distilled=False), image_size=16)
    with caplog.at_level(logging.WARNING):
        system(prior, {"from": 1, "to": 5, "start": 0, "end": 10})
    assert len(caplog.records) == 1 and "guidance_scale is 5;" in caplog.text


@pytest.mark.parametrize("name", OTHERS)
def test_other_models_cause_none(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    prior = load(OTHERS[name](tmp_path), image_size=16)
    with caplog.at_level(logging.WARNING):
        system(prior, 7.5)
    assert prior.distilled is None and not caplog.records


@pytest.mark.parametrize("name", ["embedded", "embedded-flow"])
def test_the_packaged_models_are_not_distilled(name: str) -> None:
    assert load(Path(name)).distilled is None

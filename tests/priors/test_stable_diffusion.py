"""Stable Diffusion 1.x and 2.x: the prior equals the pipeline of diffusers, and methods distil from it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from shared.family_checks import (
    METHOD_CASES,
    NEGATIVE,
    PROMPTS,
    check_predictions,
    check_scheduler,
    conditions_of,
    copy_with,
    guided_steps,
    images,
    load,
    reference_pipeline,
    train,
)
from shared.family_suite import scaled_images, scaled_latents

Folders = Callable[..., Path]


@pytest.fixture(params=["v_prediction", "epsilon"])
def folder(request: pytest.FixtureRequest, folders: Folders, tmp_path: Path) -> Path:
    """A folder in the layout of Stable Diffusion 2.x (velocity) or 1.x (noise)."""
    options = {"prediction_type": request.param}
    return copy_with(folders(camera=False), tmp_path / "folder", "scheduler/scheduler_config.json", **options)


def reference(folder: Path) -> StableDiffusionPipeline:
    return reference_pipeline(StableDiffusionPipeline, folder, safety_checker=None, feature_extractor=None)


def test_predictions_are_the_pipelines(folder: Path) -> None:
    prior, pipeline = load(folder), reference(folder)
    steps = guided_steps(pipeline, prior, negative_prompt=[NEGATIVE] * 2, guidance_scale=7.5)
    check_predictions(prior, conditions_of(prior), 7.5, steps)
    check_scheduler(prior, pipeline.scheduler.alphas_cumprod)


def test_embeddings_images_and_latents_are_the_pipelines(folder: Path) -> None:
    prior, pipeline = load(folder), reference(folder)
    with torch.no_grad():
        text, empty = pipeline.encode_prompt(PROMPTS, torch.device("cpu"), 1, True)
        torch.testing.assert_close((prior.embed(PROMPTS).text, prior.embed(["", ""]).text), (text, empty))
        rgb = images(prior.image_size)
        latents = scaled_latents(pipeline.vae, 2.0 * rgb.movedim(-1, 1) - 1.0)
        torch.testing.assert_close(prior.encode(rgb), latents)
        decoded = 0.5 * scaled_images(pipeline.vae, latents) + 0.5
        torch.testing.assert_close(prior.decode(latents), decoded.movedim(1, -1))


@pytest.mark.parametrize("method", METHOD_CASES)
def test_methods_distil_from_it(method: str, folders: Folders) -> None:
    train(load(folders(camera=False)), method)

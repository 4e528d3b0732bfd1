"""The family of DeepFloyd IF's stage II: the prior equals the pipeline of diffusers, and methods distil from it."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, IFSuperResolutionPipeline
from shared.deepfloyd_folder import build_deepfloyd
from shared.family_checks import (
    EDITING_CASES,
    NEGATIVE,
    PROMPTS,
    UNEDITED_CASES,
    check_predictions,
    check_scheduler,
    images,
    load,
    normal,
    recorded,
    train,
)
from shared.family_suite import FamilyCase, FamilySuite
from torch.nn import functional

from scoredist3d.priors import CFGConditions
from scoredist3d.priors.deepfloyd_upscaler import ENLARGEMENT
from scoredist3d.priors.diffusers_prior import DiffusersPrior

SIDE = 16


def use_ddim(pipeline: IFSuperResolutionPipeline) -> None:
    """Give the pipeline a DDIM sampler, which reads no learned variance."""
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, timestep_spacing="trailing")
    pipeline.scheduler.register_to_config(variance_type="fixed_small")


FAMILY = FamilyCase(
    partial(build_deepfloyd, thresholding=False, stage=2),
    IFSuperResolutionPipeline,
    "UpscalingUNet",
    default_size=16,
    latents=(3, 16, 8),
    limit=77,
    parts=("unet", "text_encoder"),
    refused=(
        ({"image_noising_scheduler": [None, None]}, "has no image_noising_scheduler in its model_index.json"),
        (
            {"_class_name": "IFImg2ImgSuperResolutionPipeline"},
            r"\(IFImg2ImgSuperResolutionPipeline\) needs a low-resolution image",
        ),
    ),
    prepare=use_ddim,
    other_sibling="has no image_noising_scheduler in its model_index.json",
    encode=lambda vae, x: x,
    decode=lambda vae, latents: latents,
)


class TestFamily(FamilySuite):
    """The tests of every family; the methods that edit are below."""

    @pytest.mark.parametrize("method", UNEDITED_CASES)
    def test_methods_distil_from_it(self, method: str, prior: DiffusersPrior) -> None:
        train(prior, method)


@pytest.mark.parametrize("level", [None, 0, 700])
def test_predictions_are_the_pipelines(level: int | None, folder: Path, pipeline: Any) -> None:
    """The image of the pipeline is the reduced render, and its noise comes from the same generator."""
    prior = load(folder, noise_level=level)
    renders = normal(2, 3, SIDE, SIDE).clamp(-1, 1)
    small = (SIDE // ENLARGEMENT, SIDE // ENLARGEMENT)
    steps = recorded(
        pipeline,
        image=functional.interpolate(renders, small, mode="bilinear", antialias=True),
        prompt=PROMPTS,
        negative_prompt=[NEGATIVE] * 2,
        guidance_scale=4.0,
        num_inference_steps=4,
        generator=torch.Generator().manual_seed(3),
        clean_caption=False,
        output_type="pt",
        **({} if level is None else {"noise_level": level}),
    )
    generator = torch.Generator().manual_seed(3)
    torch.randn(2, 3, SIDE, SIDE, generator=generator)  # the initial noise of the pipeline
    texts = CFGConditions(prior.embed(PROMPTS), prior.embed([NEGATIVE] * 2))
    conditions = prior.with_image(texts, renders, generator)
    check_predictions(prior, conditions, 4.0, steps)
    check_scheduler(prior, pipeline.scheduler.alphas_cumprod)


def test_the_low_resolution_image_changes_the_prediction(prior: DiffusersPrior) -> None:
    text = CFGConditions(prior.embed(PROMPTS), prior.embed(PROMPTS))
    x_t, t = normal(2, 3, SIDE, SIDE), torch.tensor([0.3, 0.8])
    outputs = []
    for brightness in (-0.5, 0.5):
        image = torch.full((2, 3, SIDE, SIDE), brightness)
        conditions = prior.with_image(text, image, torch.Generator().manual_seed(0))
        with torch.no_grad():
            outputs.append(prior.predict(x_t, t, conditions.positive).output)
    assert (outputs[0] - outputs[1]).abs().mean() > 1e-3


def test_text_embeddings_are_the_pipelines(prior: DiffusersPrior, pipeline: Any) -> None:
    positive, unconditional = pipeline.encode_prompt(PROMPTS)
    torch.testing.assert_close(prior.embed(PROMPTS).text, positive)
    torch.testing.assert_close(prior.embed(["", ""]).text, unconditional)


def test_latents_are_images(prior: DiffusersPrior) -> None:
    rgb = images(SIDE)
    torch.testing.assert_close(prior.encode(rgb), 2.0 * rgb.movedim(-1, 1) - 1.0)
    torch.testing.assert_close(prior.decode(prior.encode(rgb)), rgb)


@pytest.mark.parametrize("method", EDITING_CASES)
def test_images_to_edit_cannot_be_drawn_without_stage_one(method: str, prior: DiffusersPrior) -> None:
    with pytest.raises(ValueError, match="needs a low-resolution image; add it to the conditions with"):
        train(prior, method)


def test_a_conditioning_without_image_is_named(prior: DiffusersPrior) -> None:
    with pytest.raises(ValueError, match="needs a low-resolution image; add it to the conditions with"):
        prior.predict(normal(1, 3, SIDE, SIDE), torch.tensor([0.5]), prior.embed(["a"]))

"""The family of Qwen-Image: the prior equals the pipeline of diffusers, and methods distil from it."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import QwenImagePipeline
from shared.family_checks import (
    KEY,
    NEGATIVE,
    check_predictions,
    conditions_of,
    copy_with,
    guided_steps,
    images,
    load,
    normal,
    t_of,
)
from shared.family_suite import FamilyCase, FamilySuite
from shared.qwen_image_folder import CHANNELS, SIDE, TEXT_WIDTH, build_qwen_image

from scoredist3d.priors import guided_prediction
from scoredist3d.priors.diffusers_loading import PriorError
from scoredist3d.priors.diffusers_prior import DiffusersPrior
from scoredist3d.priors.packed_latents import packed, unpacked

PIXELS = 8 * SIDE
_unpacked = partial(unpacked, like=normal(2, CHANNELS, SIDE, SIDE))


def statistics(vae: Any) -> list[torch.Tensor]:
    """Mean and standard deviation of each channel."""
    config = vae.config
    return [torch.tensor(values).view(1, -1, 1, 1, 1) for values in (config.latents_mean, config.latents_std)]


def encode(vae: Any, x: torch.Tensor) -> torch.Tensor:
    """Latents of one frame."""
    mean, std = statistics(vae)
    return ((vae.encode(x[:, :, None]).latent_dist.mode() - mean) / std)[:, :, 0]


def decode(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """Images of one frame."""
    mean, std = statistics(vae)
    return vae.decode(latents[:, :, None] * std + mean).sample[:, :, 0]


FAMILY = FamilyCase(
    build_qwen_image,
    QwenImagePipeline,
    "MaskedJointTransformer",
    default_size=1024,
    image_size=PIXELS,
    latents=(CHANNELS, 2, 1),
    limit=1058,
    tokens=1024,
    automatic="auto-bf16",
    refused=(
        ({"_class_name": "QwenImageEditPipeline"}, r"\(QwenImageEditPipeline\) has no unet; .* are supported"),
        ({"text_encoder": [None, None]}, "has no text_encoder in its model_index.json"),
    ),
    encode=encode,
    decode=decode,
)


class TestFamily(FamilySuite):
    """The tests of every family."""


def test_predictions_are_the_pipelines(prior: DiffusersPrior, pipeline: QwenImagePipeline) -> None:
    steps = guided_steps(pipeline, prior, latents=packed)
    steps = [replace(step, output=_unpacked(step.output), x_t=_unpacked(step.x_t)) for step in steps]
    check_predictions(prior, conditions_of(prior), 1.0, steps)


def test_guidance_is_the_pipelines_before_its_normalization(prior: DiffusersPrior, pipeline: QwenImagePipeline) -> None:
    """The pipeline scales each token of the guided prediction to the norm of the conditional one."""
    conditions = conditions_of(prior)
    for step in guided_steps(pipeline, prior, latents=packed, negative_prompt=[NEGATIVE] * 2, true_cfg_scale=4.0):
        x_t, t = _unpacked(step.x_t), torch.full((2,), t_of(prior.schedule, step.timestep))
        with torch.no_grad():
            guided, conditional = (
                packed(guided_prediction(prior, x_t, t, conditions, scale).output) for scale in (4.0, 1.0)
            )
        expected = guided * conditional.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True)
        torch.testing.assert_close(expected, step.output, rtol=1e-4, atol=1e-4)


def test_text_embeddings_and_masks_are_the_pipelines(prior: DiffusersPrior, pipeline: QwenImagePipeline) -> None:
    prompts = ["a red mug", "a blue chair, front view", ""]
    with torch.no_grad():
        text, mask = pipeline.encode_prompt(prompts)
    conditioning = prior.embed(prompts)
    assert conditioning.text.shape == (3, 1024, TEXT_WIDTH) and conditioning.mask is not None
    longest = text.shape[1]
    assert torch.equal(conditioning.mask[:, :longest], mask.float()) and not conditioning.mask[:, longest:].any()
    torch.testing.assert_close(conditioning.text[:, :longest], text)
    assert not conditioning.text[:, longest:].any()


def test_latents_are_drawn_from_the_generator(prior: DiffusersPrior) -> None:
    rgb = images(PIXELS)
    with torch.no_grad():
        latents, drawn = prior.encode(rgb), prior.encode(rgb, torch.Generator().manual_seed(0))
    assert drawn.shape == latents.shape and not torch.equal(drawn, latents)


def test_a_model_with_distilled_guidance_is_named(folder: Path, tmp_path: Path) -> None:
    distilled = copy_with(folder, tmp_path / "distilled", "transformer/config.json", guidance_embeds=True)
    with pytest.raises(PriorError, match=rf"{KEY}.* needs distilled guidance or layers of images"):
        load(distilled)

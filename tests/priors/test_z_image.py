"""The family of Z-Image: the prior equals the pipeline of diffusers, and methods distil from it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import ZImagePipeline
from shared.family_checks import (
    KEY,
    NEGATIVE,
    PROMPTS,
    check_predictions,
    conditions_of,
    copy_with,
    guided_steps,
    load,
)
from shared.family_suite import FamilyCase, FamilySuite
from shared.z_image_folder import CHANNELS, TEXT_WIDTH, build_z_image

from scoredist3d.diffusion.schedule import FlowSchedule
from scoredist3d.priors.diffusers_loading import PriorError
from scoredist3d.priors.diffusers_prior import DiffusersPrior

FAMILY = FamilyCase(
    build_z_image,
    ZImagePipeline,
    "SingleStreamTransformer",
    default_size=256,  # 128 latent pixels
    image_size=16,
    latents=(CHANNELS, 8, 4),
    limit=512,
    automatic="auto-bf16",
    refused=(
        ({"_class_name": "ZImageOmniPipeline"}, r"\(ZImageOmniPipeline\) has no unet; .* are supported"),
        ({"text_encoder": [None, None]}, "has no text_encoder in its model_index.json"),
    ),
)


class TestFamily(FamilySuite):
    """The tests of every family."""


def test_the_shift_is_the_schedulers(prior: DiffusersPrior) -> None:
    assert isinstance(prior.schedule, FlowSchedule) and prior.schedule.shift == 3.0


@pytest.mark.parametrize("scale", [0.0, 4.0])
def test_predictions_are_the_pipelines(scale: float, prior: DiffusersPrior, pipeline: ZImagePipeline) -> None:
    """The pipeline adds its guidance term to the conditional prediction, so its scale is smaller by 1."""
    steps = guided_steps(pipeline, prior, negative_prompt=[NEGATIVE] * 2, guidance_scale=scale)
    check_predictions(prior, conditions_of(prior), 1.0 + scale, steps)


def test_text_embeddings_and_masks_are_the_pipelines(prior: DiffusersPrior, pipeline: ZImagePipeline) -> None:
    prompts = [*PROMPTS, "", "{prompt} {}"]
    with torch.no_grad():
        texts, _ = pipeline.encode_prompt(list(prompts), do_classifier_free_guidance=False)
    conditioning = prior.embed(prompts)
    assert conditioning.text.shape == (4, 512, TEXT_WIDTH) and conditioning.mask is not None
    for text, mask, expected in zip(conditioning.text, conditioning.mask, texts, strict=True):
        torch.testing.assert_close(text[mask > 0], expected)
        assert 0 < len(expected) < 512


def test_a_model_with_image_features_is_named(folder: Path, tmp_path: Path) -> None:
    omni = copy_with(folder, tmp_path / "omni", "transformer/config.json", siglip_feat_dim=8)
    with pytest.raises(PriorError, match=rf"{KEY}.* needs image features or patches of another size"):
        load(omni)

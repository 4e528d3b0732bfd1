"""The family of AuraFlow: the prior equals the pipeline of diffusers, and methods distil from it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import AuraFlowPipeline
from shared.aura_flow_folder import CHANNELS, LARGEST, SHIFT, TEXT_WIDTH, build_aura_flow
from shared.family_checks import (
    KEY,
    NEGATIVE,
    PROMPTS,
    check_predictions,
    conditions_of,
    copy_with,
    guided_steps,
    load,
    normal,
)
from shared.family_suite import FamilyCase, FamilySuite

from scoredist3d.diffusion.schedule import FlowSchedule
from scoredist3d.priors.diffusers_loading import PriorError
from scoredist3d.priors.diffusers_prior import DiffusersPrior

FAMILY = FamilyCase(
    build_aura_flow,
    AuraFlowPipeline,
    "AuraFlowTransformer",
    default_size=256,  # 128 latent pixels
    image_size=16,
    latents=(CHANNELS, 8, 4),
    limit=256,
    refused=(
        ({"_class_name": "AuraFlowInpaintPipeline"}, r"\(AuraFlowInpaintPipeline\) has no unet; .* are supported"),
        ({"tokenizer": [None, None]}, "has no tokenizer in its model_index.json"),
    ),
)


class TestFamily(FamilySuite):
    """The tests of every family."""


@pytest.mark.parametrize("scale", [1.0, 3.5])
def test_predictions_are_the_pipelines(scale: float, prior: DiffusersPrior, pipeline: AuraFlowPipeline) -> None:
    steps = guided_steps(pipeline, prior, negative_prompt=[NEGATIVE] * 2, guidance_scale=scale)
    assert isinstance(prior.schedule, FlowSchedule) and prior.schedule.shift == SHIFT
    check_predictions(prior, conditions_of(prior), scale, steps)


def test_text_embeddings_are_the_pipelines(prior: DiffusersPrior, pipeline: AuraFlowPipeline) -> None:
    """Padding is zero, and the transformer attends to it."""
    with torch.no_grad():
        text, mask, empty, _ = pipeline.encode_prompt([*PROMPTS, ""])
    conditioning = prior.embed([*PROMPTS, ""])
    assert conditioning.text.shape == (3, 256, TEXT_WIDTH) and conditioning.mask is None
    torch.testing.assert_close(conditioning.text, text)
    torch.testing.assert_close(prior.embed([""] * 3).text, empty)
    kept = mask.reshape(text.shape).bool()
    assert bool(conditioning.text[kept].any()) and not conditioning.text[~kept].any() and not kept.all()


def test_images_beyond_the_positions_are_named(folder: Path, prior: DiffusersPrior, tmp_path: Path) -> None:
    """The network would take wrong positions without an error."""
    with pytest.raises(PriorError, match=rf"^prior\.image_size: .* positions of {4 * LARGEST} pixels; .* of 2048"):
        load(folder, image_size=2048)
    with pytest.raises(ValueError, match=f"takes latents of at most {2 * LARGEST} pixels, not"):
        prior.predict(normal(1, CHANNELS, 2, 2 * LARGEST + 2), torch.tensor([0.5]), prior.embed(PROMPTS[:1]))


def test_the_autoencoder_does_not_overflow(folder: Path, tmp_path: Path) -> None:
    """It is that of Stable Diffusion XL, which stays in float32 if its configuration says so."""
    assert load(folder, precision="fp16").codec.dtype == torch.float32
    repaired = copy_with(folder, tmp_path / "repaired", "vae/config.json", force_upcast=False)
    assert load(repaired, precision="fp16").codec.dtype == torch.float16


def test_a_tokenizer_without_padding_is_named(folder: Path, tmp_path: Path) -> None:
    """The class of this tokenizer has no padding token of its own."""
    changed = copy_with(folder, tmp_path / "changed", "tokenizer/tokenizer_config.json", pad_token=None)
    with pytest.raises(PriorError, match=rf"{KEY}the tokenizer of .* has no padding token in its configuration"):
        load(changed)

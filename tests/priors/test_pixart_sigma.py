"""The family of PixArt-Sigma: the prior equals the pipeline of diffusers, and methods distil from it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, PixArtSigmaPipeline
from shared.deepfloyd_folder import TEXT_WIDTH
from shared.family_checks import (
    NEGATIVE,
    PROMPTS,
    check_predictions,
    check_scheduler,
    conditions_of,
    copy_with,
    guided_steps,
    load,
    normal,
)
from shared.family_suite import FamilyCase, FamilySuite
from shared.pixart_folder import SIDE, build_pixart

from scoredist3d.cameras import orbit
from scoredist3d.priors import Conditioning
from scoredist3d.priors.diffusers_loading import PriorError
from scoredist3d.priors.diffusers_prior import DiffusersPrior
from scoredist3d.prompts.processor import PromptProcessor


def use_ddim(pipeline: PixArtSigmaPipeline) -> None:
    """Give the pipeline a DDIM sampler."""
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)


FAMILY = FamilyCase(
    build_pixart,
    PixArtSigmaPipeline,
    "MaskedTransformer",
    default_size=16,
    latents=(4, 8, 4),
    limit=300,
    refused=(
        ({"_class_name": "PixArtAlphaPipeline"}, r"\(PixArtAlphaPipeline\) has no unet; .* are supported"),
        ({"transformer": ["diffusers", "HunyuanDiT2DModel"]}, "its transformer, a HunyuanDiT2DModel"),
        ({"tokenizer": [None, None]}, "has no tokenizer in its model_index.json"),
    ),
    prepare=use_ddim,
)


class TestFamily(FamilySuite):
    """The tests of every family."""


def test_sides_become_multiples_of_the_patches(prior: DiffusersPrior) -> None:
    """The transformer's patches have 4 pixels each."""
    assert prior.encode(torch.zeros(1, 24, 38, 3)).shape == (1, 4, 8, 12)


def test_predictions_are_the_pipelines(prior: DiffusersPrior, pipeline: Any) -> None:
    options = {"clean_caption": False, "use_resolution_binning": False}
    steps = guided_steps(pipeline, prior, negative_prompt=NEGATIVE, guidance_scale=4.5, **options)
    check_predictions(prior, conditions_of(prior), 4.5, steps)
    check_scheduler(prior, pipeline.scheduler.alphas_cumprod)


def test_text_embeddings_and_masks_are_the_pipelines(prior: DiffusersPrior, pipeline: Any) -> None:
    with torch.no_grad():
        text, mask, empty, empty_mask = pipeline.encode_prompt(PROMPTS)
    positive, unconditional = prior.embed(PROMPTS), prior.embed(["", ""])
    assert positive.text.shape == (2, 300, TEXT_WIDTH) and positive.pooled is None
    torch.testing.assert_close((positive.text, unconditional.text), (text, empty))
    for conditioning, expected in ((positive, mask), (unconditional, empty_mask)):
        assert conditioning.mask is not None and torch.equal(conditioning.mask, expected.float())
        assert 0 < conditioning.mask.sum() < conditioning.mask.numel()


def test_the_mask_hides_padding(prior: DiffusersPrior) -> None:
    x_t, t, text = normal(2, 4, SIDE, SIDE), torch.tensor([0.3, 0.8]), prior.embed(PROMPTS)
    assert text.mask is not None
    changed = replace(text, text=text.text + 1.0 - text.mask[..., None])
    everything = replace(changed, mask=torch.ones_like(text.mask))
    with torch.no_grad():
        outputs = [prior.predict(x_t, t, each).output for each in (text, changed, everything)]
    torch.testing.assert_close(outputs[0], outputs[1])
    assert (outputs[0] - outputs[2]).abs().mean() > 1e-4


def test_prompt_processing_keeps_masks(prior: DiffusersPrior) -> None:
    """Perp-Neg mixes prompts: tokens of each of them are attended to."""
    config = PromptProcessor.Config(perp_neg=True, view_dependent="always")
    processor = PromptProcessor(config, prior=prior, prompt=PROMPTS[0])
    cameras = orbit(*(torch.tensor(values) for values in ([45.0, 135.0], [0.0, 0.0], [2.0, 2.0], [40.0, 40.0])), 16, 16)
    conditions = processor(cameras)
    everything: list[Conditioning] = [conditions.positive, conditions.unconditional]
    everything += [conditioning for conditioning, _ in conditions.negatives]
    assert all(each.mask is not None for each in everything)
    front, side = (prior.embed([processor.texts[view]]).mask for view in ("front", "side"))
    assert front is not None and side is not None and conditions.positive.mask is not None
    assert torch.equal(conditions.positive.mask[:1], torch.maximum(front, side))


def test_a_folder_of_an_earlier_version_is_the_same_model(folder: Path, prior: DiffusersPrior, tmp_path: Path) -> None:
    earlier = copy_with(folder, tmp_path / "earlier", transformer=["diffusers", "Transformer2DModel"])
    config = earlier / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"_class_name": "Transformer2DModel"}))
    x_t, t = normal(2, 4, SIDE, SIDE), torch.tensor([0.3, 0.8])
    with torch.no_grad():
        outputs = [model.predict(x_t, t, prior.embed(PROMPTS)).output for model in (load(earlier), prior)]
    torch.testing.assert_close(*outputs)


def test_the_older_family_is_named(folder: Path, tmp_path: Path) -> None:
    alpha = copy_with(folder, tmp_path / "alpha", "transformer/config.json", use_additional_conditions=True)
    with pytest.raises(PriorError, match=r"needs a resolution and an aspect ratio \(PixArt-Alpha\)"):
        load(alpha)

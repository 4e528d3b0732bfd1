"""The family of Sana: the prior equals the pipeline of diffusers, and methods distil from it."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import SanaPipeline
from shared.family_checks import KEY, PROMPTS, check_predictions, conditions_of, copy_with, guided_steps, load
from shared.family_suite import FamilyCase, FamilySuite
from shared.sana_folder import CHANNELS, SHIFT, TEXT_WIDTH, build_sana

from scoredist3d.diffusion.schedule import FlowSchedule
from scoredist3d.priors.diffusers_loading import PriorError
from scoredist3d.priors.diffusers_prior import DiffusersPrior
from scoredist3d.priors.sana import instruction

LINES = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
TOKENS = 1 + len(instruction()) + 298
"""Tokens of the instruction and of a prompt: a first one, single letters and bytes, and the prompt's."""

FAMILY = FamilyCase(
    build_sana,
    SanaPipeline,
    "SanaTransformer",
    default_size=16,
    latents=(CHANNELS, 4, 2),
    limit=TOKENS,
    tokens=300,
    automatic="auto-bf16",
    refused=(
        ({"_class_name": "SanaSprintPipeline"}, r"\(SanaSprintPipeline\) has no unet; .* are supported"),
        ({"text_encoder": [None, None]}, "has no text_encoder in its model_index.json"),
    ),
    encode=lambda vae, x: vae.encode(x).latent * vae.config.scaling_factor,
    decode=lambda vae, latents: vae.decode(latents / vae.config.scaling_factor).sample,
)


class TestFamily(FamilySuite):
    """The tests of every family."""


@pytest.mark.parametrize("negative", ["", "a front view"])
def test_predictions_are_the_pipelines(negative: str, prior: DiffusersPrior, pipeline: SanaPipeline) -> None:
    """The prior reads every prompt after the instruction, also a negative one; the pipeline does not read that so."""
    options: dict[str, Any] = {"use_resolution_binning": False, "clean_caption": False, "guidance_scale": 4.5}
    conditions = conditions_of(prior, negative)
    if negative:
        unconditional = conditions.unconditional.expand(2)
        options |= {
            "negative_prompt": None,
            "negative_prompt_embeds": unconditional.text,
            "negative_prompt_attention_mask": unconditional.mask,
        }
    pipeline.check_inputs = lambda *arguments: None  # it requires sides that are multiples of 32
    steps = guided_steps(pipeline, prior, **options)
    del pipeline.check_inputs
    assert isinstance(prior.schedule, FlowSchedule) and prior.schedule.shift == SHIFT
    check_predictions(prior, conditions, 4.5, steps)


def test_text_embeddings_and_masks_are_the_pipelines(prior: DiffusersPrior, pipeline: SanaPipeline) -> None:
    prompts = ["a red mug", "  A blue chair, front view ", "{prompt} {}"]
    with torch.no_grad():
        text, mask, empty, empty_mask = pipeline.encode_prompt(prompts, complex_human_instruction=LINES)
    for texts, expected, expected_mask in ((prompts, text, mask), ([""] * 3, empty, empty_mask)):
        conditioning = prior.embed(texts)
        assert conditioning.text.shape == (3, 300, TEXT_WIDTH) and conditioning.mask is not None
        torch.testing.assert_close(conditioning.text, expected)
        assert torch.equal(conditioning.mask, expected_mask.float())
        assert 0 < conditioning.mask.sum() < conditioning.mask.numel()
    mixed = prior.embed([prompts[0], ""])
    torch.testing.assert_close(mixed.text, torch.stack([text[0], empty[0]]))


def test_the_shift_is_the_solvers(prior: DiffusersPrior, pipeline: SanaPipeline) -> None:
    """The solver's timesteps are those of its noise levels, without fractions."""
    pipeline.scheduler.set_timesteps(4)
    sigmas = prior.schedule.sigma(torch.linspace(1.0, 0.25, 4, dtype=torch.float64) * 0.999)
    torch.testing.assert_close(sigmas, pipeline.scheduler.sigmas[:4].double(), rtol=1e-5, atol=1e-5)


def test_a_model_with_distilled_guidance_is_named(folder: Path, tmp_path: Path) -> None:
    sprint = copy_with(folder, tmp_path / "sprint", "transformer/config.json", guidance_embeds=True)
    with pytest.raises(PriorError, match=rf"{KEY}.* needs distilled guidance \(Sana Sprint\)"):
        load(sprint)


def test_the_mask_hides_padding(prior: DiffusersPrior) -> None:
    conditioning = prior.embed(PROMPTS)
    assert conditioning.mask is not None
    changed = type(conditioning)(conditioning.text + 1.0 - conditioning.mask[..., None], mask=conditioning.mask)
    x_t, t = torch.zeros(2, CHANNELS, 4, 4), torch.tensor([0.3, 0.8])
    with torch.no_grad():
        outputs = [prior.predict(x_t, t, each).output for each in (conditioning, changed)]
    torch.testing.assert_close(*outputs)

"""The family of Qwen-Image: the prior equals the pipeline of diffusers, and methods distil from it."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import QwenImagePipeline
from shared.family_checks import (
    LONG,
    METHOD_CASES,
    NEGATIVE,
    PROMPTS,
    check_predictions,
    copy_with,
    images,
    load,
    normal,
    recorded,
    t_of,
    train,
    truncated,
)
from shared.qwen_image_folder import CHANNELS, SIDE, TEXT_WIDTH, build_qwen_image

from scoredist3d.priors import CFGConditions, guided_prediction
from scoredist3d.priors.diffusers_loading import PriorError
from scoredist3d.priors.diffusers_prior import DiffusersPrior
from scoredist3d.priors.packed_latents import packed, unpacked

KEY = r"^prior\.pretrained_model_name_or_path: "
PIXELS = 8 * SIDE


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_qwen_image(tmp_path_factory.mktemp("qwen-image"))


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> QwenImagePipeline:
    with torch.random.fork_rng(devices=[]):  # networks draw their first weights before they load those of the files
        loaded = QwenImagePipeline.from_pretrained(folder)
    loaded.set_progress_bar_config(disable=True)
    return loaded


@pytest.fixture(scope="module")
def prior(folder: Path) -> DiffusersPrior:
    return load(folder, image_size=PIXELS)


def test_the_family_is_recognized(folder: Path, prior: DiffusersPrior) -> None:
    assert type(prior.denoiser).__name__ == "MaskedJointTransformer"
    assert (prior.image_size, prior.latent_shape(32, 16)) == (PIXELS, (CHANNELS, 4, 2))
    assert load(folder).image_size == 1024
    assert prior.denoiser._precision == "auto-bf16"


def test_predictions_are_the_pipelines(prior: DiffusersPrior, pipeline: QwenImagePipeline) -> None:
    steps = recorded(
        pipeline,
        prompt=PROMPTS,
        num_inference_steps=4,
        height=PIXELS,
        width=PIXELS,
        latents=packed(normal(2, CHANNELS, SIDE, SIDE)),
    )
    like = normal(2, CHANNELS, SIDE, SIDE)
    steps = [replace(step, output=unpacked(step.output, like), x_t=unpacked(step.x_t, like)) for step in steps]
    check_predictions(prior, CFGConditions(prior.embed(PROMPTS), prior.embed([NEGATIVE])), 1.0, steps)


def test_guidance_is_the_pipelines_before_its_normalization(prior: DiffusersPrior, pipeline: QwenImagePipeline) -> None:
    """The pipeline scales each token of the guided prediction to the norm of the conditional one."""
    steps = recorded(
        pipeline,
        prompt=PROMPTS,
        negative_prompt=[NEGATIVE] * 2,
        true_cfg_scale=4.0,
        num_inference_steps=4,
        height=PIXELS,
        width=PIXELS,
        latents=packed(normal(2, CHANNELS, SIDE, SIDE)),
    )
    conditions = CFGConditions(prior.embed(PROMPTS), prior.embed([NEGATIVE]))
    for step in steps:
        x_t = unpacked(step.x_t, normal(2, CHANNELS, SIDE, SIDE))
        t = torch.full((2,), t_of(prior.schedule, step.timestep))
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


def test_images_and_latents_are_the_pipelines(prior: DiffusersPrior, pipeline: QwenImagePipeline) -> None:
    vae, rgb = pipeline.vae, images(PIXELS)
    mean, std = (
        torch.tensor(values).view(1, -1, 1, 1, 1) for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    with torch.no_grad():
        encoded = vae.encode(2.0 * rgb.movedim(-1, 1)[:, :, None] - 1.0).latent_dist.mode()
        latents = ((encoded - mean) / std)[:, :, 0]
        torch.testing.assert_close(prior.encode(rgb), latents)
        decoded = 0.5 * vae.decode(latents[:, :, None] * std + mean).sample[:, :, 0] + 0.5
        torch.testing.assert_close(prior.decode(latents), decoded.movedim(1, -1))
    drawn = prior.encode(rgb, torch.Generator().manual_seed(0))
    assert drawn.shape == latents.shape and not torch.equal(drawn, latents)
    rgb.requires_grad_()
    prior.encode(rgb).square().sum().backward()
    assert rgb.grad is not None and bool(rgb.grad.isfinite().all()) and bool(rgb.grad.any())


@pytest.mark.parametrize("method", METHOD_CASES)
def test_methods_distil_from_it(method: str, prior: DiffusersPrior) -> None:
    train(prior, method)


def test_a_long_prompt_is_cut_with_a_warning(prior: DiffusersPrior, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        cut = prior.embed([LONG])
    assert cut.mask is not None and cut.mask.all()
    assert len(caplog.records) == 1 and "longer than the prior's limit of 1058 tokens" in caplog.text


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder"])
def test_a_truncated_file_is_named(part: str, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(PriorError, match=rf"{KEY}the {part} of .* cannot be loaded"):
        load(truncated(folder, tmp_path / "cut", part))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_class_name": "QwenImageEditPipeline"}, r"\(QwenImageEditPipeline\) has no unet; .* are supported"),
        ({"text_encoder": [None, None]}, "has no text_encoder in its model_index.json"),
    ],
)
def test_other_pipelines_are_named(changes: dict[str, Any], message: str, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(PriorError, match=rf"{KEY}.*{message}"):
        load(copy_with(folder, tmp_path / "other", **changes))


def test_what_does_not_fit_is_named(folder: Path, prior: DiffusersPrior, tmp_path: Path) -> None:
    assert prior.sibling(str(folder), key="guidance.phi.model").channels == CHANNELS
    with pytest.raises(PriorError, match=r"guidance\.phi\.model: .* has no transformer of class QwenImageTransformer"):
        prior.sibling("embedded", key="guidance.phi.model")
    distilled = copy_with(folder, tmp_path / "distilled", "transformer/config.json", guidance_embeds=True)
    with pytest.raises(PriorError, match=rf"{KEY}.* needs distilled guidance or layers of images"):
        load(distilled)

"""The family of Z-Image: the prior equals the pipeline of diffusers, and methods distil from it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ZImagePipeline
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
    train,
    truncated,
)
from shared.z_image_folder import CHANNELS, SIDE, TEXT_WIDTH, build_z_image

from scoredist3d.diffusion.schedule import FlowSchedule
from scoredist3d.priors import CFGConditions
from scoredist3d.priors.diffusers_loading import PriorError
from scoredist3d.priors.diffusers_prior import DiffusersPrior

KEY = r"^prior\.pretrained_model_name_or_path: "


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_z_image(tmp_path_factory.mktemp("z-image"))


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> ZImagePipeline:
    with torch.random.fork_rng(devices=[]):  # networks draw their first weights before they load those of the files
        loaded = ZImagePipeline.from_pretrained(folder)
    loaded.set_progress_bar_config(disable=True)
    return loaded


@pytest.fixture(scope="module")
def prior(folder: Path) -> DiffusersPrior:
    return load(folder, image_size=16)


def test_the_family_is_recognized(folder: Path, prior: DiffusersPrior) -> None:
    assert type(prior.denoiser).__name__ == "SingleStreamTransformer"
    assert (prior.image_size, prior.latent_shape(16, 8)) == (16, (CHANNELS, 8, 4))
    assert load(folder).image_size == 256  # 128 latent pixels
    assert isinstance(prior.schedule, FlowSchedule) and prior.schedule.shift == 3.0
    assert prior.denoiser._precision == "auto-bf16"


@pytest.mark.parametrize("scale", [0.0, 4.0])
def test_predictions_are_the_pipelines(scale: float, prior: DiffusersPrior, pipeline: ZImagePipeline) -> None:
    """The pipeline adds its guidance term to the conditional prediction, so its scale is smaller by 1."""
    steps = recorded(
        pipeline,
        prompt=list(PROMPTS),
        negative_prompt=[NEGATIVE] * 2,
        guidance_scale=scale,
        num_inference_steps=4,
        height=16,
        width=16,
        latents=normal(2, CHANNELS, SIDE, SIDE),
    )
    conditions = CFGConditions(prior.embed(PROMPTS), prior.embed([NEGATIVE]))
    check_predictions(prior, conditions, 1.0 + scale, steps)


def test_text_embeddings_and_masks_are_the_pipelines(prior: DiffusersPrior, pipeline: ZImagePipeline) -> None:
    prompts = [*PROMPTS, "", "{prompt} {}"]
    with torch.no_grad():
        texts, _ = pipeline.encode_prompt(list(prompts), do_classifier_free_guidance=False)
    conditioning = prior.embed(prompts)
    assert conditioning.text.shape == (4, 512, TEXT_WIDTH) and conditioning.mask is not None
    for text, mask, expected in zip(conditioning.text, conditioning.mask, texts, strict=True):
        torch.testing.assert_close(text[mask > 0], expected)
        assert 0 < len(expected) < 512


def test_images_and_latents_are_the_pipelines(prior: DiffusersPrior, pipeline: Any) -> None:
    vae, rgb = pipeline.vae, images(16)
    scale, shift = vae.config.scaling_factor, vae.config.shift_factor
    with torch.no_grad():
        latents = (vae.encode(2.0 * rgb.movedim(-1, 1) - 1.0).latent_dist.mode() - shift) * scale
        torch.testing.assert_close(prior.encode(rgb), latents)
        decoded = 0.5 * vae.decode(latents / scale + shift).sample + 0.5
        torch.testing.assert_close(prior.decode(latents), decoded.movedim(1, -1))


@pytest.mark.parametrize("method", METHOD_CASES)
def test_methods_distil_from_it(method: str, prior: DiffusersPrior) -> None:
    train(prior, method)


def test_a_long_prompt_is_cut_with_a_warning(prior: DiffusersPrior, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        cut = prior.embed([LONG])
    assert cut.mask is not None and cut.mask.all()
    assert len(caplog.records) == 1 and "longer than the prior's limit of 512 tokens" in caplog.text


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder"])
def test_a_truncated_file_is_named(part: str, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(PriorError, match=rf"{KEY}the {part} of .* cannot be loaded"):
        load(truncated(folder, tmp_path / "cut", part))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_class_name": "ZImageOmniPipeline"}, r"\(ZImageOmniPipeline\) has no unet; .* are supported"),
        ({"text_encoder": [None, None]}, "has no text_encoder in its model_index.json"),
    ],
)
def test_other_pipelines_are_named(changes: dict[str, Any], message: str, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(PriorError, match=rf"{KEY}.*{message}"):
        load(copy_with(folder, tmp_path / "other", **changes))


def test_what_does_not_fit_is_named(folder: Path, prior: DiffusersPrior, tmp_path: Path) -> None:
    assert prior.sibling(str(folder), key="guidance.phi.model").channels == CHANNELS
    with pytest.raises(PriorError, match=r"guidance\.phi\.model: .* has no transformer of class ZImageTransformer"):
        prior.sibling("embedded", key="guidance.phi.model")
    omni = copy_with(folder, tmp_path / "omni", "transformer/config.json", siglip_feat_dim=8)
    with pytest.raises(PriorError, match=rf"{KEY}.* needs image features or patches of another size"):
        load(omni)

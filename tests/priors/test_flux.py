"""The family of FLUX.1: the prior equals the pipeline of diffusers, and methods distil from it."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline
from shared.deepfloyd_folder import TEXT_WIDTH
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
from shared.flux_folder import CHANNELS, POOLED_WIDTH, SIDE, build_flux

from scoredist3d.diffusion.schedule import FlowSchedule
from scoredist3d.priors import CFGConditions
from scoredist3d.priors.diffusers_loading import PriorError
from scoredist3d.priors.diffusers_prior import DiffusersPrior
from scoredist3d.priors.flux import positions
from scoredist3d.priors.packed_latents import packed, unpacked

KEY = r"^prior\.pretrained_model_name_or_path: "


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_flux(tmp_path_factory.mktemp("flux"))


@pytest.fixture(scope="module")
def schnell(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_flux(tmp_path_factory.mktemp("schnell"), distilled=False)


def reference(folder: Path) -> FluxPipeline:
    with torch.random.fork_rng(devices=[]):  # networks draw their first weights before they load those of the files
        loaded = FluxPipeline.from_pretrained(folder)
    loaded.set_progress_bar_config(disable=True)
    return loaded


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> FluxPipeline:
    return reference(folder)


@pytest.fixture(scope="module")
def prior(folder: Path) -> DiffusersPrior:
    return load(folder, image_size=16)


def test_the_family_is_recognized_and_short(folder: Path, prior: DiffusersPrior) -> None:
    assert type(prior.denoiser).__name__ == "GuidedTransformer"
    assert (prior.image_size, prior.latent_shape(16, 8)) == (16, (CHANNELS, 8, 4))
    assert load(folder).image_size == 256  # the pipeline's default of 128 latent pixels
    assert prior.denoiser._precision == "auto-bf16" and load(folder, precision="fp16").dtype == torch.float16
    # Sides become multiples of the transformer's patches, of 4 pixels each.
    assert prior.encode(torch.zeros(1, 24, 38, 3)).shape == (1, CHANNELS, 8, 12)
    source = Path("scoredist3d/priors/flux.py").read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 120


def test_latents_are_packed_as_in_the_pipeline(pipeline: FluxPipeline) -> None:
    x = normal(2, CHANNELS, 6, 4)
    tokens = pipeline._pack_latents(x, 2, CHANNELS, 6, 4)
    torch.testing.assert_close(packed(x), tokens)
    torch.testing.assert_close(unpacked(tokens, x), x)
    expected = pipeline._prepare_latent_image_ids(2, 3, 2, torch.device("cpu"), torch.float32)
    torch.testing.assert_close(positions(x), expected)


@pytest.mark.parametrize("side", [16, 32])
def test_the_shift_depends_on_the_size(side: int, folder: Path) -> None:
    """The pipeline's sigmas at this number of tokens, for a grid of four steps."""
    loaded = load(folder, image_size=side)
    pipeline = reference(folder)
    latents = normal(1, (side // 4) ** 2, 4 * CHANNELS)
    pipeline(PROMPTS[:1], height=side, width=side, num_inference_steps=4, latents=latents, output_type="latent")
    assert isinstance(loaded.schedule, FlowSchedule)
    sigmas = loaded.schedule.sigma(torch.tensor([1.0, 0.75, 0.5, 0.25], dtype=torch.float64))
    torch.testing.assert_close(sigmas, pipeline.scheduler.sigmas[:4].double(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("true_scale", [1.0, 4.0])
@pytest.mark.parametrize("distilled", [None, 7.0])
def test_predictions_are_the_pipelines(
    true_scale: float, distilled: float | None, folder: Path, pipeline: FluxPipeline
) -> None:
    loaded = load(folder, image_size=16, distilled_guidance=distilled)
    check_steps(loaded, pipeline, true_scale, {} if distilled is None else {"guidance_scale": distilled})


def test_predictions_of_schnell_are_the_pipelines(schnell: Path) -> None:
    check_steps(load(schnell, image_size=16), reference(schnell), 1.0, {})


def check_steps(loaded: DiffusersPrior, pipeline: FluxPipeline, true_scale: float, guidance: dict[str, float]) -> None:
    steps = recorded(
        pipeline,
        prompt=PROMPTS,
        negative_prompt=[NEGATIVE] * 2,
        true_cfg_scale=true_scale,
        num_inference_steps=4,
        height=16,
        width=16,
        latents=packed(normal(2, CHANNELS, SIDE, SIDE)),
        **guidance,
    )
    like = normal(2, CHANNELS, SIDE, SIDE)
    steps = [replace(step, output=unpacked(step.output, like), x_t=unpacked(step.x_t, like)) for step in steps]
    conditions = CFGConditions(loaded.embed(PROMPTS), loaded.embed([NEGATIVE]))
    check_predictions(loaded, conditions, true_scale, steps)


def test_the_distilled_guidance_changes_the_prediction(folder: Path, prior: DiffusersPrior) -> None:
    x_t, t, text = normal(2, CHANNELS, SIDE, SIDE), torch.tensor([0.3, 0.8]), prior.embed(PROMPTS)
    with torch.no_grad():
        outputs = [
            load(folder, image_size=16, distilled_guidance=scale).predict(x_t, t, text).output for scale in (1.0, 9.0)
        ]
    assert (outputs[0] - outputs[1]).abs().mean() > 1e-3


def test_text_embeddings_are_the_pipelines(prior: DiffusersPrior, pipeline: FluxPipeline) -> None:
    with torch.no_grad():
        text, pooled, _ = pipeline.encode_prompt([*PROMPTS, ""])
    conditioning = prior.embed([*PROMPTS, ""])
    assert conditioning.text.shape == (3, 512, TEXT_WIDTH) and conditioning.mask is None
    torch.testing.assert_close((conditioning.text, conditioning.pooled), (text, pooled))
    assert pooled.shape == (3, POOLED_WIDTH) and not torch.allclose(pooled[0], pooled[1])


def test_images_and_latents_are_the_pipelines(prior: DiffusersPrior, pipeline: FluxPipeline) -> None:
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
    """Only T5's limit is told: CLIP reads the beginning for the pooled embedding."""
    with caplog.at_level(logging.WARNING):
        prior.embed([LONG])
    assert len(caplog.records) == 1 and "longer than the prior's limit of 512 tokens" in caplog.text


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder", "text_encoder_2"])
def test_a_truncated_file_is_named(part: str, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(PriorError, match=rf"{KEY}the {part} of .* cannot be loaded"):
        load(truncated(folder, tmp_path / "cut", part))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_class_name": "FluxFillPipeline"}, r"\(FluxFillPipeline\) has no unet; .* are supported"),
        ({"transformer": ["diffusers", "ChromaTransformer2DModel"]}, "its transformer, a ChromaTransformer2DModel"),
        ({"text_encoder_2": [None, None]}, "has no text_encoder_2 in its model_index.json"),
    ],
)
def test_other_pipelines_are_named(changes: dict[str, Any], message: str, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(PriorError, match=rf"{KEY}.*{message}"):
        load(copy_with(folder, tmp_path / "other", **changes))


def test_what_does_not_fit_is_named(folder: Path, schnell: Path, prior: DiffusersPrior) -> None:
    assert prior.sibling(str(folder), key="guidance.phi.model").channels == CHANNELS
    with pytest.raises(PriorError, match=r"guidance\.phi\.model: .* has no transformer of class FluxTransformer"):
        prior.sibling("embedded", key="guidance.phi.model")
    with pytest.raises(PriorError, match=r"guidance\.phi\.model: the noise schedule of .* is not the prior's"):
        prior.sibling(str(schnell), key="guidance.phi.model")
    with pytest.raises(PriorError, match=r"^prior\.distilled_guidance: .* has no such input; remove the option"):
        load(schnell, distilled_guidance=3.5)

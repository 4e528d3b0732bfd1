"""The family of Stable Diffusion XL: the prior equals the pipeline of diffusers, and methods distil from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, EulerAncestralDiscreteScheduler, StableDiffusionXLPipeline
from shared.family_checks import (
    KEY,
    NEGATIVE,
    PROMPTS,
    check_predictions,
    check_scheduler,
    conditions_of,
    copy_with,
    guided_steps,
    images,
    load,
    normal,
)
from shared.family_suite import FamilyCase, FamilySuite
from shared.sdxl_folder import SIDE, build_sdxl

from scoredist3d.priors.diffusers_loading import PriorError
from scoredist3d.priors.diffusers_prior import DiffusersPrior


def use_ddim(pipeline: StableDiffusionXLPipeline) -> None:
    """Give the pipeline a DDIM sampler, whose latents are those of the prior; Euler's have other units."""
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)


FAMILY = FamilyCase(
    build_sdxl,
    StableDiffusionXLPipeline,
    "SizedUNet",
    default_size=16,
    latents=(4, 8, 4),
    limit=12,
    parts=("unet", "vae", "text_encoder_2"),
    refused=(
        ({"_class_name": "KolorsPipeline"}, r"\(KolorsPipeline\) needs pooled text embeddings and image sizes"),
        ({"text_encoder_2": [None, None]}, "has no text_encoder_2 in its model_index.json"),
        ({"unet": [None, None]}, "has no unet"),
    ),
    pipeline_options={"add_watermarker": False},
    prepare=use_ddim,
    other_sibling="needs conditions of type addition_embed_type=None",
)


class TestFamily(FamilySuite):
    """The tests of every family."""


@pytest.mark.parametrize(
    "sizes",
    [{}, {"original_size": (1024, 768), "crop_top_left": (3, 5), "target_size": (512, 640)}],
    ids=["default sizes", "given sizes"],
)
def test_predictions_are_the_pipelines(
    sizes: dict[str, Any], folder: Path, pipeline: StableDiffusionXLPipeline
) -> None:
    prior = load(folder, **{name: list(value) for name, value in sizes.items()})
    renamed = {"crop_top_left": "crops_coords_top_left"}
    options = {renamed.get(name, name): value for name, value in sizes.items()}
    steps = guided_steps(pipeline, prior, negative_prompt=[NEGATIVE] * 2, guidance_scale=5.0, **options)
    check_predictions(prior, conditions_of(prior), 5.0, steps)
    check_scheduler(prior, pipeline.scheduler.alphas_cumprod)


def test_sizes_and_pooled_embedding_change_the_prediction(folder: Path, prior: DiffusersPrior) -> None:
    x_t, t, text = normal(2, 4, SIDE, SIDE), torch.tensor([0.3, 0.8]), prior.embed(PROMPTS)
    with torch.no_grad():
        plain = prior.predict(x_t, t, text).output
        sized = load(folder, original_size=[1024, 1024]).predict(x_t, t, text).output
        pooled = prior.predict(x_t, t, type(text)(text.text, pooled=text.pooled.flip(0))).output
    assert (plain - sized).abs().mean() > 1e-3 and (plain - pooled).abs().mean() > 1e-3


def test_text_embeddings_are_the_pipelines(folder: Path, prior: DiffusersPrior, pipeline: Any, tmp_path: Path) -> None:
    with torch.no_grad():
        text, empty, pooled, empty_pooled = pipeline.encode_prompt(PROMPTS)
        _, encoded, _, encoded_pooled = pipeline.encode_prompt(PROMPTS, negative_prompt=["", ""])
    positive, unconditional = prior.embed(PROMPTS), prior.embed(["", ""])
    torch.testing.assert_close((positive.text, positive.pooled), (text, pooled))
    torch.testing.assert_close((unconditional.text, unconditional.pooled), (empty, empty_pooled))
    assert not unconditional.text.any()
    other = load(copy_with(folder, tmp_path / "other", force_zeros_for_empty_prompt=False)).embed(["", ""])
    torch.testing.assert_close((other.text, other.pooled), (encoded, encoded_pooled))


def test_images_of_the_pipeline_itself_are_the_priors(prior: DiffusersPrior, pipeline: Any) -> None:
    rgb = images(16)
    with torch.no_grad():
        latents = pipeline.vae.encode(pipeline.image_processor.preprocess(rgb.numpy())).latent_dist.mode()
        latents = latents * pipeline.vae.config.scaling_factor
        torch.testing.assert_close(prior.encode(rgb), latents)
        decoded = pipeline(
            PROMPTS, num_inference_steps=1, output_type="latent", latents=latents, guidance_scale=1.0
        ).images
        image = pipeline.vae.decode(decoded / pipeline.vae.config.scaling_factor).sample
        torch.testing.assert_close(prior.decode(decoded), (0.5 * image + 0.5).movedim(1, -1))


def test_the_mean_and_deviation_of_latents_are_used(folder: Path, tmp_path: Path) -> None:
    mean, std, scale = [-1.0, 0.5, 2.0, 0.1], [2.0, 3.0, 0.5, 1.0], 0.5
    numbers = {"latents_mean": mean, "latents_std": std, "scaling_factor": scale}
    prior = load(copy_with(folder, tmp_path / "other", "vae/config.json", **numbers))
    latents = normal(1, 4, SIDE, SIDE)
    channels = [torch.tensor(values).view(1, 4, 1, 1) for values in (mean, std)]
    with torch.no_grad():
        image = prior.codec.network.decode(latents * channels[1] / scale + channels[0]).sample
        torch.testing.assert_close(prior.decode(latents), (0.5 * image + 0.5).movedim(1, -1))
        encoded = prior.codec.network.encode(2.0 * images(16).movedim(-1, 1) - 1.0).latent_dist.mode()
        torch.testing.assert_close(prior.encode(images(16)), (encoded - channels[0]) * scale / channels[1])


@pytest.mark.parametrize(("upcast", "dtype"), [(True, torch.float32), (False, torch.float16)])
def test_the_autoencoder_does_not_overflow(upcast: bool, dtype: torch.dtype, folder: Path, tmp_path: Path) -> None:
    prior = load(copy_with(folder, tmp_path / "other", "vae/config.json", force_upcast=upcast), precision="fp16")
    assert (prior.codec.dtype, prior.dtype) == (dtype, torch.float16)
    # auto is fp16 on CUDA for the denoiser; the autoencoder stays in fp32 on every device.
    automatic = load(tmp_path / "other")
    assert automatic.codec._precision == ("fp32" if upcast else "auto")


def test_the_turbo_variant_is_the_same_family(folder: Path, tmp_path: Path, prior: DiffusersPrior) -> None:
    turbo = copy_with(folder, tmp_path / "turbo", scheduler=["diffusers", "EulerAncestralDiscreteScheduler"])
    EulerAncestralDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="trailing"
    ).save_pretrained(turbo / "scheduler")
    loaded = load(turbo)
    t = torch.linspace(0.0, 1.0, 11)
    torch.testing.assert_close(loaded.schedule.coefficients(t), prior.schedule.coefficients(t))
    assert type(loaded.denoiser) is type(prior.denoiser)


def test_a_refiner_and_a_wrong_option_are_named(folder: Path, tmp_path: Path) -> None:
    inputs = {"projection_class_embeddings_input_dim": 5 * 8 + 16}
    refiner = copy_with(folder, tmp_path / "refiner", "unet/config.json", **inputs)
    with pytest.raises(PriorError, match=rf"{KEY}.* takes 5 image sizes, not 6; use a base or turbo model"):
        load(refiner)
    with pytest.raises(PriorError, match=r"^prior\.original_size: .* has no such input; remove the option"):
        load(Path("embedded"), original_size=[64, 64])

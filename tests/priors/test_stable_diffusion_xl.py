"""The family of Stable Diffusion XL: the prior equals the pipeline of diffusers, and methods distil from it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, EulerAncestralDiscreteScheduler, StableDiffusionXLPipeline
from shared.family_checks import (
    LONG,
    METHOD_CASES,
    NEGATIVE,
    PROMPTS,
    check_predictions,
    check_scheduler,
    copy_with,
    images,
    load,
    normal,
    recorded,
    train,
    truncated,
)
from shared.sdxl_folder import SIDE, build_sdxl

from scoredist3d.priors import CFGConditions
from scoredist3d.priors.diffusers_loading import PriorError
from scoredist3d.priors.diffusers_prior import DiffusersPrior

KEY = r"^prior\.pretrained_model_name_or_path: "


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_sdxl(tmp_path_factory.mktemp("sdxl"))


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> Iterator[StableDiffusionXLPipeline]:
    """The pipeline with a DDIM sampler, whose latents are those of the prior; Euler's have other units."""
    with torch.random.fork_rng(devices=[]):  # networks draw their first weights before they load those of the files
        loaded = StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False)
    loaded.scheduler = DDIMScheduler.from_config(loaded.scheduler.config)
    loaded.set_progress_bar_config(disable=True)
    yield loaded


@pytest.fixture(scope="module")
def prior(folder: Path) -> DiffusersPrior:
    return load(folder)


def test_the_family_is_recognized_and_short(prior: DiffusersPrior) -> None:
    assert type(prior.denoiser).__name__ == "SizedUNet"
    assert (prior.image_size, prior.latent_shape(16, 8)) == (16, (4, 8, 4))
    source = Path("scoredist3d/priors/stable_diffusion_xl.py").read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 120


@pytest.mark.parametrize(
    "sizes",
    [{}, {"original_size": (1024, 768), "crop_top_left": (3, 5), "target_size": (512, 640)}],
    ids=["default sizes", "given sizes"],
)
def test_predictions_are_the_pipelines(
    sizes: dict[str, Any], folder: Path, pipeline: StableDiffusionXLPipeline
) -> None:
    prior = load(folder, **{name: list(value) for name, value in sizes.items()})
    conditions = CFGConditions(prior.embed(PROMPTS), prior.embed([NEGATIVE]))
    renamed = {"crop_top_left": "crops_coords_top_left"}
    steps = recorded(
        pipeline,
        prompt=PROMPTS,
        negative_prompt=[NEGATIVE] * 2,
        guidance_scale=5.0,
        num_inference_steps=4,
        latents=normal(2, 4, SIDE, SIDE),
        **{renamed.get(name, name): value for name, value in sizes.items()},
    )
    check_predictions(prior, conditions, 5.0, steps)
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


def test_images_and_latents_are_the_pipelines(prior: DiffusersPrior, pipeline: Any) -> None:
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


@pytest.mark.parametrize("method", METHOD_CASES)
def test_methods_distil_from_it(method: str, prior: DiffusersPrior) -> None:
    train(prior, method)


def test_a_long_prompt_is_cut_with_a_warning(prior: DiffusersPrior, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        cut = prior.embed([LONG])
    assert cut.text.shape[1] == 12 and "longer than the prior's limit of 12 tokens" in caplog.text
    assert len(caplog.records) == 1, "both encoders cut the same text"


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder_2"])
def test_a_truncated_file_is_named(part: str, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(PriorError, match=rf"{KEY}the {part} of .* cannot be loaded"):
        load(truncated(folder, tmp_path / "cut", part))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_class_name": "KolorsPipeline"}, r"\(KolorsPipeline\) needs pooled text embeddings and image sizes"),
        ({"text_encoder_2": [None, None]}, "has no text_encoder_2 in its model_index.json"),
        ({"unet": [None, None]}, "has no unet"),
    ],
)
def test_other_pipelines_are_named(changes: dict[str, Any], message: str, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(PriorError, match=rf"{KEY}.*{message}"):
        load(copy_with(folder, tmp_path / "other", **changes))


def test_a_refiner_and_a_wrong_option_are_named(folder: Path, tmp_path: Path) -> None:
    inputs = {"projection_class_embeddings_input_dim": 5 * 8 + 16}
    refiner = copy_with(folder, tmp_path / "refiner", "unet/config.json", **inputs)
    with pytest.raises(PriorError, match=rf"{KEY}.* takes 5 image sizes, not 6; use a base or turbo model"):
        load(refiner)
    with pytest.raises(PriorError, match=r"^prior\.original_size: .* has no such input; remove the option"):
        load(Path("embedded"), original_size=[64, 64])

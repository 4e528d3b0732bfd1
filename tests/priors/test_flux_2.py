"""The family of FLUX.2: the prior equals the pipelines of diffusers, and methods distil from it."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import Flux2KleinPipeline, Flux2Pipeline
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu
from shared.family_checks import (
    DEFAULT,
    Step,
    check_predictions,
    conditions_of,
    copy_with,
    guided_steps,
    load,
    normal,
    reference_pipeline,
    train,
)
from shared.family_suite import FamilyCase, FamilySuite
from shared.flux_2_folder import CHANNELS, SIDE, TEXT_WIDTH, build_flux_2
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from scoredist3d.diffusion.schedule import FlowSchedule
from scoredist3d.priors import guided_prediction
from scoredist3d.priors.diffusers_loading import PriorError
from scoredist3d.priors.diffusers_prior import DiffusersPrior
from scoredist3d.priors.flux_2 import shift_exponent


def add_tokenizer(pipeline: Flux2Pipeline) -> None:
    """Give the pipeline the tokenizer of its processor, which needs torchvision; both have the same chat template."""
    path = Path(pipeline.transformer.config._name_or_path).parent / "tokenizer"
    pipeline.register_modules(tokenizer=PreTrainedTokenizerFast.from_pretrained(path))


def _statistics(vae: Any) -> tuple[Tensor, Tensor]:
    mean, variance = (values.view(1, -1, 1, 1) for values in (vae.bn.running_mean, vae.bn.running_var))
    return mean, (variance + vae.config.batch_norm_eps).sqrt()


def encode(vae: Any, x: Tensor) -> Tensor:
    """Normalized patches, by the functions of the pipeline."""
    mean, std = _statistics(vae)
    return (Flux2Pipeline._patchify_latents(vae.encode(x).latent_dist.mode()) - mean) / std


def decode(vae: Any, latents: Tensor) -> Tensor:
    """Images of normalized patches, by the functions of the pipeline."""
    mean, std = _statistics(vae)
    return vae.decode(Flux2Pipeline._unpatchify_latents(latents * std + mean)).sample


FAMILY = FamilyCase(
    build_flux_2,
    Flux2Pipeline,
    "Flux2Transformer",
    default_size=256,  # 64 patches, each of 2 x 2 latent pixels, of 2 pixels here
    image_size=16,
    latents=(4 * CHANNELS, 4, 2),
    limit=512,
    automatic="auto-bf16",
    refused=(
        ({"_class_name": "Flux2KleinInpaintPipeline"}, r"\(Flux2KleinInpaintPipeline\) has no unet; .* are supported"),
        ({"tokenizer": [None, None]}, "has no tokenizer in its model_index.json"),
    ),
    pipeline_options={"tokenizer": None},
    prepare=add_tokenizer,
    encode=encode,
    decode=decode,
)


class TestFamily(FamilySuite):
    """The tests of every family, with the dev model."""


@pytest.fixture(scope="module")
def klein(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_flux_2(tmp_path_factory.mktemp("klein"), klein=True)


@pytest.fixture(scope="module")
def klein_prior(klein: Path) -> DiffusersPrior:
    return load(klein, image_size=16)


@pytest.fixture(scope="module")
def klein_pipeline(klein: Path) -> Flux2KleinPipeline:
    return reference_pipeline(Flux2KleinPipeline, klein)


def unpacked(steps: list[Step]) -> list[Step]:
    """Steps whose tokens are latents."""
    return [
        replace(step, **{name: getattr(step, name).mT.unflatten(2, (SIDE, SIDE)) for name in ("output", "x_t")})
        for step in steps
    ]


@pytest.mark.parametrize("distilled", [None, 2.5])
def test_predictions_are_the_pipelines(distilled: float | None, folder: Path, pipeline: Flux2Pipeline) -> None:
    loaded = load(folder, image_size=16, distilled_guidance=distilled)
    steps = guided_steps(pipeline, loaded, **({} if distilled is None else {"guidance_scale": distilled}))
    check_predictions(loaded, conditions_of(loaded), 1.0, unpacked(steps))


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_predictions_of_klein_are_the_pipelines(
    scale: float, klein_prior: DiffusersPrior, klein_pipeline: Flux2KleinPipeline
) -> None:
    steps = guided_steps(klein_pipeline, klein_prior, guidance_scale=scale)
    check_predictions(klein_prior, conditions_of(klein_prior, ""), scale, unpacked(steps))


def test_true_guidance_of_dev_combines_distilled_predictions(prior: DiffusersPrior) -> None:
    """The pipeline has no negative prompt."""
    conditions = conditions_of(prior)
    x_t, t = normal(2, 4 * CHANNELS, SIDE, SIDE), torch.tensor([0.3, 0.8])
    with torch.no_grad():
        guided = guided_prediction(prior, x_t, t, conditions, 3.0).output
        negative, positive = (
            prior.predict(x_t, t, each.expand(2)).output for each in (conditions.unconditional, conditions.positive)
        )
    torch.testing.assert_close(guided, negative + 3.0 * (positive - negative), rtol=1e-4, atol=1e-4)
    assert (guided - positive).abs().mean() > 1e-3


@pytest.mark.parametrize(("steps", "side"), [(50, 16), (50, 32), (4, 16)])
def test_the_shift_is_the_pipelines(steps: int, side: int, folder: Path, pipeline: Flux2Pipeline) -> None:
    """It depends on the number of sampling steps; the prior's is that of the default number."""
    loaded = load(folder, image_size=side)
    tokens = (side // 4) ** 2
    noise = normal(1, 4 * CHANNELS, side // 4, side // 4)
    text = torch.zeros(1, 1, 3 * TEXT_WIDTH)
    pipeline(
        prompt_embeds=text, latents=noise, height=side, width=side, num_inference_steps=steps, output_type="latent"
    )
    schedule = FlowSchedule(math.exp(shift_exponent(tokens, steps))) if steps != 50 else loaded.schedule
    grid = torch.linspace(1.0, 1.0 / steps, steps, dtype=torch.float64)
    torch.testing.assert_close(schedule.sigma(grid), pipeline.scheduler.sigmas[:-1].double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tokens", [1, 1024, 4300, 4301, 16384])
@pytest.mark.parametrize("steps", [4, 50, 200])
def test_the_exponent_of_the_shift_is_the_pipelines(tokens: int, steps: int) -> None:
    assert shift_exponent(tokens, steps) == pytest.approx(compute_empirical_mu(tokens, steps), rel=1e-9)


def test_a_fixed_shift_is_kept(folder: Path, tmp_path: Path) -> None:
    fixed = copy_with(folder, tmp_path / "fixed", "scheduler/scheduler_config.json", use_dynamic_shifting=False)
    schedule = load(fixed).schedule
    assert isinstance(schedule, FlowSchedule) and schedule.shift == 3.0


@pytest.mark.parametrize("name", ["dev", "klein"])
def test_text_embeddings_are_the_pipelines(name: str, request: pytest.FixtureRequest) -> None:
    prefix = {"dev": "", "klein": "klein_"}[name]
    reference, loaded = (request.getfixturevalue(f"{prefix}{each}") for each in ("pipeline", "prior"))
    prompts = ["a red mug", "an [IMG] of {prompt} {}", ""]
    with torch.no_grad():
        text, _ = reference.encode_prompt(list(prompts))
    conditioning = loaded.embed(prompts)
    assert conditioning.text.shape == (3, 512, 3 * TEXT_WIDTH) and conditioning.mask is None
    torch.testing.assert_close(conditioning.text, text, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(text[0], text[1], atol=0.1)


@pytest.mark.parametrize("method", DEFAULT)
def test_methods_distil_from_klein(method: str, klein_prior: DiffusersPrior) -> None:
    train(klein_prior, method)


def test_every_layer_has_adapters(prior: DiffusersPrior) -> None:
    """The parallel layers join query, key, value and the MLP in one projection."""
    names = {path.rpartition("attn.")[2] for path in prior.adapter_points().linears}
    joint = {"to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"}
    assert names == joint | {"to_qkv_mlp_proj", "to_out"}


def test_klein_has_no_distilled_guidance(klein: Path) -> None:
    with pytest.raises(PriorError, match=r"^prior\.distilled_guidance: .* has no such input; remove the option"):
        load(klein, distilled_guidance=3.5)

"""The family of FLUX.1: the prior equals the pipeline of diffusers, and methods distil from it."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline
from shared.deepfloyd_folder import TEXT_WIDTH
from shared.family_checks import PROMPTS, check_predictions, conditions_of, guided_steps, load, normal
from shared.family_suite import FamilyCase, FamilySuite
from shared.flux_folder import CHANNELS, POOLED_WIDTH, SIDE, build_flux

from scoredist3d.diffusion.schedule import FlowSchedule
from scoredist3d.priors.diffusers_loading import PriorError
from scoredist3d.priors.diffusers_prior import DiffusersPrior
from scoredist3d.priors.flux import positions
from scoredist3d.priors.packed_latents import packed, unpacked

FAMILY = FamilyCase(
    build_flux,
    FluxPipeline,
    "GuidedTransformer",
    default_size=256,  # the pipeline's default of 128 latent pixels
    image_size=16,
    latents=(CHANNELS, 8, 4),
    limit=512,  # T5's: CLIP reads the beginning for the pooled embedding, without a warning
    parts=("transformer", "vae", "text_encoder", "text_encoder_2"),
    automatic="auto-bf16",
    refused=(
        ({"_class_name": "FluxFillPipeline"}, r"\(FluxFillPipeline\) has no unet; .* are supported"),
        ({"transformer": ["diffusers", "ChromaTransformer2DModel"]}, "its transformer, a ChromaTransformer2DModel"),
        ({"text_encoder_2": [None, None]}, "has no text_encoder_2 in its model_index.json"),
    ),
)


class TestFamily(FamilySuite):
    """The tests of every family."""


@pytest.fixture(scope="module")
def schnell(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_flux(tmp_path_factory.mktemp("schnell"), distilled=False)


def test_sides_become_multiples_of_the_patches(prior: DiffusersPrior) -> None:
    """The transformer's patches have 4 pixels each."""
    assert prior.encode(torch.zeros(1, 24, 38, 3)).shape == (1, CHANNELS, 8, 12)


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
    pipeline = FAMILY.reference(folder)
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
    check_steps(load(schnell, image_size=16), FAMILY.reference(schnell), 1.0, {})


def check_steps(loaded: DiffusersPrior, pipeline: FluxPipeline, true_scale: float, guidance: dict[str, float]) -> None:
    conditions = conditions_of(loaded)
    negative = {"negative_prompt": ["a front view"] * 2, "true_cfg_scale": true_scale}
    steps = guided_steps(pipeline, loaded, latents=packed, **negative, **guidance)
    image = partial(unpacked, like=normal(2, CHANNELS, SIDE, SIDE))
    steps = [replace(step, output=image(step.output), x_t=image(step.x_t)) for step in steps]
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


def test_what_does_not_fit_is_named(schnell: Path, prior: DiffusersPrior) -> None:
    with pytest.raises(PriorError, match=r"guidance\.phi\.model: the noise schedule of .* is not the prior's"):
        prior.sibling(str(schnell), key="guidance.phi.model")
    with pytest.raises(PriorError, match=r"^prior\.distilled_guidance: .* has no such input; remove the option"):
        load(schnell, distilled_guidance=3.5)

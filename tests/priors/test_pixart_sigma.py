"""The family of PixArt-Sigma: the prior equals the pipeline of diffusers, and methods distil from it."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, PixArtSigmaPipeline
from shared.deepfloyd_folder import TEXT_WIDTH
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
from shared.pixart_folder import SIDE, build_pixart

from scoredist3d.cameras import orbit
from scoredist3d.priors import CFGConditions, Conditioning
from scoredist3d.priors.diffusers_loading import PriorError
from scoredist3d.priors.diffusers_prior import DiffusersPrior
from scoredist3d.prompts.processor import PromptProcessor

KEY = r"^prior\.pretrained_model_name_or_path: "


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_pixart(tmp_path_factory.mktemp("pixart"))


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> Iterator[PixArtSigmaPipeline]:
    """The pipeline with a DDIM sampler."""
    with torch.random.fork_rng(devices=[]):  # networks draw their first weights before they load those of the files
        loaded = PixArtSigmaPipeline.from_pretrained(folder)
    loaded.scheduler = DDIMScheduler.from_config(loaded.scheduler.config)
    loaded.set_progress_bar_config(disable=True)
    yield loaded


@pytest.fixture(scope="module")
def prior(folder: Path) -> DiffusersPrior:
    return load(folder)


def test_the_family_is_recognized_and_short(prior: DiffusersPrior) -> None:
    assert type(prior.denoiser).__name__ == "MaskedTransformer"
    assert (prior.image_size, prior.latent_shape(16, 8)) == (16, (4, 8, 4))
    # Sides become multiples of the transformer's patches, of 4 pixels each.
    assert prior.encode(torch.zeros(1, 24, 38, 3)).shape == (1, 4, 8, 12)
    source = Path("scoredist3d/priors/pixart_sigma.py").read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 120


def test_predictions_are_the_pipelines(prior: DiffusersPrior, pipeline: Any) -> None:
    steps = recorded(
        pipeline,
        prompt=PROMPTS,
        negative_prompt=NEGATIVE,
        guidance_scale=4.5,
        num_inference_steps=4,
        height=16,
        width=16,
        latents=normal(2, 4, SIDE, SIDE),
        clean_caption=False,
        use_resolution_binning=False,
    )
    conditions = CFGConditions(prior.embed(PROMPTS), prior.embed([NEGATIVE]))
    check_predictions(prior, conditions, 4.5, steps)
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


def test_images_and_latents_are_the_pipelines(prior: DiffusersPrior, pipeline: Any) -> None:
    vae, rgb = pipeline.vae, images(16)
    with torch.no_grad():
        latents = vae.encode(2.0 * rgb.movedim(-1, 1) - 1.0).latent_dist.mode() * vae.config.scaling_factor
        torch.testing.assert_close(prior.encode(rgb), latents)
        decoded = 0.5 * vae.decode(latents / vae.config.scaling_factor).sample + 0.5
        torch.testing.assert_close(prior.decode(latents), decoded.movedim(1, -1))


def test_a_folder_of_an_earlier_version_is_the_same_model(folder: Path, prior: DiffusersPrior, tmp_path: Path) -> None:
    earlier = copy_with(folder, tmp_path / "earlier", transformer=["diffusers", "Transformer2DModel"])
    config = earlier / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"_class_name": "Transformer2DModel"}))
    x_t, t = normal(2, 4, SIDE, SIDE), torch.tensor([0.3, 0.8])
    with torch.no_grad():
        outputs = [model.predict(x_t, t, prior.embed(PROMPTS)).output for model in (load(earlier), prior)]
    torch.testing.assert_close(*outputs)


@pytest.mark.parametrize("method", METHOD_CASES)
def test_methods_distil_from_it(method: str, prior: DiffusersPrior) -> None:
    train(prior, method)


def test_a_long_prompt_is_cut_with_a_warning(prior: DiffusersPrior, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        cut = prior.embed([LONG])
    assert cut.text.shape[1] == 300 and cut.mask is not None and cut.mask.all()
    assert len(caplog.records) == 1 and "longer than the prior's limit of 300 tokens" in caplog.text


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder"])
def test_a_truncated_file_is_named(part: str, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(PriorError, match=rf"{KEY}the {part} of .* cannot be loaded"):
        load(truncated(folder, tmp_path / "cut", part))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_class_name": "PixArtAlphaPipeline"}, r"\(PixArtAlphaPipeline\) has no unet; .* are supported"),
        ({"transformer": ["diffusers", "HunyuanDiT2DModel"]}, "its transformer, a HunyuanDiT2DModel"),
        ({"tokenizer": [None, None]}, "has no tokenizer in its model_index.json"),
    ],
)
def test_other_pipelines_are_named(changes: dict[str, Any], message: str, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(PriorError, match=rf"{KEY}.*{message}"):
        load(copy_with(folder, tmp_path / "other", **changes))


def test_a_model_of_another_family_is_no_sibling(folder: Path, prior: DiffusersPrior, tmp_path: Path) -> None:
    assert prior.sibling(str(folder), key="guidance.phi.model").channels == 4
    with pytest.raises(PriorError, match=r"guidance\.phi\.model: .* has no transformer of class PixArtTrans"):
        prior.sibling("embedded", key="guidance.phi.model")
    alpha = copy_with(folder, tmp_path / "alpha", "transformer/config.json", use_additional_conditions=True)
    with pytest.raises(PriorError, match=r"needs a resolution and an aspect ratio \(PixArt-Alpha\)"):
        load(alpha)

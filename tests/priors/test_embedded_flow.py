"""The embedded flow prior: small, in the layout of Stable Diffusion 3; its samples show what the caption says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from safetensors.torch import load_file

import scoredist3d
from scoredist3d.cameras import orbit
from scoredist3d.diffusion.samplers import sample
from scoredist3d.priors.conditioning import CFGConditions
from scoredist3d.priors.diffusers_prior import DiffusersPrior
from scoredist3d.procedural import CATEGORIES, COLORS
from scoredist3d.procedural.probe import Probe
from scoredist3d.procedural.reader import Reader, character_accuracy

FOLDER = Path(scoredist3d.__file__).parent / "assets" / "prior-flow"


@pytest.fixture(scope="module")
def prior() -> DiffusersPrior:
    return DiffusersPrior(DiffusersPrior.Config(pretrained_model_name_or_path="embedded-flow"))


@torch.no_grad()
def samples(prior: DiffusersPrior, texts: list[str], azimuth: list[float]) -> torch.Tensor:
    """One sample (B, 128, 128, 3) per text with guidance scale 3."""
    size, constant = prior.image_size, torch.ones(len(texts))
    cameras = orbit(torch.tensor(azimuth), 15 * constant, 3.2 * constant, 40 * constant, size, size)
    conditions = CFGConditions(prior.embed(texts, cameras), prior.embed([""] * len(texts), cameras))
    z = sample(prior, conditions, steps=20, scale=3.0, generator=torch.Generator().manual_seed(3))
    return prior.decode(z).clamp(0, 1)


def test_it_is_small_and_half_precision() -> None:
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 8 * 2**20
    weights = [path for path in files if path.suffix == ".safetensors"]
    assert len(weights) == 4
    assert {tensor.dtype for path in weights for tensor in load_file(path).values()} == {torch.float16}


def test_diffusers_own_pipeline_loads_and_samples_it() -> None:
    pipeline = StableDiffusion3Pipeline.from_pretrained(
        FOLDER, text_encoder_3=None, tokenizer_3=None, torch_dtype=torch.float32
    )
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline(
        "a red mug",
        num_inference_steps=12,
        guidance_scale=3.0,
        height=128,
        width=128,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).images
    assert Probe.load()(image.float().permute(0, 2, 3, 1)).color.argmax(-1).tolist() == [COLORS.index("red")]


def test_it_knows_the_kinds_of_the_embedded_prior_and_signs(prior: DiffusersPrior) -> None:
    known = json.loads((FOLDER / "vocabulary.json").read_text())["nouns"]
    assert set(CATEGORIES) | {"sign"} <= set(known)


def test_samples_show_the_captions_object(prior: DiffusersPrior) -> None:
    reading = Probe.load()(samples(prior, ["a red mug"] * 4, [0.0, 90.0, 180.0, 270.0]))
    assert (reading.category.argmax(-1) == CATEGORIES.index("mug")).sum() >= 3
    assert (reading.color.argmax(-1) == COLORS.index("red")).sum() >= 3


def test_samples_show_the_captions_word(prior: DiffusersPrior) -> None:
    words = ["OK", "42", "NO", "7B", "HI", "X9"]
    texts = [f"a red sign that says {' '.join(word.lower())}" for word in words]
    read = Reader.load().read(samples(prior, texts, [0.0] * len(words)))
    assert character_accuracy(read, words) >= 0.6

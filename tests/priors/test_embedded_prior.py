"""The embedded prior: complete, small, and its samples show the object of the caption."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import scoredist3d
from scoredist3d.cameras import orbit
from scoredist3d.diffusion.samplers import sample
from scoredist3d.priors.conditioning import CFGConditions
from scoredist3d.priors.diffusers_prior import DiffusersPrior
from scoredist3d.procedural import CATEGORIES, COLORS, render_objects, sample_objects
from scoredist3d.procedural.probe import Probe
from scoredist3d.prompts.processor import PromptProcessor

ASSETS = Path(scoredist3d.__file__).parent / "assets"


@pytest.fixture(scope="module")
def prior() -> DiffusersPrior:
    return DiffusersPrior(DiffusersPrior.Config())


def test_it_is_small_and_half_precision() -> None:
    files = [path for path in (ASSETS / "prior").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 16.5 * 2**20
    weights = [path for path in files if path.suffix == ".safetensors"]
    assert len(weights) == 3
    assert {tensor.dtype for path in weights for tensor in load_file(path).values()} == {torch.float16}
    assert not [path for path in files if path.suffix in (".bin", ".pt", ".pkl", ".ckpt")]


def test_it_knows_its_categories_and_colours(prior: DiffusersPrior) -> None:
    known = json.loads((ASSETS / "probe" / "config.json").read_text())["categories"]
    for word in (*known, *COLORS):
        assert prior.unknown_words(f"a {word}") == []
    assert len(known) >= 40 and len(COLORS) >= 12
    assert known == list(CATEGORIES)


def test_it_knows_a_noun_for_each_category_and_general_ones(prior: DiffusersPrior) -> None:
    assert prior.nouns is not None and list(prior.nouns.kinds) == list(Probe.load().categories)
    assert prior.nouns.known_in("two coffee mugs on a desk, a red thing") == ["mug", "coffee mug", "desk", "thing"]


def test_unknown_words_get_a_warning_that_names_them(prior: DiffusersPrior, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="scoredist3d"):
        conditions = PromptProcessor(PromptProcessor.Config(), prior=prior, prompt="a grey enchanted mug")()
    (record,) = caplog.records
    assert record.getMessage() == (
        "prompt: the prior was not trained on 'grey' (near: 'gray'), 'enchanted', and may ignore them"
    )
    assert conditions.positive.text.isfinite().all()


def test_a_prompt_without_a_known_noun_is_refused(prior: DiffusersPrior) -> None:
    with pytest.raises(ValueError, match=r"^prompt: 'a red zeppelin' names no known kind of object\. Use one of mug, "):
        PromptProcessor(PromptProcessor.Config(), prior=prior, prompt="a red zeppelin")


def test_truncation_of_a_long_prompt_is_reported(prior: DiffusersPrior, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="scoredist3d"):
        prior.embed(["a mug " * 12 + "red"])
    assert "longer than the prior's limit of 24 tokens" in caplog.text and "red" in caplog.text
    caplog.clear()
    prior.embed(["a red mug"])
    assert not caplog.text


@pytest.mark.parametrize(("category", "color"), [("mug", "red"), ("house", "yellow")])
def test_samples_show_the_captions_object(prior: DiffusersPrior, category: str, color: str) -> None:
    views, size = 4, prior.image_size
    azimuth = torch.tensor([0.0, 90.0, 180.0, 270.0])
    elevation = torch.full((views,), 20.0)
    cameras = orbit(azimuth, elevation, torch.full((views,), 3.2), torch.full((views,), 40.0), size, size)
    conditions = CFGConditions(
        prior.embed([f"a {color} {category}"] * views, cameras), prior.embed([""] * views, cameras)
    )
    z = sample(prior, conditions, steps=12, scale=3.0, generator=torch.Generator().manual_seed(0))
    reading = Probe.load()(prior.decode(z).clamp(0, 1))
    assert (reading.category.argmax(-1) == CATEGORIES.index(category)).sum() >= 3
    assert (reading.color.argmax(-1) == COLORS.index(color)).sum() >= 3


def test_the_autoencoder_reconstructs_renders(prior: DiffusersPrior) -> None:
    """Reconstructions of renders: 30 dB is far above a blank image (about 12) and below the measured 33.2 dB."""
    objects = sample_objects(12, torch.Generator().manual_seed(1))
    angles = torch.arange(12) * 30.0
    constant, size = torch.ones(12), prior.image_size
    cameras = orbit(angles, 20 * constant, 3.2 * constant, 40 * constant, size, size)
    image = render_objects(objects, cameras).over(torch.ones(3))
    error = (prior.decode(prior.encode(image)) - image).square().mean()
    assert -10 * torch.log10(error) > 30

"""Order of adjectives in prompts: known rewrites, text that must not change, and the captions of the embedded prior."""

from __future__ import annotations

import json
import random

import pytest
import torch

from scoredist3d import registry
from scoredist3d.config.validation import parse_component
from scoredist3d.priors.model_files import EMBEDDED_FOLDER
from scoredist3d.priors.vocabulary import Vocabulary
from scoredist3d.priors.word_order import in_caption_order
from scoredist3d.procedural import sample_objects
from scoredist3d.procedural.captions import Dropout, adjectives, captions_for

ORDER = adjectives()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a pink striped mug", "a striped pink mug"),
        ("a blue shiny tall teapot on a red wooden table", "a tall shiny blue teapot on a wooden red table"),
        ("a red and white striped mug", "a striped red and white mug"),
        ("a pink, tall and striped mug", "a tall striped pink mug"),
        ("a mug with a white round handle", "a mug with a round white handle"),
        ("A Red Brick house", "A Brick Red house"),
        ("a red white striped mug", "a striped red white mug"),
        ("a red, white and blue striped boat", "a striped red, white and blue boat"),
        ("an orange striped mug", "a striped orange mug"),
        ("a red oval racket", "an oval red racket"),
        ("the red, wooden chair", "the wooden red chair"),
    ],
)
def test_adjectives_are_sorted(text: str, expected: str) -> None:
    assert in_caption_order(text, ORDER) == expected
    assert in_caption_order(expected, ORDER) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a black and white cat",  # two colors keep their order
        "a white and black cat",
        "a mug with white stripes, striped",  # nothing adjacent to sort
        "a redwood table",  # not a whole word
        "a mug that is red, with wooden parts",
        "a blue wooden-handled hammer",
        "a white round-backed chair",
        "a car, red, wooden wheels",
        "a teapot, red, round lid",
        "a house of red brick, white door",
        "a mug, red wooden",
    ],
)
def test_other_words_keep_their_places(text: str) -> None:
    assert in_caption_order(text, ORDER) == text


def test_phrases_and_capitals_in_a_vocabulary() -> None:
    assert (
        in_caption_order("a red light gray Thin mug", [["Thin"], ["light gray", "red"]]) == "a Thin red light gray mug"
    )


def test_quoted_words_keep_their_places() -> None:
    prior = registry.build(
        parse_component("prior", {"type": "diffusers", "pretrained_model_name_or_path": "embedded-flow"})
    )
    assert prior.worded('a red tall mug with the word "blue wooden"') == (
        "a tall red mug with the word b l u e w o o d e n"
    )


def test_without_known_adjectives_nothing_changes() -> None:
    assert in_caption_order("a pink striped mug", ()) == "a pink striped mug"


def test_captions_of_the_training_data_are_in_order() -> None:
    objects = sample_objects(2000, torch.Generator().manual_seed(3))
    texts = [caption.text for caption in captions_for(objects, random.Random(4), dropout=Dropout(empty=0.0))]
    assert sum(" and " in text for text in texts) > 100
    assert [text for text in texts if in_caption_order(text, ORDER) != text] == []


@pytest.mark.parametrize("folder", ["prior", "prior-flow"])
def test_the_packaged_vocabularies_have_the_order_of_the_captions(folder: str) -> None:
    content = json.loads((EMBEDDED_FOLDER.parent / folder / "vocabulary.json").read_text())
    assert [list(group) for group in Vocabulary.parse(content).adjectives] == ORDER

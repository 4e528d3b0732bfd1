"""Captions of scenes of two objects: canonical ones for evaluation and random ones for training."""

from __future__ import annotations

import random
from collections.abc import Sequence

from scoredist3d.procedural.attributes import COLORS, FAMILIES
from scoredist3d.procedural.captions import (
    PICTURE_PREFIXES,
    Dropout,
    per_item,
    simple_caption,
    with_article,
    with_surroundings,
)
from scoredist3d.procedural.scenes import BESIDE, RELATIONS, Scenes

RELATION_PHRASES: dict[str, tuple[str, ...]] = {"on": ("on", "on top of"), "beside": ("beside", "next to")}
_DEFAULT = Dropout(color=0.3)


def scene_caption(
    first: int | str,
    second: int | str,
    relation: str,
    first_color: int | str | None = None,
    second_color: int | str | None = None,
) -> str:
    """The canonical caption of a scene, e.g. "a red mug on a blue table".

    Raises:
        ValueError: The relation does not exist.
    """
    if relation not in RELATIONS:
        raise ValueError(f"relation: {relation!r} does not exist; choose one of {', '.join(RELATIONS)}")
    return f"{simple_caption(first, first_color)} {relation} {simple_caption(second, second_color)}"


def captions_for_scenes(
    scenes: Scenes,
    rng: random.Random,
    *,
    views: Sequence[str | None] | None = None,
    backgrounds: Sequence[str | None] | None = None,
    dropout: Dropout = _DEFAULT,
) -> list[str]:
    """One random caption of at most MAX_WORDS for each scene.

    Grammar: ``[a] [photo of | render of | three d model of] [a] [color] {noun} {on | on top of | beside | next to} [a]
    [color] {noun} [, {view} view] [, on a {background} background]``. Both nouns and the relation are stated, except by
    empty captions. "beside" and "next to" name the objects in either order.

    Args:
        scenes: N scenes.
        rng: Source of all randomness.
        views: View word of each scene's image; None if the view must not be stated.
        backgrounds: "white" or "gray" if the image has that background, else None.
        dropout: Its fields color, view, background, empty, synonym and prefix are used.

    Raises:
        ValueError: ``views`` or ``backgrounds`` differs in length from ``scenes``.
    """
    views, backgrounds = (
        per_item(name, words, len(scenes), "scenes") for name, words in (("views", views), ("backgrounds", backgrounds))
    )
    first, second = scenes.objects, scenes.second
    columns = (first.category, first.color, second.category, second.color, scenes.relation)
    captions = []
    for row, view, background in zip(
        zip(*(column.tolist() for column in columns), strict=True), views, backgrounds, strict=True
    ):
        text = _sentence(row, rng, dropout)
        if text:
            text, _, _ = with_surroundings(text, view, background, rng.random, dropout)
        captions.append(text)
    return captions


def _sentence(row: tuple[int, ...], rng: random.Random, dropout: Dropout) -> str:
    """A caption without view and background; empty with the probability ``dropout.empty``.

    ``row`` holds the category and color of the first object, those of the second one, and the relation.
    """
    if rng.random() < dropout.empty:
        return ""
    articles = rng.random() < 0.75
    category, color, other, other_color, relation = row
    nouns = [_noun(category, color, articles, rng, dropout), _noun(other, other_color, articles, rng, dropout)]
    if relation == BESIDE and rng.random() < 0.5:
        nouns.reverse()
    body = f"{nouns[0]} {rng.choice(RELATION_PHRASES[RELATIONS[relation]])} {nouns[1]}"
    if rng.random() >= dropout.prefix:
        return body
    prefix = f"{rng.choice(PICTURE_PREFIXES)} {body}"
    return with_article(prefix) if rng.random() < 0.5 else prefix


def _noun(category: int, color: int, article: bool, rng: random.Random, dropout: Dropout) -> str:
    """The name of an object, with its color unless that is dropped."""
    family = FAMILIES[category]
    named = bool(family.synonyms) and rng.random() < dropout.synonym
    noun = rng.choice(family.synonyms) if named else family.name
    phrase = noun if rng.random() < dropout.color else f"{COLORS[color]} {noun}"
    return with_article(phrase) if article else phrase

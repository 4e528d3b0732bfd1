"""Captions of procedural objects, with a record of the attributes that each caption states.

Grammar: ``["" | a | the] [photo of | render of | three d model of | toy] [size] [structure] [finish] [pattern]
{color} {noun} [with {color} {part or pattern} [and {structure}]] [, {front | side | back | overhead} view]
[, on a {background} background]``. Attributes are left out independently of each other, so the distribution of the
attributes given a caption is known. There are two exceptions: a pattern without its second color means the one in
DEFAULT_SECOND, and a material without a color ("wooden", "metal") means the one in NATURAL_COLORS.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

from scoredist3d.cameras import Cameras
from scoredist3d.procedural.attributes import (
    CATEGORIES,
    COLORS,
    COUNTS,
    DEFAULT_SECOND,
    FAMILIES,
    FINISH_SYNONYMS,
    FINISHES,
    METAL,
    NATURAL_COLORS,
    PATTERN_NOUNS,
    PATTERNS,
    PLAIN,
    PLURALS,
    SIZES,
    WOODEN,
)
from scoredist3d.procedural.objects import Objects

MAX_WORDS = 22  # words and commas; each is one token
VIEWS = ("front", "side", "back", "overhead")
BACKGROUNDS = ("white", "gray")
DEFECTS = ("blurry", "oversaturated", "noisy", "low detail", "pixelated")
GENERIC_NOUNS = ("object", "thing")
_VOWELS = frozenset("aeiou")


class Caption(NamedTuple):
    """A caption and the attributes that it states; the empty caption states none.

    Attributes:
        text: The caption.
        category, color, second_color, pattern, size, mode, view, background, finish: Whether the text states this
            attribute. A named part ("with a blue hat") can hint at a mode that is not stated.
    """

    text: str
    category: bool = False
    color: bool = False
    second_color: bool = False
    pattern: bool = False
    size: bool = False
    mode: bool = False
    view: bool = False
    background: bool = False
    finish: bool = False


@dataclass(frozen=True)
class Dropout:
    """Probabilities with which captions leave out or vary their parts.

    Attributes:
        color, second_color, pattern, size, mode, noun, finish: Probability of leaving out the attribute, if the object
            has it. For the colors, the next two apply where a pattern or a material is stated.
        default_second: Probability of leaving out the second color of a stated pattern, if it is the default one;
            others are always stated.
        natural_color: Probability of leaving out the color of a stated material, if it is the natural one; others are
            always stated.
        view, background: Probability of leaving out the view or the background, if they are given.
        empty: Probability of an empty caption.
        synonym: Probability of naming the category by a synonym.
        prefix: Probability of a prefix such as "photo of".
    """

    color: float = 0.35
    second_color: float = 0.35
    pattern: float = 0.10
    size: float = 0.35
    mode: float = 0.5
    noun: float = 0.05
    view: float = 0.5
    background: float = 0.8
    empty: float = 0.10
    synonym: float = 0.2
    prefix: float = 0.3
    finish: float = 0.3
    default_second: float = 0.6
    natural_color: float = 0.75


NO_DROPOUT = Dropout(**{field.name: 0.0 for field in fields(Dropout)})
_DEFAULT = Dropout()
PICTURE_PREFIXES = ("photo of", "render of", "three d model of")
_PREFIXES = (*PICTURE_PREFIXES, "toy")


class Attributes(NamedTuple):
    """Attribute indices of one object, as in :class:`Objects`."""

    category: int
    color: int
    second_color: int
    pattern: int
    size: int
    mode: int
    finish: int = 0


def adjectives() -> list[list[str]]:
    """Adjectives in the order of the grammar: sizes, structures, finishes, patterns and colors."""
    modes = [mode for family in FAMILIES for mode in family.modes]
    parts = [mode.feature.split() for mode in modes if mode.feature is not None]
    structures = [mode.adjective for mode in modes if mode.adjective is not None]
    structures += [words[0] for words in parts if len(words) == 2 and words[0] not in COUNTS]  # "round handle"
    finishes = [*filter(None, FINISHES), *FINISH_SYNONYMS.values()]
    return [[*filter(None, SIZES)], list(dict.fromkeys(structures)), finishes, list(PATTERNS), list(COLORS)]


def with_article(phrase: str) -> str:
    """The phrase with the article "a" or "an"."""
    return ("an " if phrase[0].lower() in _VOWELS else "a ") + phrase


def simple_caption(category: int | str, color: int | str | None = None) -> str:
    """The canonical caption, e.g. "a red mug", or "a mug" without a color."""
    noun = category if isinstance(category, str) else CATEGORIES[category]
    if color is None:
        return with_article(noun)
    return with_article(f"{color if isinstance(color, str) else COLORS[color]} {noun}")


def view_words(cameras: Cameras) -> list[str]:
    """View word of each camera.

    The view is "overhead" above 60 degrees of elevation. Otherwise, it is "front" for absolute azimuths up to 45
    degrees, "back" for those beyond 135 degrees, and "side" between the two.
    """
    words = []
    for azimuth, elevation in zip(cameras.azimuth.tolist(), cameras.elevation.tolist(), strict=True):
        if elevation > math.radians(60):
            words.append("overhead")
        elif abs(azimuth) < math.radians(45):
            words.append("front")
        elif abs(azimuth) > math.radians(135):
            words.append("back")
        else:
            words.append("side")
    return words


def captions_for(
    objects: Objects,
    rng: random.Random,
    *,
    views: Sequence[str | None] | None = None,
    backgrounds: Sequence[str | None] | None = None,
    dropout: Dropout = _DEFAULT,
) -> list[Caption]:
    """One random caption for each object.

    Args:
        objects: N objects.
        rng: Source of all randomness.
        views: View word of each object's image (see :func:`view_words`); None if the view must not be stated.
        backgrounds: "white" or "gray" if the image has that background, else None.
        dropout: Probabilities with which parts are left out or varied.

    Raises:
        ValueError: ``views`` or ``backgrounds`` differs in length from ``objects``.
    """
    columns = [getattr(objects, name).tolist() for name in Attributes._fields]
    views, backgrounds = (
        per_item(name, words, len(objects), "objects")
        for name, words in (("views", views), ("backgrounds", backgrounds))
    )
    return [
        caption(Attributes(*row), rng, view=view, background=background, dropout=dropout)
        for row, view, background in zip(zip(*columns, strict=True), views, backgrounds, strict=True)
    ]


def caption(
    attributes: Attributes,
    rng: random.Random,
    *,
    view: str | None = None,
    background: str | None = None,
    dropout: Dropout = _DEFAULT,
) -> Caption:
    """Draw a caption of one object; see :func:`captions_for` for the arguments."""
    draw = rng.random
    if draw() < dropout.empty:
        return Caption("")
    says = _statements(attributes, draw, dropout)
    body = _body(attributes, says, rng, dropout)
    text = _open(body, draw, dropout)
    if word_count(text) > MAX_WORDS:  # rare: a long structure with every attribute and a prefix
        text = body
    text, says_view, says_background = with_surroundings(text, view, background, draw, dropout)
    return says._replace(text=text, view=says_view, background=says_background)


def per_item(name: str, words: Sequence[str | None] | None, count: int, items: str) -> Sequence[str | None]:
    """The words, one for each item, or None for each if there are none.

    Raises:
        ValueError: The number of words differs from ``count``.
    """
    if words is not None and len(words) != count:
        raise ValueError(f"{name} must have one word for each of the {count} {items}, got {len(words)}")
    return words if words is not None else [None] * count


def with_surroundings(
    text: str, view: str | None, background: str | None, draw: Callable[[], float], dropout: Dropout
) -> tuple[str, bool, bool]:
    """The caption with view and background, as far as they are known, drawn and fit, and whether it states them."""
    length = word_count(text)
    says_view = view is not None and draw() >= dropout.view and length + 3 <= MAX_WORDS
    if says_view:
        text = f"{text}, {view} view"
        length += 3
    says_background = background is not None and draw() >= dropout.background and length + 5 <= MAX_WORDS
    if says_background:
        text = f"{text}, on a {background} background"
    return text, says_view, says_background


def _statements(attributes: Attributes, draw: Callable[[], float], dropout: Dropout) -> Caption:
    """Choose which attributes of an object its caption states; text, view and background are left empty."""
    mode = FAMILIES[attributes.category].modes[attributes.mode]
    says_noun = draw() >= dropout.noun
    says_color = draw() >= dropout.color
    says_second = draw() >= dropout.second_color
    says_pattern = draw() >= dropout.pattern
    says_size = draw() >= dropout.size and attributes.size != 0
    # Structures name parts specific to a family, so they would reveal a noun that is left out.
    says_mode = draw() >= dropout.mode and says_noun and (mode.adjective is not None or mode.feature is not None)
    says_finish = draw() >= dropout.finish and attributes.finish != 0
    if attributes.pattern == PLAIN and draw() < 0.5:
        says_pattern = False  # people rarely mention that an object is plain
    if says_pattern and PATTERNS[attributes.pattern] in PATTERN_NOUNS:
        default = COLORS[attributes.second_color] == DEFAULT_SECOND[COLORS[attributes.color]]
        says_second = not default or draw() >= dropout.default_second
    material = _material(attributes, says_pattern, says_finish)
    if material is not None:
        natural = COLORS[attributes.color] == NATURAL_COLORS[material]
        says_color = not natural or draw() >= dropout.natural_color
    says_second = says_second and attributes.second_color != attributes.color
    return Caption("", says_noun, says_color, says_second, says_pattern, says_size, says_mode, finish=says_finish)


def _material(attributes: Attributes, says_pattern: bool, says_finish: bool) -> str | None:
    """The stated material that has a natural color, or None."""
    if says_pattern and attributes.pattern == WOODEN:
        return PATTERNS[WOODEN]
    return FINISHES[METAL] if says_finish and attributes.finish == METAL else None


def _body(attributes: Attributes, says: Caption, rng: random.Random, dropout: Dropout) -> str:
    """The caption without article, prefix, view and background."""
    family = FAMILIES[attributes.category]
    mode, pattern = family.modes[attributes.mode], PATTERNS[attributes.pattern]
    words, tail = [], []
    if says.size:
        words.append(SIZES[attributes.size])
    if says.mode and mode.adjective is not None:
        words.append(mode.adjective)
    if says.finish:
        finish = FINISHES[attributes.finish]
        words.append(FINISH_SYNONYMS.get(finish, finish) if rng.random() < dropout.synonym else finish)
    feature = mode.feature if says.mode else None
    color_words = COLORS[attributes.color] if says.color else None
    second = COLORS[attributes.second_color]
    nouns = PATTERN_NOUNS.get(pattern)
    adjective = says.pattern
    if says.second_color and nouns is not None:
        if says.pattern:
            tail.append(f"{second} {rng.choice(nouns)}")
            adjective = rng.random() < 0.3
        elif says.color:
            color_words = f"{color_words} and {second}"
        else:
            tail.append(f"some {second}")
    elif says.second_color:
        part = rng.choice(mode.parts)
        kind, _, owner = (feature or "").rpartition(" ")
        if owner == part:
            # "a round red handle", not "a red handle and a round handle".
            second, feature = f"{kind} {second}".strip(), None
        tail.append(_with_determiner(f"{second} {part}", part))
    if adjective:
        words.append(pattern)
    if color_words is not None:
        words.append(color_words)
    if not says.category:
        words.append(rng.choice(GENERIC_NOUNS))
    elif family.synonyms and rng.random() < dropout.synonym:
        words.append(rng.choice(family.synonyms))
    else:
        words.append(family.name)
    if feature is not None:
        tail.append(_with_determiner(feature, feature))
    phrase = " ".join(words)
    return f"{phrase} with {' and '.join(tail)}" if tail else phrase


def _with_determiner(phrase: str, noun: str) -> str:
    """The phrase as it stands after "with": plural and counted nouns take no article."""
    return phrase if noun in PLURALS or phrase.split(" ", 1)[0] in COUNTS else with_article(phrase)


def _open(body: str, uniform: Callable[[], float], dropout: Dropout) -> str:
    """The body with an article, and in some captions a prefix."""
    u = uniform()
    if u < dropout.prefix:
        prefix = _PREFIXES[int(u / dropout.prefix * len(_PREFIXES))]
        if prefix == "toy":
            return with_article(f"toy {body}") if uniform() < 0.6 else f"toy {body}"
        inner = with_article(body) if uniform() < 0.6 else body
        text = f"{prefix} {inner}"
        return f"a {text}" if uniform() < 0.5 else text
    v = uniform()
    return with_article(body) if v < 0.6 else f"the {body}" if v < 0.75 else body


def degraded_caption(text: str, defects: Sequence[str], rng: random.Random) -> str:
    """A caption of an image with defects, e.g. "a blurry photo of a red mug", "a red mug, blurry, noisy" or "blurry".

    In 30 % of the cases, it states only the defects. It has at most MAX_WORDS words, if the defects do.

    Args:
        text: Caption of the intact image; may be empty.
        defects: Words from DEFECTS; none leaves the caption as it is.
        rng: Source of all randomness.
    """
    if not defects:
        return text
    alone = ", ".join(defects)
    if not text or rng.random() < 0.3:
        return alone
    article, _, rest = text.partition(" ")
    bare = rest if article in ("a", "an", "the") and rest else text
    adjectives = " ".join(defects)
    if bare.startswith(PICTURE_PREFIXES):
        photo = with_article(f"{adjectives} {bare}")
    else:
        photo = with_article(f"{adjectives} photo of {text}")
    forms = [photo, f"{text}, {alone}", f"{adjectives} {bare}", with_article(f"{adjectives} {bare}")]
    rng.shuffle(forms)
    return next((form for form in forms if word_count(form) <= MAX_WORDS), alone)


def word_count(text: str) -> int:
    """Number of words and commas."""
    return text.count(" ") + text.count(",") + 1

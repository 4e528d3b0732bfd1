"""The vocabulary of captions."""

from __future__ import annotations

from functools import cache

from scoredist3d.procedural.attributes import (
    COLORS,
    FAMILIES,
    FINISH_SYNONYMS,
    FINISHES,
    PATTERN_NOUNS,
    PATTERNS,
    SIZES,
)
from scoredist3d.procedural.captions import BACKGROUNDS, DEFECTS, GENERIC_NOUNS, VIEWS
from scoredist3d.procedural.words import LETTERING_WORDS

_FUNCTION_WORDS = (
    "a an the of with and on in at by to for from some no not is it its that this very photo render three d model toy "
    "view background object style picture image side top bottom front rear left right small large big little "
    "quality detail beside next behind wood smooth cartoon sharp high sign says word letters"
)


@cache
def lexicon() -> tuple[str, ...]:
    """All words of the caption grammar and some other common words: sorted, lower case, without punctuation."""
    phrases = [*COLORS, *PATTERNS, *SIZES, *VIEWS, *BACKGROUNDS, *GENERIC_NOUNS, _FUNCTION_WORDS, LETTERING_WORDS]
    phrases += [*FINISHES, *FINISH_SYNONYMS.values(), *DEFECTS]
    phrases += [noun for nouns in PATTERN_NOUNS.values() for noun in nouns]
    for family in FAMILIES:
        phrases += [family.name, *family.synonyms]
        for mode in family.modes:
            phrases += [mode.adjective or "", mode.feature or "", *mode.parts]
    return tuple(sorted({word for phrase in phrases for word in phrase.split()}))

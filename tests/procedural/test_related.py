"""Nouns without a family: they are single words, not names of families, and appear once."""

from __future__ import annotations

from collections import Counter

from scoredist3d.procedural.attributes import FAMILIES
from scoredist3d.procedural.related import related_words

KINDS = {family.name: family.synonyms for family in FAMILIES}


def test_related_words_belong_to_known_families_and_are_no_names() -> None:
    table = related_words(KINDS)
    assert set(table) <= set(KINDS)
    names = {name for kind, synonyms in KINDS.items() for name in (kind, *synonyms)}
    counts = Counter(word for words in table.values() for word in words)
    assert max(counts.values()) == 1
    assert not names & set(counts)


def test_the_first_known_family_counts() -> None:
    assert "horse" in related_words(KINDS)["dog"]
    assert {"horse", "dog"} <= set(related_words({"teddy bear": ()})["teddy bear"])
    assert related_words({}) == {}

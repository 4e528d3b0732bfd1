"""Words of a text, to compare a prompt with the vocabulary of a prior."""

from __future__ import annotations

import re
from collections.abc import Iterable


def words_of(text: str) -> list[str]:
    """The words of a text in lower case, without numbers and punctuation."""
    return re.findall(r"[^\W\d_]+", text.lower())


def vocabulary_of(entries: Iterable[str]) -> frozenset[str]:
    """The set of single words in a list of words and phrases."""
    return frozenset(word for entry in entries for word in words_of(entry))

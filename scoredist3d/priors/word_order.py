"""Order of the adjectives of a prompt, for priors whose training captions have a fixed one."""

from __future__ import annotations

import re
from collections.abc import Sequence


def in_caption_order(text: str, adjectives: Sequence[Sequence[str]]) -> str:
    """The text with adjacent adjectives in the order of the captions: "a pink striped mug" as "a striped pink mug".

    A small text encoder that was trained on one order ignores a word at another place. Two adjectives of one group that
    are joined by "and" stay together: "red and white striped" becomes "striped red and white". All other words keep
    their places.

    Args:
        text: A prompt.
        adjectives: Groups of single words in the order of the captions; words of the last group stand next to the noun.
    """
    rank = {word: index for index, group in enumerate(adjectives) for word in group}
    if not rank:
        return text
    known = "|".join(map(re.escape, sorted(rank, key=len, reverse=True)))
    between = r",\s+and\s+|,\s+|\s+and\s+|\s+"

    def sort(match: re.Match[str]) -> str:
        separators, words = re.findall(rf"(?:{between})(?={known})", match[0], re.I), _words(match[0], between)
        units = [[words[0]]]
        for separator, word in zip(separators, words[1:], strict=True):
            if "and" in separator.lower() and rank[word.lower()] == rank[units[-1][0].lower()]:
                units[-1].append(word)
            else:
                units.append([word])
        ordered = sorted(units, key=lambda unit: rank[unit[0].lower()])
        return match[0] if ordered == units else " ".join(" and ".join(unit) for unit in ordered)

    return re.sub(rf"\b(?:{known})(?:(?:{between})(?:{known})\b)+", sort, text, flags=re.I)


def _words(phrase: str, between: str) -> list[str]:
    return re.split(between, phrase, flags=re.I)

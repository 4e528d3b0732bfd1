"""Order of the adjectives of a prompt, for priors whose training captions have a fixed one."""

from __future__ import annotations

import re
from collections.abc import Sequence

from scoredist3d.procedural.captions import with_article

_AND = r"(?:\s+and\s+|\s+)"
_LIST = r"(?:,\s+and\s+|,\s+|\s+and\s+|\s+)"


def in_caption_order(text: str, adjectives: Sequence[Sequence[str]]) -> str:
    """The text with adjacent adjectives in the order of the captions: "a pink striped mug" as "a striped pink mug".

    A small text encoder that was trained on one order ignores a word at another place. Adjectives of one group that are
    joined by "and" or a comma stay together: "red and white striped" becomes "striped red and white". All other words
    keep their places; an article is adapted ("an orange striped" becomes "a striped orange").

    Args:
        text: A prompt.
        adjectives: Groups of words in the order of the captions; words of the last group stand next to the noun.
    """
    rank = {word.lower(): index for index, group in enumerate(adjectives) for word in group}
    if not rank:
        return text
    word = "(?:" + "|".join(map(re.escape, sorted(rank, key=len, reverse=True))) + r")(?![\w'\u2019-])"
    # A comma may also end a phrase ("a car, red, wooden wheels"), so it joins adjectives only after an article.
    runs = rf"(?<![\w'\u2019-])(?:(an?|the)\s+({word}(?:{_LIST}{word})+)|({word}(?:{_AND}{word})+))(?=\s+[^\W\d_])"

    def sort(match: re.Match[str]) -> str:
        units: list[tuple[int, str]] = []
        for separator, adjective in re.findall(rf"({_LIST}|^)({word})", match[2] or match[3], re.I):
            if separator.strip() and rank[adjective.lower()] == units[-1][0]:
                units[-1] = (units[-1][0], units[-1][1] + separator + adjective)
            else:
                units.append((rank[adjective.lower()], adjective))
        ordered = sorted(units, key=lambda unit: unit[0])
        phrase = " ".join(unit for _, unit in ordered)
        if ordered == units:
            return match[0]
        if match[1] is None:
            return phrase
        if match[1].lower() == "the":
            return f"{match[1]} {phrase}"
        return match[1][0] + with_article(phrase)[1:]

    return re.sub(runs, sort, text, flags=re.I)

"""Words and nouns that a prior was trained on, to compare prompts with them."""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

_CLOSE_WORD, _CLOSE_NOUN = 0.75, 0.8
"""Similarity from which a spelling is close: one wrong letter in four for words ("grey"), in five for nouns."""
_SHORTEST = 4
"""Number of letters from which a part of a word says something about the whole word."""


def words_of(text: str) -> list[str]:
    """The words of a text in lower case, without numbers and punctuation."""
    return re.findall(r"[^\W\d_]+", text.lower())


def vocabulary_of(entries: Iterable[str]) -> frozenset[str]:
    """The set of single words in a list of words and phrases."""
    return frozenset(word for entry in entries for word in words_of(entry))


@dataclass(frozen=True)
class Nouns:
    """The nouns that a prior was trained on.

    Attributes:
        kinds: Mapping from the name of each kind of object to its synonyms; names are words or phrases.
        generic: Nouns that leave the kind open, such as "object".
        related: Mapping from kinds to nouns of things that resemble them, on which the prior was not trained.
    """

    kinds: Mapping[str, tuple[str, ...]]
    generic: tuple[str, ...] = ()
    related: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def known_in(self, text: str) -> list[str]:
        """The known nouns in a text, singular or plural, without repetition; phrases have to be complete."""
        padded = f" {' '.join(words_of(text))} "
        nouns = [*self._kind_of_name(), *self.generic]
        return [noun for noun in nouns if any(f" {form} " in padded for form in (noun, *plurals(noun)))]

    def named_in(self, text: str) -> list[str]:
        """The names in a text, in its order and without repetition; of overlapping names, the longest first one.

        So "a palm tree" names a palm tree, but no tree.
        """
        forms = {form: name for name in self._kind_of_name() for form in (*plurals(name), name)}
        words, longest = words_of(text), max((len(form.split()) for form in forms), default=0)
        found: dict[str, None] = {}
        start = 0
        while start < len(words):
            phrases = (" ".join(words[start : start + count]) for count in range(longest, 0, -1))
            phrase = next((each for each in phrases if each in forms), None)
            start += 1 if phrase is None else len(phrase.split())
            found |= {} if phrase is None else {forms[phrase]: None}
        return list(found)

    def nearest(self, text: str, correct: Container[str] = ()) -> str | None:
        """The kind that is the most similar to a word of the text; None if none is similar.

        The last word of a phrase comes first ("glass" of "wine glass"), then the other words of a kind's name, then
        related things, then similar spellings.

        Args:
            text: A prompt without a known noun.
            correct: Words that are not misspelled nouns, although they may resemble one ("three" and "tree").
        """
        names, words = self._kind_of_name(), words_of(text)
        last = {name.split()[-1]: kind for name, kind in reversed(names.items())}
        other = {word: kind for kind in self.kinds for word in kind.split()}
        related = {word: kind for kind, nouns in self.related.items() for word in nouns}
        for table in (last, other, related):
            forms = {form: kind for word, kind in table.items() for form in (word, *plurals(word))}
            for word in words:
                if word in forms:
                    return forms[word]
        near = (near_word(word, last, _CLOSE_NOUN) for word in words if word not in correct)
        return next((last[noun] for noun in near if noun is not None), None)

    def _kind_of_name(self) -> dict[str, str]:
        """The kind of each name and synonym, in lower case; the kinds themselves come first."""
        synonyms = {synonym.lower(): kind for kind, others in self.kinds.items() for synonym in others}
        return {kind.lower(): kind for kind in self.kinds} | synonyms


@dataclass(frozen=True)
class Vocabulary:
    """The content of a prior's ``vocabulary.json``.

    Attributes:
        words: All single words.
        nouns: The nouns; None if the file does not state them.
        spells_quotes: Whether the prior writes quoted words, which its prompts spell ("a sign that says a b").
        adjectives: Groups of adjectives in the order of the captions; see
            :func:`~scoredist3d.priors.word_order.in_caption_order`.
    """

    words: frozenset[str]
    nouns: Nouns | None = None
    spells_quotes: bool = False
    adjectives: tuple[tuple[str, ...], ...] = ()

    @classmethod
    def parse(cls, content: Any) -> Self:
        """The vocabulary that decoded JSON describes.

        Args:
            content: A list of words and phrases, or an object with this list as ``words`` and, optionally, ``nouns``
                (a mapping from kinds of objects to lists of synonyms), ``generic_nouns`` (a list), ``related`` (a
                mapping from kinds to lists of similar things), ``spells_quotes`` (a Boolean) and ``adjectives`` (a list
                of lists).

        Raises:
            ValueError: The content has another form; the message describes the form.
        """
        block: dict[str, Any] = content if isinstance(content, dict) else {"words": content}
        words, kinds, generic = block.get("words"), block.get("nouns", {}), block.get("generic_nouns", [])
        spells = block.get("spells_quotes", False)
        related, adjectives = block.get("related", {}), block.get("adjectives", [])
        lists_are_right = (
            isinstance(kinds, dict)
            and isinstance(related, dict)
            and isinstance(adjectives, list)
            and all(map(_is_list_of_text, (words, generic, *kinds.values(), *related.values(), *adjectives)))
        )
        if not lists_are_right or not isinstance(spells, bool):
            raise ValueError(
                'must be a list of words or {"words": [...], "nouns": {kind: [synonyms]}, "generic_nouns": [...], '
                '"related": {kind: [nouns]}, "spells_quotes": true or false, "adjectives": [[words]]}'
            )
        entries: list[str] = [*(words or []), *generic, *kinds, *itertools.chain(*kinds.values())]
        known, similar = ({kind: tuple(others) for kind, others in table.items()} for table in (kinds, related))
        nouns = Nouns(known, tuple(generic), similar)
        return cls(vocabulary_of(entries), nouns if kinds else None, spells, tuple(map(tuple, adjectives)))


def plurals(noun: str) -> tuple[str, ...]:
    """Possible plural forms of a noun or a phrase that ends with a noun, not all of them correct."""
    forms = [noun + "s"]
    if noun.endswith(("s", "x", "z", "ch", "sh", "o")):
        forms.append(noun + "es")
    for singular, plural in (("y", "ies"), ("f", "ves"), ("fe", "ves"), ("man", "men"), ("us", "i")):
        if noun.endswith(singular):
            forms.append(noun.removesuffix(singular) + plural)
    return tuple(forms)


def near_word(word: str, known: Iterable[str], closeness: float = _CLOSE_WORD) -> str | None:
    """The known word that is the most similar to an unknown one, or None.

    In this order: its singular, the last part of a compound ("armchair" and "chair"), a close spelling, and a longer
    word that begins with it ("light" and "lighthouse").

    Args:
        word: A word in lower case.
        known: Words in lower case.
        closeness: Similarity of close spellings, in (0, 1]; 1 means equal.
    """
    known = list(known)
    for candidate in known:
        if word in plurals(candidate):
            return candidate
    parts = [candidate for candidate in known if len(candidate) >= _SHORTEST and word.endswith(candidate)]
    if parts:
        return max(parts, key=len)
    close = difflib.get_close_matches(word, known, n=1, cutoff=closeness)
    longer = [candidate for candidate in known if len(word) >= _SHORTEST and candidate.startswith(word)]
    return next(iter([*close, *longer]), None)


def _is_list_of_text(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(entry, str) for entry in value)

"""Words and nouns of a prior: forms of the file, plurals, phrases and near matches."""

from __future__ import annotations

from typing import Any

import pytest

from scoredist3d.priors.vocabulary import Nouns, Vocabulary, near_word, plurals

NOUNS = Nouns(
    {
        "mug": ("cup", "coffee mug"),
        "wine glass": ("goblet",),
        "bookshelf": (),
        "snowman": (),
        "teddy bear": ("teddy", "bear"),
        "pine tree": ("tree",),
        "cactus": (),
        "chair": (),
        "lighthouse": (),
        "ice cream cone": ("ice cream",),
    },
    ("object", "thing"),
)


@pytest.mark.parametrize(
    ("text", "known"),
    [
        ("a red mug", ["mug"]),
        ("two MUGS, front view", ["mug"]),
        ("a mug on a tree", ["mug", "tree"]),
        ("a coffee mug", ["mug", "coffee mug"]),
        ("wine glasses", ["wine glass"]),
        ("bookshelves", ["bookshelf"]),
        ("snowmen", ["snowman"]),
        ("teddies", ["teddy"]),
        ("cacti", ["cactus"]),
        ("an object", ["object"]),
        ("red things", ["thing"]),
        ("an ice cream", ["ice cream"]),
        ("a glass", []),
        ("a glass of wine", []),
        ("a mugger", []),
        ("red", []),
        ("", []),
    ],
)
def test_nouns_are_found_as_words_and_whole_phrases(text: str, known: list[str]) -> None:
    assert NOUNS.known_in(text) == known


def test_the_longest_names_count_in_the_order_of_the_text() -> None:
    assert NOUNS.named_in("a tree, two coffee mugs and a pine tree") == ["tree", "coffee mug", "pine tree"]
    assert NOUNS.named_in("ice cream cones on ice creams") == ["ice cream cone", "ice cream"]
    assert NOUNS.named_in("an object") == [] and Nouns({}).named_in("a mug") == []


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("a glass", "wine glass"),
        ("glasses", "wine glass"),
        ("wine", "wine glass"),
        ("a gobblet", "wine glass"),
        ("a pine", "pine tree"),
        ("an armchair", "chair"),
        ("a chiar", "chair"),
        ("a light", "lighthouse"),
        ("a lorry", None),
        ("three giraffes", None),
        ("", None),
    ],
)
def test_the_nearest_kind(text: str, kind: str | None) -> None:
    assert NOUNS.nearest(text, correct={"three"}) == kind


def test_related_things_come_before_similar_spellings() -> None:
    nouns = Nouns({"car": (), "house": (), "pine tree": ()}, related={"car": ("truck", "horse")})
    assert nouns.nearest("a blue truck") == "car" == nouns.nearest("two trucks")
    assert nouns.nearest("a horse") == "car"  # not "house"
    assert nouns.nearest("a tree") == "pine tree" and nouns.nearest("a quark") is None
    parsed = Vocabulary.parse({"words": [], "nouns": {"car": []}, "related": {"car": ["truck"]}})
    assert parsed.nouns is not None and parsed.nouns.nearest("a truck") == "car"
    with pytest.raises(ValueError, match="related"):
        Vocabulary.parse({"words": [], "nouns": {"car": []}, "related": ["truck"]})


def test_a_correct_word_is_no_misspelled_noun() -> None:
    assert NOUNS.nearest("three") == "pine tree"
    assert NOUNS.nearest("three", correct={"three"}) is None


def test_near_words() -> None:
    assert near_word("grey", ["green", "gray"]) == "gray"
    assert near_word("mugs", ["mug", "mugs and cups"]) == "mug"
    assert near_word("qqq", ["mug"]) is None
    assert "dishes" in plurals("dish") and "wine glasses" in plurals("wine glass")


def test_forms_of_the_file() -> None:
    assert Vocabulary.parse(["a", "Ice cream"]) == Vocabulary(frozenset({"a", "ice", "cream"}))
    assert Vocabulary.parse({"words": ["a"]}) == Vocabulary(frozenset({"a"}))
    parsed = Vocabulary.parse({"words": ["a"], "nouns": {"mug": ["cup"]}, "generic_nouns": ["thing"]})
    assert parsed == Vocabulary(frozenset({"a", "mug", "cup", "thing"}), Nouns({"mug": ("cup",)}, ("thing",)))


@pytest.mark.parametrize(
    "content",
    [
        None,
        3,
        {},
        {"words": "mug"},
        {"words": [1]},
        {"words": [], "nouns": ["mug"]},
        {"words": [], "nouns": {"mug": "cup"}},
        {"words": [], "generic_nouns": "thing"},
    ],
)
def test_other_forms_are_refused(content: Any) -> None:
    with pytest.raises(ValueError, match="must be a list of words or"):
        Vocabulary.parse(content)

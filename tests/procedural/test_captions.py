"""Captions of procedural objects: grammar, dropout statistics, lexicon and tokenizer."""

import itertools
import random

import pytest
import torch

from scoredist3d.cameras import orbit
from scoredist3d.procedural import (
    CATEGORIES,
    COLORS,
    DEFECTS,
    FINISHES,
    MODES,
    PATTERNS,
    SIZES,
    Dropout,
    build_tokenizer,
    captions_for,
    degraded_caption,
    lexicon,
    sample_objects,
    simple_caption,
    view_words,
)
from scoredist3d.procedural.attributes import DEFAULT_SECOND, FAMILIES, FINISH_SYNONYMS, NATURAL_COLORS, PATTERN_NOUNS
from scoredist3d.procedural.captions import MAX_WORDS, NO_DROPOUT, VIEWS

COUNT = 20_000


@pytest.fixture(scope="module")
def objects():
    return sample_objects(COUNT, torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def captions(objects):
    rng = random.Random(0)
    views = [rng.choice(VIEWS) for _ in range(COUNT)]
    return captions_for(objects, rng, views=views, backgrounds=["white"] * COUNT), views


def _words(text: str) -> list[str]:
    return text.replace(",", " ,").split()


def test_simple_captions():
    assert simple_caption("mug", "red") == "a red mug"
    assert simple_caption("airplane", "orange") == "an orange airplane"
    assert simple_caption(CATEGORIES.index("ice cream cone"), COLORS.index("blue")) == "a blue ice cream cone"
    assert simple_caption("ice cream cone") == "an ice cream cone"


def test_view_words_use_the_usual_thresholds():
    azimuth = torch.tensor([0.0, 44, 46, 134, 136, 180, -44, -90, -136, 0])
    elevation = torch.tensor([0.0, 0, 0, 0, 0, 59, 0, 0, 0, 61])
    cameras = orbit(azimuth, elevation, torch.full((10,), 3.2), torch.full((10,), 40.0), 8, 8)
    expected = ["front", "front", "side", "side", "back", "back", "front", "side", "back", "overhead"]
    assert view_words(cameras) == expected


def test_captions_state_true_attributes_only(objects, captions):
    records, views = captions
    columns = zip(
        *(getattr(objects, n).tolist() for n in ("category", "color", "second_color", "pattern", "size", "finish")),
        strict=True,
    )
    pattern_nouns = {noun: name for name, nouns in PATTERN_NOUNS.items() for noun in nouns}
    finishes = {word: word for word in FINISHES} | {synonym: word for word, synonym in FINISH_SYNONYMS.items()}
    for record, view, (category, color, second, pattern, size, finish) in zip(records, views, columns, strict=True):
        subject, *rest = record.text.split(", ")
        words = subject.split()
        said_colors = {word for word in words if word in COLORS}
        truth = set()
        if record.color:
            truth.add(COLORS[color])
        if record.second_color:
            truth.add(COLORS[second])
            assert second != color
        assert said_colors == truth, record.text
        said_patterns = {word for word in words if word in PATTERNS}
        said_patterns |= {pattern_nouns[word] for word in words if word in pattern_nouns}
        assert said_patterns == ({PATTERNS[pattern]} if record.pattern else set()), record.text
        said_sizes = {word for word in words if word in SIZES}
        assert said_sizes == ({SIZES[size]} if record.size else set()), record.text
        said_finishes = {finishes[word] for word in words if word in finishes}
        assert said_finishes == ({FINISHES[finish]} if record.finish else set()), record.text
        family = FAMILIES[category]
        assert any(name in subject for name in (family.name, *family.synonyms)) == record.category, record.text
        assert (f"{view} view" in rest) == record.view, record.text
        assert ("on a white background" in rest) == record.background, record.text


def test_modes_are_stated_where_the_record_says_so(objects, captions):
    stated = 0
    for record, category, mode in zip(captions[0], objects.category.tolist(), objects.mode.tolist(), strict=True):
        if not record.mode:
            continue
        spec = MODES[CATEGORIES[category]][mode]
        words = _words(record.text)
        assert all(word in words for word in (spec.adjective or spec.feature or "").split()), record.text
        stated += 1
    assert stated > COUNT / 5


def test_dropout_rates(objects, captions):
    records = captions[0]
    said = [record for record in records if record.text]
    empty = 1 - len(said) / COUNT
    assert empty == pytest.approx(0.10, abs=0.01)
    default = Dropout()

    def rate(name: str, eligible=None) -> float:
        chosen = [
            getattr(record, name)
            for i, record in enumerate(records)
            if record.text and (eligible is None or bool(eligible[i]))
        ]
        return sum(chosen) / len(chosen)

    patterned = (objects.pattern >= 1) & (objects.pattern <= 3)
    special = (objects.pattern == PATTERNS.index("wooden")) | (objects.finish == FINISHES.index("metal"))
    two = (objects.second_color != objects.color) & ~patterned
    # 20,000 captions: standard errors below 0.006.
    assert rate("color", ~special) == pytest.approx(1 - default.color, abs=0.02)
    assert rate("category") == pytest.approx(1 - default.noun, abs=0.01)
    assert rate("second_color", two) == pytest.approx(1 - default.second_color, abs=0.025)
    assert rate("pattern", objects.pattern > 0) == pytest.approx(1 - default.pattern, abs=0.02)
    assert rate("size", objects.size > 0) == pytest.approx(1 - default.size, abs=0.02)
    assert rate("finish", objects.finish > 0) == pytest.approx(1 - default.finish, abs=0.02)
    assert rate("view") == pytest.approx(1 - default.view, abs=0.02)
    some = patterned & ~special
    joint = sum(r.color and r.pattern for i, r in enumerate(records) if r.text and some[i])
    count = sum(1 for i, r in enumerate(records) if r.text and some[i])
    assert joint / count == pytest.approx((1 - default.color) * (1 - default.pattern), abs=0.02)


def test_a_pattern_without_a_second_color_has_the_default_one(objects, captions):
    second = torch.tensor([COLORS.index(DEFAULT_SECOND[name]) for name in COLORS])[objects.color]
    usual = (objects.second_color == second).tolist()
    stated = {True: [], False: []}
    for i, record in enumerate(captions[0]):
        if record.pattern and PATTERNS[objects.pattern[i]] in PATTERN_NOUNS:
            stated[usual[i]].append(record.second_color)
    assert all(stated[False])
    assert sum(stated[True]) / len(stated[True]) == pytest.approx(1 - Dropout().default_second, abs=0.05)
    assert len(stated[True]) / (len(stated[True]) + len(stated[False])) == pytest.approx(0.6, abs=0.03)


@pytest.mark.parametrize("material", list(NATURAL_COLORS))
def test_a_material_without_a_color_has_the_natural_one(objects, captions, material):
    wooden = material == "wooden"
    members = objects.pattern == PATTERNS.index("wooden") if wooden else objects.finish == FINISHES.index("metal")
    natural = objects.color == COLORS.index(NATURAL_COLORS[material])
    assert natural[members].float().mean() == pytest.approx(0.65, abs=0.04)
    stated = {True: [], False: []}
    for record, member, is_natural in zip(captions[0], members.tolist(), natural.tolist(), strict=True):
        if member and (record.pattern if wooden else record.finish):
            stated[is_natural].append(record.color)
    assert all(stated[False])
    assert sum(stated[True]) / len(stated[True]) == pytest.approx(1 - Dropout().natural_color, abs=0.06)


def test_captions_of_degraded_images(captions):
    rng = random.Random(3)
    known = {*lexicon(), ","}
    alone = total = 0
    for record in captions[0][:4000]:
        defects = rng.sample(DEFECTS, rng.choice([1, 1, 2]))
        text = degraded_caption(record.text, defects, rng)
        words = _words(text)
        assert len(words) <= MAX_WORDS
        assert known.issuperset(words), text
        assert all(defect in text for defect in defects)
        assert not any(defect in text for defect in DEFECTS if defect not in defects)
        if record.text:
            total += 1
            alone += text == ", ".join(defects)
    assert alone / total == pytest.approx(0.3, abs=0.04)
    forms = {degraded_caption("a red mug", ["noisy"], rng) for _ in range(200)}
    assert forms == {"noisy", "a red mug, noisy", "noisy red mug", "a noisy red mug", "a noisy photo of a red mug"}
    assert degraded_caption("a red mug", [], rng) == "a red mug"
    forms = {degraded_caption("render of a mug", ["oversaturated"], rng) for _ in range(200)}
    assert "an oversaturated render of a mug" in forms
    assert degraded_caption("", ["low detail", "blurry"], rng) == "low detail, blurry"


def test_captions_are_short_and_speak_the_lexicon(captions):
    known = {*lexicon(), ","}
    for record in captions[0]:
        words = _words(record.text)
        assert len(words) <= 22
        assert known.issuperset(words), record.text
        for article, word in itertools.pairwise(words):
            if article in ("a", "an"):
                assert (article == "an") == (word[0] in "aeiou"), record.text


def test_nothing_is_dropped_without_dropout(objects):
    records = captions_for(objects[:300], random.Random(1), dropout=NO_DROPOUT)
    assert all(record.category and record.color for record in records)
    two = (objects.second_color != objects.color)[:300]
    assert [record.second_color for record in records] == two.tolist()
    assert [record.finish for record in records] == (objects.finish > 0)[:300].tolist()


def test_captions_are_deterministic(objects):
    first = captions_for(objects[:200], random.Random(5))
    assert first == captions_for(objects[:200], random.Random(5))
    assert first != captions_for(objects[:200], random.Random(6))


def test_mismatched_lengths_are_refused(objects):
    with pytest.raises(ValueError, match="views must have one word"):
        captions_for(objects[:3], random.Random(0), views=["front"])


def test_tokenizer(tmp_path):
    from transformers import CLIPTokenizer

    build_tokenizer(tmp_path)
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) <= 1536
    assert tokenizer.model_max_length == 24
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert (start, end) == (len(tokenizer) - 2, len(tokenizer) - 1)
    assert tokenizer.pad_token_id == end
    ids = tokenizer(list(lexicon()))["input_ids"]
    assert all(len(row) == 3 and row[0] == start and row[2] == end for row in ids)
    assert len({row[1] for row in ids}) == len(lexicon())
    caption = "a red mug with a blue handle, side view"
    batch = tokenizer(
        [caption, caption.upper(), ""], padding="max_length", truncation=True, return_tensors="pt"
    ).input_ids
    assert batch.shape == (3, 24)
    assert torch.equal(batch[0], batch[1])
    assert batch[2].tolist() == [start] + [end] * 23
    assert len(tokenizer(caption)["input_ids"]) == 2 + 10
    unknown = tokenizer("zebra 日本")["input_ids"][1:-1]
    assert len(unknown) > 2
    assert end not in unknown
    assert tokenizer.decode(unknown).strip() == "zebra 日本"
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "merges.txt",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.json",
    ]

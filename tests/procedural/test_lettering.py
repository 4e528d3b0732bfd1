"""Signs and mugs with words: words and their split, sizes, ink, captions."""

import math
import random
from collections import Counter
from dataclasses import replace

import pytest
import torch

from scoredist3d.cameras import orbit
from scoredist3d.procedural import COLOR_VALUES, COLORS, build_tokenizer, lexicon
from scoredist3d.procedural.fonts import FONTS, layout_text
from scoredist3d.procedural.lettering import (
    AZIMUTH_DEG,
    KINDS,
    MUG,
    SIGN,
    _letter_scale,
    captions_for_lettered,
    lettering_cameras,
    render_lettered,
    sample_lettered,
)
from scoredist3d.procedural.words import COMMON_WORDS, LETTERING_WORDS, is_held_out, random_word, spell_quoted, spelled


@pytest.fixture(scope="module")
def lettered():
    return sample_lettered(600, torch.Generator().manual_seed(0))


def _front(count: int, size: int):
    zero = torch.zeros(count)
    return orbit(zero, zero, zero + 3.2, zero + 40.0, size, size)


def test_split_is_stable_and_exact():
    # Changing the split would make published words "seen".
    assert [word for word in ("TEA", "AB12", "OPEN", "STOP", "CAFE", "TAXI") if is_held_out(word)] == ["STOP", "TAXI"]
    assert is_held_out("tea") == is_held_out("TEA")
    rng = random.Random(0)
    words = ["".join(rng.choices("ABCDEFGHIJKLMNOP0123", k=4)) for _ in range(5000)]
    assert sum(map(is_held_out, words)) / 5000 == pytest.approx(26 / 256, abs=0.02)
    assert not any(is_held_out(random_word(rng)) for _ in range(500))
    assert all(is_held_out(random_word(rng, held_out=True)) for _ in range(500))


def test_words_are_mixed():
    rng = random.Random(1)
    words = [random_word(rng) for _ in range(4000)]
    lengths = Counter(map(len, words))
    assert set(lengths) == {2, 3, 4, 5}
    assert min(lengths.values()) > 900
    assert set("".join(words)) == set("ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789")
    common = sum(word in COMMON_WORDS for word in words) / 4000
    assert 0.2 < common < 0.4
    assert all(2 <= len(word) <= 5 and word.isalpha() for word in COMMON_WORDS)
    assert len(set(COMMON_WORDS)) == len(COMMON_WORDS)
    assert max(Counter(words).values()) < 0.02 * 4000


def test_spelling():
    assert spelled("AB12") == "a b 1 2"
    assert spell_quoted("a sign that says 'AB12'") == "a sign that says a b 1 2"
    assert spell_quoted('a mug with the word "tea", side view') == "a mug with the word t e a, side view"
    assert spell_quoted("\u201cGo\u201d, \u2018up\u2019 on a dog's bowl's rim") == "g o, u p on a dog's bowl's rim"
    assert spell_quoted("a sign that says 'stop now'") == "a sign that says s t o p n o w"
    assert spell_quoted("a 'très bon' mug") == "a 'très bon' mug"


def test_each_spelled_character_is_one_token(tmp_path):
    tokenizer = build_tokenizer(tmp_path)
    characters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
    ids = tokenizer(spelled(characters), add_special_tokens=False, truncation=False).input_ids
    assert len(ids) == len(set(ids)) == 36
    # Words of the captions merge, so an unspelled word is not a sequence of characters.
    assert len(tokenizer("the", add_special_tokens=False).input_ids) == 1


def test_attributes_are_balanced(lettered):
    assert len(lettered) == 600
    for column, bound in ((lettered.kind, len(KINDS)), (lettered.font, len(FONTS)), (lettered.objects.color, 12)):
        counts = torch.bincount(column, minlength=bound)
        assert int(counts.min()) > 0.5 * 600 / bound
    assert not any(is_held_out(word) for word in lettered.words)
    luminance = torch.tensor(COLOR_VALUES) @ torch.tensor([0.2126, 0.7152, 0.0722])
    contrast = (luminance[lettered.ink] - luminance[lettered.objects.color]).abs()
    assert float(contrast.min()) > 0.35
    held_out = sample_lettered(50, torch.Generator().manual_seed(0), held_out=True)
    assert all(map(is_held_out, held_out.words))


def test_letters_are_large_enough(lettered):
    half = 1 / lettered.objects.geometry[:, 0, 0:9].unflatten(-1, (3, 3)).norm(dim=-1)
    layout = layout_text(lettered.words, lettered.font, "cpu")
    scale = _letter_scale(lettered, half, layout.width)
    # The surface of a mug is closer to the camera than its center.
    distance = 3.2 - torch.where(lettered.kind == MUG, half[:, 0], 0.0)
    pixels = scale * 128 / (2 * distance[:, None] * math.tan(math.radians(20)))
    assert float(pixels[:, 1].min()) >= 14
    short = torch.tensor([len(word) == 2 for word in lettered.words])
    assert float(pixels[short, 1].mean()) > 1.25 * float(pixels[~short, 1].mean())


def test_cameras_are_near_the_front(lettered):
    cameras = lettering_cameras(lettered, 128, torch.Generator().manual_seed(1))
    limit = torch.tensor(AZIMUTH_DEG)[lettered.kind]
    assert bool((cameras.azimuth.rad2deg().abs() <= limit + 1e-3).all())
    elevation = cameras.elevation.rad2deg()
    assert float(elevation.min()) >= -5.01 and float(elevation.max()) <= 35.01


@pytest.mark.parametrize("kind", [SIGN, MUG])
def test_ink_shows_the_word_on_the_front_only(kind):
    one = sample_lettered(1, torch.Generator().manual_seed(3), words=["L7"], kind=kind, font=0)
    # The same object with two inks: the images differ where there is ink.
    same = replace(one.repeat_interleave(2), ink_color=torch.tensor([[0.0, 0.0, 0.0], [1.0, 0.0, 1.0]]))
    pair = render_lettered(same, _front(2, 64), antialias=1)
    ink = (pair.rgba[0] - pair.rgba[1]).abs().sum(-1) > 0.1
    assert 0.02 < float(ink.float().mean()) < 0.25
    columns = ink.any(0).nonzero()[:, 0]
    middle = int(columns[0] + columns[-1]) // 2
    left, right = ink[:, :middle], ink[:, middle:]
    bottom = ink.any(1).nonzero()[:, 0].max()
    top = ink.any(1).nonzero()[:, 0].min()
    # L has its bar at the bottom and 7 at the top, so the word is neither mirrored nor upside down.
    assert left[bottom - 1].sum() > left[top + 1].sum()
    assert right[top + 1].sum() > right[bottom - 1].sum()
    back = orbit(*(torch.full((2,), v) for v in (180.0, 0.0, 3.2, 40.0)), 32, 32)
    behind = render_lettered(same, back, antialias=1).rgba
    assert torch.allclose(behind[0], behind[1], atol=1e-4)


def test_selection_and_chunks():
    lettered = sample_lettered(4, torch.Generator().manual_seed(5))
    cameras = _front(4, 24)
    whole = render_lettered(lettered, cameras, chunk_rays=1 << 20)
    single = render_lettered(lettered, cameras, chunk_rays=1)
    assert torch.allclose(whole.rgba, single.rgba, atol=1e-4)
    assert lettered[torch.tensor([2, 0])].words == (lettered.words[2], lettered.words[0])
    assert lettered[1].words == (lettered.words[1],)
    assert lettered[lettered.kind == MUG].kind.tolist() == [MUG] * int((lettered.kind == MUG).sum())
    double = lettered.repeat_interleave(2)
    assert double.words[:2] == (lettered.words[0],) * 2
    assert len(double.objects) == len(double.font) == 8


def test_samples_are_deterministic():
    first, second = (sample_lettered(5, torch.Generator().manual_seed(7)) for _ in range(2))
    assert first.words == second.words
    assert torch.equal(first.objects.geometry, second.objects.geometry)


def test_captions(lettered):
    captions = captions_for_lettered(lettered, random.Random(0), views=["front"] * len(lettered))
    assert set(LETTERING_WORDS.split()) <= set(lexicon())
    known = {*lexicon(), *"abcdefghijklmnopqrstuvwxyz0123456789", ","}
    columns = (t.tolist() for t in (lettered.kind, lettered.objects.color, lettered.ink))
    for text, word, kind, color, ink in zip(captions, lettered.words, *columns, strict=True):
        words = text.replace(",", " ,").split()
        assert known.issuperset(words), text
        assert len(words) <= 22, text
        assert f" {spelled(word)}" in text
        assert ("sign" in words) == (kind == SIGN)
        said = {name for name in COLORS if name in words}
        assert said <= {COLORS[color], COLORS[ink]}, text
    assert any(text.startswith("an orange") for text in captions)
    with pytest.raises(ValueError, match="views"):
        captions_for_lettered(lettered, random.Random(0), views=["front"])


def test_bad_arguments_are_refused(lettered):
    with pytest.raises(ValueError, match="one word for each"):
        sample_lettered(2, torch.Generator().manual_seed(0), words=["A"])
    with pytest.raises(ValueError, match="need one camera each"):
        render_lettered(lettered, _front(1, 8))

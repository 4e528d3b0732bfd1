"""Fonts: glyphs are complete, distinct and of one height; text is centered, fitted and anti-aliased."""

import itertools

import pytest
import torch

from scoredist3d.procedural.fonts import FONTS, draw_text, layout_text
from scoredist3d.procedural.glyphs import CHARACTERS, PIXELS, SKELETONS

ALL_FONTS = range(len(FONTS))


def test_every_character_has_a_shape():
    assert list(SKELETONS) == list(PIXELS) == list(CHARACTERS)
    for rows in PIXELS.values():
        assert len(rows) == 7
        assert len({len(row) for row in rows}) == 1
        assert {mark for row in rows for mark in row} <= {"#", "."}


@pytest.mark.parametrize("font", ALL_FONTS)
def test_characters_of_a_font_differ(font):
    images = draw_text(list(CHARACTERS), font, 24, 24)
    difference = (images[:, None] - images[None]).abs().sum((2, 3))
    for i, j in itertools.combinations(range(len(CHARACTERS)), 2):
        # The difference of two characters at 20 pixels of height is more than four pixels of ink.
        assert difference[i, j] > 4, (FONTS[font].name, CHARACTERS[i], CHARACTERS[j])


def test_fonts_differ():
    images = torch.cat([draw_text(["AB12R"], font, 32, 128) for font in ALL_FONTS])
    ink = images.sum((1, 2))
    for i, j in itertools.combinations(ALL_FONTS, 2):
        assert (images[i] - images[j]).abs().sum() > 0.15 * min(ink[i], ink[j])


@pytest.mark.parametrize("font", ALL_FONTS)
def test_text_is_centered_and_fills_the_height(font):
    image = draw_text(["HEH"], font, 50, 300, margin=0.1)[0]
    assert float(image.min()) >= 0 and float(image.max()) == pytest.approx(1.0, abs=0.02)
    rows = (image.amax(1) > 0.5).nonzero()[:, 0]
    assert abs(int(rows[0]) - 5) <= 1 and abs(int(rows[-1]) - 44) <= 1
    columns = (image.amax(0) > 0.5).nonzero()[:, 0]
    assert abs(int(columns[0] + columns[-1]) - 299) <= 4


def test_long_text_fits_the_width():
    image = draw_text(["WWWWW"], 1, 64, 64, margin=0.05)[0]
    outside = torch.cat([image[:, :2], image[:, -2:]], 1)
    assert float(outside.max()) == 0.0
    assert float(image.sum()) > 100


def test_letters_keep_within_their_cells():
    for font in ALL_FONTS:
        layout = layout_text(list(CHARACTERS), font, "cpu")
        x = (layout.width / 2 + 0.1)[:, None].expand(-1, 9)
        y = torch.linspace(-0.5, 0.5, 9).expand(len(x), -1)
        # Right of the letter there is no ink.
        assert float(layout.coverage(x + layout.slant[:, None], y).max()) == 0.0, FONTS[font].name


def test_a_batch_equals_single_texts():
    texts, fonts = ["A", "AB12Z", "xyz"], torch.tensor([0, 3, 6])
    batch = draw_text(texts, fonts, 20, 60)
    singles = torch.cat([draw_text([text], int(font), 20, 60) for text, font in zip(texts, fonts, strict=True)])
    assert torch.allclose(batch, singles, atol=1e-5)
    assert torch.equal(draw_text(["xyz"], 6, 20, 60), draw_text(["XYZ"], 6, 20, 60))


def test_halving_the_resolution_is_averaging():
    fine, coarse = draw_text(["R8K"], 0, 96, 192)[0], draw_text(["R8K"], 0, 48, 96)[0]
    mean = fine.view(48, 2, 96, 2).mean((1, 3))
    assert float((mean - coarse).abs().mean()) < 0.01


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="letters A-Z and digits"):
        draw_text(["A-B"], 0, 16, 16)
    with pytest.raises(ValueError, match="letters A-Z and digits"):
        draw_text([""], 0, 16, 16)
    with pytest.raises(ValueError, match="font must lie in"):
        draw_text(["A"], len(FONTS), 16, 16)
    with pytest.raises(ValueError, match="margin"):
        draw_text(["A"], 0, 16, 16, margin=0.5)

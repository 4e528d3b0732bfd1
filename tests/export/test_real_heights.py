"""Real-world heights: every noun of the embedded prior has one, and prompts without one are refused."""

from __future__ import annotations

import pytest
from shared.exports import make_exporter

from scoredist3d.config.errors import FieldError
from scoredist3d.export.real_heights import REAL_HEIGHTS, real_height
from scoredist3d.procedural.attributes import FAMILIES


def test_every_noun_of_the_procedural_objects_has_a_height() -> None:
    for family in FAMILIES:
        for noun in (family.name, *family.synonyms):
            assert 0.01 < REAL_HEIGHTS[noun] < 100, noun


@pytest.mark.parametrize(
    ("prompt", "height"),
    [
        ("a red mug", 0.1),
        ("A wooden CHAIR with arms", 0.9),
        ("a table lamp", 0.5),
        ("two palm trees", 10.0),
        ("a mug beside a cup", 0.1),
        ("an ice cream cone with two scoops", 0.18),
    ],
)
def test_the_height_of_a_prompt(prompt: str, height: float) -> None:
    assert real_height(prompt) == height


def test_a_prompt_without_one_height_is_refused() -> None:
    exporter = make_exporter(height="real-world")
    with pytest.raises(FieldError, match=r"height: no height is known for 'a red zebra'; .*exporter\.height=1\.5"):
        exporter.for_prompt("a red zebra")
    with pytest.raises(FieldError, match=r"several heights \(mug 0\.1 m, table 0\.75 m\)"):
        exporter.for_prompt("a mug on a table")
    numbered = make_exporter(height=0.3)
    assert numbered.for_prompt("a red zebra") is numbered

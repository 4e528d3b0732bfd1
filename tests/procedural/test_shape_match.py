"""Silhouettes compared with procedural families."""

from __future__ import annotations

import pytest
import torch

from scoredist3d.cameras import Cameras, orbit
from scoredist3d.procedural import CATEGORIES, COLORS, render_objects, sample_objects
from scoredist3d.procedural.shape_match import best_family_match


def views() -> Cameras:
    azimuth = torch.tensor([10.0, 100.0, 200.0])
    return orbit(azimuth, torch.tensor([10.0, 30.0, 50.0]), torch.full((3,), 3.2), torch.full((3,), 40.0), 48, 48)


def test_a_member_of_the_family_matches_itself_and_others_less() -> None:
    def generator() -> torch.Generator:
        return torch.Generator().manual_seed(3)

    member = sample_objects(6, generator(), category=CATEGORIES.index("chair"))[4:5]
    opacity = render_objects(member.repeat_interleave(3), views(), antialias=1).rgba[..., 3]
    red = {"color": COLORS.index("red"), "second_color": COLORS.index("red")}
    found = best_family_match(opacity, views(), "chair", members=6, generator=generator(), look=red)
    assert found.iou == 1.0 and torch.equal(found.member.geometry, member.geometry)
    assert found.member.color.tolist() == [COLORS.index("red")]
    assert best_family_match(opacity, views(), "bowl", members=6, generator=generator()).iou < 0.7


def test_an_unknown_family_is_named() -> None:
    with pytest.raises(ValueError, match="there is no family 'zeppelin'; choose one of mug"):
        best_family_match(torch.zeros(3, 48, 48), views(), "zeppelin")

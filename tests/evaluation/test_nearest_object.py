"""The nearest procedural object: one that is in the family is found again."""

from __future__ import annotations

import pytest
import torch

from scoredist3d.cameras import Cameras, orbit
from scoredist3d.evaluation.nearest_object import Effort, NearestObject, nearest_object
from scoredist3d.evaluation.true_objects import Stated, object_views
from scoredist3d.procedural import CATEGORIES, Objects, sample_objects

SHORT = Effort(candidates=64, rounds=12, children=20, parents=4, rays=512)
LOOK = Stated.of("a red mug").look


def views() -> Cameras:
    azimuth, elevation = torch.tensor([20.0, 140.0, 260.0]), torch.tensor([0.0, 25.0, 50.0])
    return orbit(azimuth, elevation, torch.full((3,), 3.2), torch.full((3,), 40.0), 48, 48)


def mugs() -> Objects:
    generator = torch.Generator().manual_seed(11)
    return sample_objects(8, generator, category=CATEGORIES.index("mug"), **LOOK)


def search(member: Objects, effort: Effort, category: str = "mug") -> NearestObject:
    render = object_views(member, views())
    return nearest_object(render.rgba[..., 3], render.depth, views(), category, LOOK, effort=effort)


def test_mugs_are_found_again_and_refinement_helps() -> None:
    for index in (int((mugs().mode == mode).nonzero()[0]) for mode in (0, 1)):
        member = mugs()[index]
        refined = search(member, SHORT)
        drawn = search(member, Effort(candidates=64, rounds=0, parents=4, rays=512))
        assert refined.difference < 0.06 and refined.difference < 0.7 * drawn.difference
        assert torch.equal(refined.member.mode, member.mode) and torch.equal(refined.member.color, member.color)


def test_the_search_is_repeatable_and_tells_families_apart() -> None:
    member = mugs()[2]
    first, second = search(member, SHORT), search(member, SHORT)
    assert torch.equal(first.member.geometry, second.member.geometry) and first.difference == second.difference
    assert search(member, SHORT, "chair").difference > 5 * first.difference


def test_depths_far_from_those_of_all_members_differ_by_one() -> None:
    render = object_views(mugs()[3], views())
    far = torch.full_like(render.depth, 9.0)
    found = nearest_object(render.rgba[..., 3], far, views(), "mug", LOOK, effort=SHORT)
    assert found.difference == pytest.approx(1.0)


def test_an_empty_view_and_an_unknown_family_are_named() -> None:
    empty = torch.zeros(3, 48, 48)
    with pytest.raises(ValueError, match="no pixel is covered"):
        nearest_object(empty, empty, views(), "mug", LOOK)
    with pytest.raises(ValueError, match="there is no family 'zeppelin'"):
        nearest_object(empty + 1, empty, views(), "zeppelin", LOOK)

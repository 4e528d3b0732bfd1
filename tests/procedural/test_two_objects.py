"""Scenes of two objects: tables, arrangement, attributes and captions."""

import random
import re
from dataclasses import fields, replace

import pytest
import torch

from scoredist3d.cameras import orbit
from scoredist3d.procedural import (
    CATEGORIES,
    COLORS,
    NUM_HOLES,
    NUM_SOLIDS,
    RELATIONS,
    SCENE_SOLIDS,
    Dropout,
    Objects,
    captions_for_scenes,
    cast_rays,
    lexicon,
    render_objects,
    sample_objects,
    sample_scenes,
    scene_caption,
)
from scoredist3d.procedural.attributes import FAMILIES
from scoredist3d.procedural.captions import MAX_WORDS, NO_DROPOUT
from scoredist3d.procedural.primitives import empty_geometry, occupancy
from scoredist3d.procedural.scene_captions import RELATION_PHRASES
from scoredist3d.procedural.scenes import BESIDE, ON, Scenes, _merge, _moved, _outline

COUNT = 48


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def scenes() -> Scenes:
    return sample_scenes(COUNT, _generator(0))


def _cameras(count: int, size: int = 24):
    one = torch.ones(count)
    return orbit(torch.linspace(-150.0, 150.0, count), 25.0 * one, 3.2 * one, 40.0 * one, size, size)


def _part(scenes: Scenes, second: bool) -> Objects:
    """One of the two objects, as it stands in the scene."""
    geometry = scenes.objects.geometry
    empty = empty_geometry(1, "cpu").expand_as(geometry)
    return replace(
        scenes.objects, geometry=torch.where((scenes.of_second == second)[..., None], geometry, empty).contiguous()
    )


def test_merged_tables_are_unions_of_the_moved_objects():
    """Hollow mugs, bowls and candles keep their holes when they are merged with others."""
    names = ("mug", "bowl", "candle", "house"), ("table", "wine glass", "mug", "stool")
    first, second = (
        sample_objects(4, _generator(i), category=torch.tensor([CATEGORIES.index(n) for n in names[i]])) for i in (0, 1)
    )
    scale = torch.tensor([[0.5, 0.6, 0.45, 0.4], [0.5, 0.4, 0.55, 0.6]])
    offset = 0.3 * torch.randn(2, 4, 3, generator=_generator(2))
    moved = [_moved(part.geometry, scale[i], offset[i]) for i, part in enumerate((first, second))]
    geometry, surface, of_second, fits = _merge(first, second, *moved)
    assert fits.all()
    assert geometry.shape[1] == surface.shape[1] == of_second.shape[1] == SCENE_SOLIDS + NUM_HOLES
    points = 2.0 * torch.rand(4, 6000, 3, generator=_generator(3)) - 1.0
    expected = torch.zeros(4, 6000, dtype=torch.bool)
    for i, part in enumerate((first, second)):
        # Moving the object is the same as moving the points the other way.
        back = (points - offset[i][:, None]) / scale[i][:, None, None]
        expected |= part.occupancy(back)
    assert torch.equal(occupancy(geometry, points), expected)
    cameras = _cameras(4)
    alphas = [
        render_objects(replace(first, geometry=table, surface=paint), cameras, antialias=1).rgba[..., 3]
        for table, paint in ((geometry, surface), (moved[0], first.surface), (moved[1], second.surface))
    ]
    torch.testing.assert_close(alphas[0], torch.maximum(alphas[1], alphas[2]))


def test_scenes_render_as_the_union_of_their_parts(scenes):
    some = scenes[:12]
    cameras = _cameras(12)
    whole = render_objects(some.objects, cameras)
    alphas = [render_objects(_part(some, second), cameras).rgba[..., 3] for second in (False, True)]
    assert (whole.rgba[..., 3] <= alphas[0] + alphas[1] + 1e-5).all()
    assert (whole.rgba[..., 3] >= torch.maximum(*alphas) - 1e-5).all()
    assert all((alpha.sum((1, 2)) > 4).all() for alpha in alphas)
    trimmed = render_objects(some.objects.trimmed(), cameras)
    torch.testing.assert_close(trimmed.rgba, whole.rgba)


def test_scenes_fill_the_unit_ball_and_are_centered(scenes):
    outline = _outline(scenes.objects)
    reach = torch.where(outline.real, outline.points.norm(dim=1), 0.0).amax(1)
    assert reach.max() < 0.97
    assert reach.min() > 0.8
    assert (outline.low + outline.high).abs().max() < 0.05


def test_first_object_stands_on_its_support():
    """No part of the first object lies deeper in the second one, or higher above it, than 0.02."""
    scenes = sample_scenes(16, _generator(1), relation=ON)
    first, second = _part(scenes, False), _part(scenes, True)
    outline = _outline(first)
    assert (_outline(second).high[:, 2] - outline.low[:, 2] > -0.02).all()
    # A vertical ray at each point of a grid: underside of the first object, top of the second one.
    steps = torch.linspace(0.0, 1.0, 49)
    unit = torch.stack(torch.meshgrid(steps, steps, indexing="ij"), -1).flatten(0, 1)
    flat = outline.low[:, None, :2] + unit * (outline.high - outline.low)[:, None, :2]
    up = torch.tensor([0.0, 0.0, 1.0]).expand(*flat.shape[:2], 3)
    at = [torch.cat([flat, torch.full_like(flat[..., :1], z)], -1) for z in (-2.0, 2.0)]
    underside = cast_rays(first.geometry, at[0], up).t - 2.0
    top = 2.0 - cast_rays(second.geometry, at[1], -up).t
    overlap = torch.where(torch.isfinite(underside) & torch.isfinite(top), top - underside, -9.0).amax(1)
    names = [(CATEGORIES[i], CATEGORIES[k]) for i, k in zip(first.category, scenes.second.category, strict=True)]
    assert (overlap < 0.02).all(), list(zip(names, overlap.tolist(), strict=True))
    assert (overlap > -0.02).all(), list(zip(names, overlap.tolist(), strict=True))
    heights = [(o.high - o.low).norm(dim=-1) for o in (outline, _outline(second))]
    assert (heights[0] / heights[1] > 0.35).all()


def test_objects_stand_beside_each_other(scenes):
    chosen = scenes[scenes.relation == BESIDE]
    left, right = (_outline(_part(chosen, second)) for second in (False, True))
    gap = right.low[:, 1] - left.high[:, 1]
    assert (gap > 0.02).all()
    assert (gap < 0.15).all()
    assert (left.low[:, 2] - right.low[:, 2]).abs().max() < 1e-3
    # Seen from the front, the first object is in the left half of the image.
    count = len(chosen)
    one = torch.ones(count)
    cameras = orbit(0.0 * one, 0.0 * one, 3.2 * one, 40.0 * one, 24, 24)
    columns = torch.arange(24.0)
    centers = []
    for second in (False, True):
        alpha = render_objects(_part(chosen, second), cameras).rgba[..., 3].sum(1)
        centers.append((alpha * columns).sum(1) / alpha.sum(1))
    assert (centers[0] < centers[1]).all()


def test_attributes(scenes):
    assert set(scenes.relation.tolist()) == {ON, BESIDE}
    assert (scenes.objects.color != scenes.second.color).all()
    assert (scenes.objects.category != scenes.second.category).all()
    assert (scenes.objects.size == 0).all()
    assert (scenes.second.size == 0).all()
    plain = torch.cat([scenes.objects.pattern, scenes.second.pattern]) == 0
    assert 0.55 < plain.float().mean() < 0.85
    supports = {CATEGORIES[i] for i in scenes.second.category[scenes.relation == ON].tolist()}
    assert supports >= {"table", "stool", "bed"}
    used = scenes.objects.geometry[..., 20] > scenes.objects.geometry[..., 19]
    assert not (used[:, SCENE_SOLIDS:] & ~used[:, :NUM_HOLES]).any()  # hole i belongs to solid i
    assert scenes.second.geometry.shape[1] == NUM_SOLIDS + NUM_HOLES


def test_same_generator_same_scenes(scenes):
    again = sample_scenes(COUNT, _generator(0))
    for name in (field.name for field in fields(Objects)):
        assert torch.equal(getattr(again.objects, name), getattr(scenes.objects, name))
        assert torch.equal(getattr(again.second, name), getattr(scenes.second, name))
    assert torch.equal(again.relation, scenes.relation)
    assert torch.equal(again.of_second, scenes.of_second)


def test_selection(scenes):
    assert len(scenes[3]) == len(scenes[-1]) == 1
    twice = scenes[:2].to("cpu").repeat_interleave(2)
    assert len(twice) == len(twice.objects) == len(twice.second) == len(twice.of_second) == 4
    assert twice.second.category.tolist() == scenes.second.category[:2].repeat_interleave(2).tolist()
    with pytest.raises(ValueError, match="count must be at least 1"):
        sample_scenes(0, _generator())
    with pytest.raises(ValueError, match="relation must lie in"):
        sample_scenes(2, _generator(), relation=2)


def _names(category: int) -> tuple[str, ...]:
    return FAMILIES[category].name, *FAMILIES[category].synonyms


def test_captions_state_both_objects(scenes):
    known = {*lexicon(), ","}
    many = scenes.repeat_interleave(20)
    captions = captions_for_scenes(
        many, random.Random(0), views=["side"] * len(many), backgrounds=["white"] * len(many)
    )
    assert captions == captions_for_scenes(
        many, random.Random(0), views=["side"] * len(many), backgrounds=["white"] * len(many)
    )
    said_colors = reversed_order = 0
    stated = [i for i, text in enumerate(captions) if text]
    for i in stated:
        text = captions[i]
        words = text.replace(",", " ,").split()
        assert len(words) <= MAX_WORDS
        assert known.issuperset(words), text
        relation = RELATIONS[int(many.relation[i])]
        first, second = int(many.objects.category[i]), int(many.second.category[i])
        phrase = "|".join(sorted(RELATION_PHRASES[relation], key=len, reverse=True))
        left, right = re.fullmatch(rf"(.+?) (?:{phrase}) (.+)", text.split(", ")[0]).groups()
        swapped = relation == "beside" and not any(left.endswith(name) for name in _names(first))
        reversed_order += swapped
        ends = ((left, first, many.objects.color), (right, second, many.second.color))
        if swapped:
            ends = ((left, second, many.second.color), (right, first, many.objects.color))
        for side, category, color in ends:
            assert any(side.endswith(name) for name in _names(category)), text
            said = {word for word in side.split() if word in COLORS}
            assert said <= {COLORS[int(color[i])]}, text
            said_colors += len(said)
    assert said_colors / (2 * len(stated)) == pytest.approx(0.7, abs=0.05)
    besides = sum(int(many.relation[i]) == BESIDE for i in stated)
    assert reversed_order / besides == pytest.approx(0.5, abs=0.08)
    assert 1 - len(stated) / len(many) == pytest.approx(Dropout().empty, abs=0.03)
    full = captions_for_scenes(scenes[:5], random.Random(0), views=["front"] * 5, dropout=NO_DROPOUT)
    assert all(text.endswith(", front view") for text in full)
    with pytest.raises(ValueError, match="views must have one word"):
        captions_for_scenes(scenes[:3], random.Random(0), views=["front"])


def test_canonical_captions():
    assert scene_caption("mug", "table", "on", "red", "blue") == "a red mug on a blue table"
    assert scene_caption(CATEGORIES.index("airplane"), "house", "beside", None, 0) == "an airplane beside a red house"
    with pytest.raises(ValueError, match="relation: 'under' does not exist"):
        scene_caption("mug", "table", "under")

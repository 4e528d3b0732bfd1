"""Procedural objects: balanced attributes, geometry, colors, views and symmetry."""

import pytest
import torch

from scoredist3d.cameras import orbit
from scoredist3d.procedural import (
    AZIMUTH_SYMMETRY,
    CATEGORIES,
    COLOR_VALUES,
    COLORS,
    FINISHES,
    MODES,
    PATTERNS,
    SIZES,
    Objects,
    azimuth_symmetry,
    render_objects,
    sample_objects,
)
from scoredist3d.procedural.attributes import DEFAULT_SECOND, WOOD_COLOR
from scoredist3d.procedural.patterns import surface_color
from scoredist3d.procedural.primitives import NUM_HOLES, NUM_SOLIDS

COUNT = len(CATEGORIES)
FIELDS = ("geometry", "surface", "category", "color", "second_color", "pattern", "size", "mode", "finish")


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _cameras(azimuth: torch.Tensor, elevation: float = 15.0, size: int = 32):
    count = len(azimuth)
    full = torch.full((count,), 1.0)
    return orbit(azimuth, elevation * full, 3.2 * full, 40.0 * full, size, size)


def test_names():
    assert len(CATEGORIES) == len(set(CATEGORIES)) == 53
    assert len(COLORS) == len(COLOR_VALUES) == 12
    assert set(MODES) == set(AZIMUTH_SYMMETRY) == set(CATEGORIES)
    assert all(len(modes) >= 2 for modes in MODES.values())
    values = torch.tensor(COLOR_VALUES)
    distance = torch.cdist(values, values) + 10 * torch.eye(12)
    assert distance.min() > 0.25  # five standard deviations of the color jitter


def test_same_generator_same_objects():
    first, second = sample_objects(200, _generator(3)), sample_objects(200, _generator(3))
    assert all(torch.equal(getattr(first, name), getattr(second, name)) for name in FIELDS)
    assert not torch.equal(first.geometry, sample_objects(200, _generator(4)).geometry)


def test_attributes_are_balanced_and_independent():
    count = 40_000
    objects = sample_objects(count, _generator(1))
    # The colors of wooden and metal objects depend on the material.
    free = (objects.pattern != PATTERNS.index("wooden")) & (objects.finish != FINISHES.index("metal"))
    for name, number in (("category", COUNT), ("color", 12)):
        share = getattr(objects, name)[free].bincount(minlength=number) / free.sum()
        assert (share * number - 1).abs().max() < 0.15  # 4 standard errors at 53 classes
    plain = objects.finish == 0
    for number, other in ((12, objects.color), (COUNT, objects.category)):
        rows = free & plain
        joint = torch.zeros(number, len(PATTERNS))
        joint.index_put_((other[rows], objects.pattern[rows]), torch.ones(()), accumulate=True)
        joint = joint[:, joint.sum(0) > 0]
        expected = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True) / joint.sum()
        chi_square = ((joint - expected) ** 2 / expected).sum()
        freedom = (number - 1) * (joint.shape[1] - 1)
        assert chi_square < freedom + 4 * (2 * freedom) ** 0.5
    single = (objects.second_color == objects.color).float().mean()
    assert 0.4 < single < 0.6
    needs_two = (objects.pattern >= 1) & (objects.pattern <= 3)
    assert (objects.second_color != objects.color)[needs_two].all()
    assert (objects.finish[objects.pattern >= PATTERNS.index("wooden")] % 2 == 0).all()
    shares = objects.finish.bincount(minlength=4) / count
    assert torch.allclose(shares, torch.tensor([0.645, 0.112, 0.13, 0.112]), atol=0.015)


def test_default_second_colors_contrast():
    values = dict(zip(COLORS, COLOR_VALUES, strict=True))
    for name, second in DEFAULT_SECOND.items():
        assert second != name
        assert torch.dist(torch.tensor(values[name]), torch.tensor(values[second])) > 0.3


def test_fixed_attributes_are_kept_and_checked():
    objects = sample_objects(
        6, _generator(), category=3, color=torch.arange(6), pattern=0, size=1, mode=1, second_color=7
    )
    assert objects.category.unique().tolist() == [3]
    assert objects.color.tolist() == list(range(6))
    assert objects.second_color.unique().tolist() == [7]
    assert objects.mode.unique().tolist() == objects.size.unique().tolist() == [1]
    single = sample_objects(500, _generator(), color=2, second_color=2)
    assert not ((single.pattern >= 1) & (single.pattern <= 3)).any()
    with pytest.raises(ValueError, match="category must lie in"):
        sample_objects(2, _generator(), category=COUNT)
    with pytest.raises(ValueError, match="mode must lie in"):
        sample_objects(2, _generator(), category=0, mode=2)
    with pytest.raises(ValueError, match=r"second_color: .* must differ"):
        sample_objects(2, _generator(), color=1, second_color=1, pattern=PATTERNS.index("striped"))
    with pytest.raises(ValueError, match="wooden and brick objects cannot be shiny or metal"):
        sample_objects(2, _generator(), pattern=PATTERNS.index("brick"), finish=FINISHES.index("metal"))
    metal = sample_objects(500, _generator(), finish=FINISHES.index("metal"))
    assert (metal.pattern < PATTERNS.index("wooden")).all()
    with pytest.raises(ValueError, match="count must be at least 1"):
        sample_objects(0, _generator())


def test_objects_fill_the_unit_ball_and_are_centred():
    """Visible points, which include thin parts, span a centered box; nothing lies outside the unit ball."""
    objects = sample_objects(COUNT, _generator(2), category=torch.arange(COUNT))
    grid = torch.rand(4000, 3, generator=_generator(14)) * 2.2 - 1.1
    outside = grid[grid.norm(dim=-1) > 0.99]
    assert not objects.occupancy(outside.expand(len(objects), -1, 3)).any()
    low, high = torch.full((len(objects), 3), 9.0), torch.full((len(objects), 3), -9.0)
    for azimuth, elevation in ((0.0, 5.0), (90.0, 5.0), (20.0, 60.0), (200.0, -60.0)):
        cameras = _cameras(torch.full((len(objects),), azimuth), elevation, size=48)
        render = render_objects(objects, cameras, antialias=1)
        points = cameras.origins[:, None, None] + cameras.rays().directions * render.depth[..., None]
        hit = render.rgba[..., 3:] > 0
        assert (points.norm(dim=-1)[hit[..., 0]] < 0.99).all()
        low = torch.minimum(low, torch.where(hit, points, 9.0).amin((1, 2)))
        high = torch.maximum(high, torch.where(hit, points, -9.0).amax((1, 2)))
    assert ((high - low).amax(-1) > 0.9).all()
    # The string of a balloon can fall between the rays.
    assert ((high + low).abs().amax(-1) / 2 < 0.2).sum() >= COUNT - 1


def test_many_families_have_thin_rods():
    """Rungs, spokes, tines, strings, whiskers and poles are thinner than 0.05 scene units (3 pixels of 128)."""
    objects = sample_objects(COUNT * 4, _generator(15), category=torch.arange(COUNT).repeat_interleave(4), size=0)
    size = 2 / objects.geometry[:, :NUM_SOLIDS, :9].unflatten(-1, (3, 3)).norm(dim=-1)
    used = objects.geometry[:, :NUM_SOLIDS, 20] > objects.geometry[:, :NUM_SOLIDS, 19]
    width = torch.where(used, size.sort(-1).values[..., 1], 9.0).amin(1)  # a rod is thin along two of its axes
    thin = {CATEGORIES[i] for i in range(COUNT) if width[4 * i : 4 * i + 4].max() < 0.05}
    assert thin >= {
        *("bicycle", "ladder", "umbrella", "fork", "guitar", "windmill", "helicopter", "balloon", "clock"),
        *("racket", "swing", "broom", "cat", "street lamp", "mailbox"),
    }


def test_selection_joining_and_trimming():
    objects = sample_objects(COUNT, _generator(5), category=torch.arange(COUNT))
    assert len(objects[3]) == len(objects[-1]) == 1
    assert objects[-1].category.item() == COUNT - 1
    mask = objects.color == objects.color[0]
    assert len(objects[mask]) == int(mask.sum())
    twice = objects[:2].repeat_interleave(2)
    assert twice.category.tolist() == [0, 0, 1, 1]
    again = Objects.cat([objects[:10], objects[10:]]).to("cpu")
    assert torch.equal(again.geometry, objects.geometry)
    mushrooms = sample_objects(4, _generator(), category=CATEGORIES.index("mushroom"))
    trimmed = mushrooms.trimmed()
    assert trimmed.geometry.shape[1] < NUM_SOLIDS
    cameras = _cameras(torch.zeros(4))
    rgba = render_objects(mushrooms, cameras).rgba
    torch.testing.assert_close(rgba, render_objects(trimmed, cameras).rgba)
    padded = mushrooms.padded(NUM_SOLIDS + 3)
    assert padded.geometry.shape[1] == padded.surface.shape[1] == NUM_SOLIDS + NUM_HOLES + 3
    torch.testing.assert_close(rgba, render_objects(padded, cameras).rgba)
    mugs = sample_objects(4, _generator(), category=0).trimmed()
    assert mugs.geometry.shape[1] == NUM_HOLES + NUM_HOLES


def test_main_color_dominates_and_is_as_named():
    """The mean hue of the visible surface, without the shading, is closest to the named color."""
    count = COUNT * 12
    category = torch.arange(COUNT).repeat_interleave(12)
    objects = sample_objects(count, _generator(6), category=category, color=torch.arange(12).repeat(COUNT), finish=0)
    named_pixels, pixels = torch.zeros(count), torch.zeros(count)
    named = torch.tensor(COLOR_VALUES)[objects.color]
    wood = (objects.pattern == PATTERNS.index("wooden")) & (objects.color == COLORS.index("brown"))
    named = torch.where(wood[:, None], torch.tensor(WOOD_COLOR), named)[:, None, None]

    def unlit(surface, geometry, hits, light, directions):
        return surface_color(surface, geometry, hits)[0]

    for azimuth in (20.0, 140.0, 260.0):
        cameras = _cameras(torch.full((count,), azimuth), elevation=25.0, size=20)
        rgba = render_objects(objects, cameras, antialias=1, shader=unlit).rgba
        albedo = rgba[..., :3]
        # Within 4 standard deviations of the jitter, or in the darker tones of the materials (same hue, mortar).
        near = (albedo - named).norm(dim=-1) < 0.27
        near |= ((albedo - named * 0.62).norm(dim=-1) < 0.2) & (objects.pattern >= 4)[:, None, None]
        near |= ((albedo - named * 0.5 - 0.36).norm(dim=-1) < 0.2) & (objects.pattern == 5)[:, None, None]
        hit = rgba[..., 3] > 0
        named_pixels += (near & hit).sum((1, 2))
        pixels += hit.sum((1, 2))
    dominant = named_pixels / pixels
    family = dominant.view(COUNT, 12).mean(1)
    report = {CATEGORIES[i]: round(family[i].item(), 2) for i in range(COUNT)}
    assert (family > 0.6).all(), report
    assert (dominant > 0.6).float().mean() > 0.85, report


def test_front_is_towards_plus_x():
    """A snowman's carrot is visible only from the front; a mug's handle is on the right of the front view."""
    snowman = CATEGORIES.index("snowman")
    white = COLORS.index("white")
    objects = sample_objects(
        16, _generator(7), category=snowman, color=white, second_color=white, pattern=0, size=0, finish=0
    )

    def carrot(azimuth: float) -> torch.Tensor:
        rgb = render_objects(objects, _cameras(torch.full((16,), azimuth), size=48)).over(torch.ones(3))
        return ((rgb[..., 0] > 0.4) & (rgb[..., 2] < 0.5 * rgb[..., 0])).flatten(1).sum(1)

    assert (carrot(0.0) >= 3).all()
    assert (carrot(180.0) < carrot(0.0)).all()
    mugs = sample_objects(16, _generator(8), category=CATEGORIES.index("mug"))
    alpha = render_objects(mugs, _cameras(torch.zeros(16), size=48)).rgba[..., 3]
    row = alpha.shape[1] // 2
    # Bounding boxes are centered, so the cup without its handle is left of the middle.
    body = alpha[:, : row // 2 + 4].sum(1)
    columns = torch.arange(48) + 0.5
    center = (body * columns).sum(1) / body.sum(1)
    assert (center < 24).all()


def test_antialiased_alpha_is_the_mean_coverage():
    objects = sample_objects(COUNT, _generator(9), category=torch.arange(COUNT))
    cameras = _cameras(torch.full((COUNT,), 30.0), size=16)
    coarse = render_objects(objects, cameras, antialias=2)
    fine = render_objects(objects, cameras.with_size(32, 32), antialias=1)
    alpha = fine.rgba[..., 3].unflatten(1, (16, 2)).unflatten(3, (16, 2)).mean((2, 4))
    assert torch.allclose(coarse.rgba[..., 3], alpha)
    background = torch.tensor([0.2, 0.9, 0.4])
    averaged = fine.over(background).unflatten(1, (16, 2)).unflatten(3, (16, 2)).mean((2, 4))
    # Compositing the averaged straight colors equals averaging the composited pixels.
    assert torch.allclose(coarse.over(background), averaged, atol=1e-5)
    assert coarse.rgba.min() >= 0
    assert coarse.rgba.max() <= 1
    empty = coarse.rgba[..., 3] == 0
    assert (coarse.rgba[empty] == 0).all()
    assert (coarse.depth[empty] == 0).all()
    depth = coarse.depth[~empty]
    assert depth.min() > 2.2
    assert depth.max() < 4.2
    assert coarse.over(torch.rand(COUNT, 3, generator=_generator())).shape == (COUNT, 16, 16, 3)


def test_chunks_do_not_change_images():
    objects = sample_objects(5, _generator(10))
    cameras = _cameras(torch.arange(5) * 70.0, size=16)
    whole, parts = (render_objects(objects, cameras, **options).rgba for options in ({}, {"chunk_rays": 1}))
    torch.testing.assert_close(whole, parts)
    with pytest.raises(ValueError, match="objects need one camera each"):
        render_objects(objects, cameras[:2])


def test_light_is_fixed_in_the_world():
    """The color of a surface point does not depend on the camera: same face, same color."""
    objects = sample_objects(1, _generator(11), category=CATEGORIES.index("house"), color=0, second_color=0, pattern=0)
    views = objects.repeat_interleave(2)
    render = render_objects(views, _cameras(torch.tensor([20.0, -20.0]), size=48), antialias=1)
    front = (render.normal[..., 0] > 0.999) & (render.rgba[..., 3] == 1)
    seen = [render.rgba[i][front[i]][:, :3] for i in range(2)]
    assert len(seen[0]) > 50
    assert torch.allclose(seen[0].median(0).values, seen[1].median(0).values, atol=1e-4)
    dark = render_objects(objects, _cameras(torch.zeros(1)), light=torch.tensor([[-1.0, 0.0, 0.0]]))
    bright = render_objects(objects, _cameras(torch.zeros(1)), light=torch.tensor([[1.0, 0.0, 0.0]]))
    assert dark.rgba[..., :3].mean() < bright.rgba[..., :3].mean()


def test_azimuth_symmetry_is_that_of_the_silhouettes():
    """Rotating the camera by 360 / order degrees (any angle for order 0) does not change the silhouette."""
    objects = sample_objects(COUNT * 8, _generator(13), category=torch.arange(COUNT).repeat_interleave(8))
    order = azimuth_symmetry(objects)
    turn = torch.where(order == 0, 77.0, 360.0 / order.clamp_min(1))
    here = render_objects(objects, _cameras(torch.full((len(objects),), 20.0), size=24)).rgba[..., 3]
    there = render_objects(objects, _cameras(20.0 + turn, size=24)).rgba[..., 3]
    overlap = torch.minimum(here, there).sum((1, 2)) / torch.maximum(here, there).sum((1, 2))
    assert (overlap > 0.96).all(), (objects.category[overlap <= 0.96], order[overlap <= 0.96], overlap.min())
    assert set(order.tolist()) >= {0, 1, 2, 3, 4}
    named = torch.tensor([AZIMUTH_SYMMETRY[CATEGORIES[i]] for i in objects.category.tolist()])
    usual = (
        (objects.size != SIZES.index("wide")) & (objects.category != CATEGORIES.index("stool")) & (objects.mode == 0)
    )
    assert torch.equal(order[usual], named[usual])

"""Appearance of procedural objects: canonical patterns, finishes, readable black and white, ink."""

import pytest
import torch

from scoredist3d.cameras import orbit
from scoredist3d.procedural import (
    CATEGORIES,
    COLORS,
    DEFAULT_LIGHT,
    FINISHES,
    PATTERNS,
    cast_rays,
    render_objects,
    sample_objects,
    shade,
)
from scoredist3d.procedural.patterns import surface_color

RED, WHITE, BLACK, GRAY = (COLORS.index(name) for name in ("red", "white", "black", "gray"))


def _objects(category: str, count: int = 1, seed: int = 0, **attributes):
    attributes = {"size": 0, "mode": 0, "pattern": 0, "finish": 0} | attributes
    generator = torch.Generator().manual_seed(seed)
    return sample_objects(count, generator, category=CATEGORIES.index(category), **attributes)


def _cameras(count: int, azimuth: float = 30.0, elevation: float = 15.0, size: int = 64):
    full = torch.ones(count)
    return orbit(azimuth * full, elevation * full, 3.2 * full, 40.0 * full, size, size)


def _hits(objects, size: int = 64, **view):
    cameras = _cameras(len(objects), size=size, **view)
    directions = cameras.rays().directions.flatten(1, 2)
    return cast_rays(objects.geometry, cameras.origins[:, None], directions), directions


def _is_second(objects, hits):
    """Whether the color of a hit is the second one of its primitive."""
    color, _ = surface_color(objects.surface, objects.geometry, hits)
    rows = objects.surface.gather(1, hits.primitive[..., None].expand(-1, -1, objects.surface.shape[2]))
    return (color - rows[..., 3:6]).norm(dim=-1) < 1e-5


@pytest.mark.parametrize("pattern", ["striped", "checkered", "dotted", "wooden", "brick"])
def test_patterns_lie_at_the_same_place_on_equal_shapes(pattern):
    """Only the color may differ between objects of equal proportions."""
    objects = _objects("mug", 2, color=RED, second_color=torch.tensor([WHITE, BLACK]), pattern=PATTERNS.index(pattern))
    objects.geometry[1] = objects.geometry[0]
    hits, _ = _hits(objects)
    colors = surface_color(objects.surface, objects.geometry, hits)[0]
    body = (hits.primitive == 0) & torch.isfinite(hits.t)

    def changes(color):
        return (color[1:] - color[:-1]).abs().sum(-1) > 1e-6

    both = body[0, 1:] & body[0, :-1]
    assert torch.equal(changes(colors[0])[both], changes(colors[1])[both])
    assert changes(colors[0])[both].sum() > 20


def test_stripes_are_few_whole_and_symmetric():
    objects = _objects("bottle", 8, color=RED, second_color=WHITE, pattern=PATTERNS.index("striped"))
    hits, _ = _hits(objects, size=256, elevation=0.0)
    second = _is_second(objects, hits)
    for i in range(len(objects)):
        body = (hits.primitive[i] == 0) & torch.isfinite(hits.t[i]) & (hits.local_normal[i, :, 2].abs() < 0.5)
        z, stripe = hits.local[i, body, 2], second[i, body]
        order = z.argsort()
        z, stripe = z[order], stripe[order]
        edges = z[1:][stripe[1:] != stripe[:-1]]
        assert 4 <= len(edges) // 2 + 1 <= 7
        assert not stripe[0]
        assert not stripe[-1]
    mug = _objects("mug", 1, color=RED, second_color=WHITE, pattern=PATTERNS.index("striped"))
    hits, _ = _hits(mug, size=256, elevation=0.0)
    body = (hits.primitive[0] == 0) & torch.isfinite(hits.t[0]) & (hits.local_normal[0, :, 2].abs() < 0.5)
    z, stripe = hits.local[0, body, 2], _is_second(mug, hits)[0, body]
    upper, lower = (stripe[(z * sign > 0)].float().mean() for sign in (1, -1))
    assert upper == pytest.approx(lower.item(), abs=0.05)


@pytest.mark.parametrize("pattern", ["striped", "checkered", "dotted"])
def test_the_main_color_covers_more_than_the_second(pattern):
    for category in ("mug", "house", "car", "chair", "lamp"):
        objects = _objects(category, 4, color=RED, second_color=WHITE, pattern=PATTERNS.index(pattern))
        hits, _ = _hits(objects)
        patterned = objects.surface[..., 6].gather(1, hits.primitive) > 0
        share = _is_second(objects, hits)[patterned & torch.isfinite(hits.t)].float().mean()
        assert 0.1 < share < 0.48


def test_white_stands_out_on_white_and_black_has_detail():
    for category in ("mug", "house", "robot", "car"):
        for color in (WHITE, BLACK):
            objects = _objects(category, 8, color=color, second_color=color)
            render = render_objects(objects, _cameras(8), antialias=1)
            main = objects.surface.gather(1, _hits(objects)[0].primitive[..., None].expand(-1, -1, 8))[..., :3]
            value = render.rgba[..., :3].flatten(1, 2).mean(-1)[(main.amax(-1) - main.amin(-1)) < 0.1]
            value = value[value > 0]
            if color == WHITE:
                assert value.max() < 0.97
                assert value.median() > 0.5
            else:
                assert value.quantile(0.1) > 0.02
                assert value.median() < 0.2
            assert value.quantile(0.9) / value.quantile(0.1) > 1.15


def test_shiny_objects_have_white_highlights_and_metal_ones_reflections():
    images = {}
    for name in FINISHES:
        objects = _objects("teapot", 4, color=RED, second_color=RED, finish=FINISHES.index(name))
        images[name] = render_objects(objects, _cameras(4), antialias=1)

    def whitest(name):
        render = images[name]
        return (render.rgba[..., :3].amin(-1) * render.rgba[..., 3]).flatten(1).amax(1)

    assert (whitest("shiny") > 0.75).all()
    assert (whitest("matt") < 0.45).all()

    def spread(name):
        red = images[name].rgba[..., 0][images[name].rgba[..., 3] > 0]
        return red.quantile(0.95) - red.quantile(0.05)

    assert torch.allclose(images["matt"].rgba, images[""].rgba)
    assert spread("metal") > 1.4 * spread("matt")
    mean = images["metal"].rgba[..., :3][images["metal"].rgba[..., 3] > 0].mean(0)
    assert mean[0] > 1.8 * mean[1:].max()


def test_ink_covers_the_surface():
    objects = _objects("house", 1, color=RED, second_color=RED)
    hits, directions = _hits(objects)
    light = torch.tensor([DEFAULT_LIGHT])
    shared = (objects.surface, objects.geometry, hits, light, directions)
    coverage = torch.zeros_like(hits.t)
    color = torch.tensor([[0.0, 0.0, 1.0]])
    assert torch.equal(shade(*shared), shade(*shared, ink=(coverage, color)))
    inked = shade(*shared, ink=(coverage + 1.0, color))[torch.isfinite(hits.t)]
    assert (inked[:, :2] == 0).all()
    assert (inked[:, 2] > 0.3).all()


def test_gradients_and_misses_are_finite():
    objects = sample_objects(60, torch.Generator().manual_seed(5))
    hits, directions = _hits(objects, size=16, elevation=50.0)
    light = torch.tensor([DEFAULT_LIGHT]).expand(60, 3)
    assert torch.isfinite(shade(objects.surface, objects.geometry, hits, light, directions)).all()

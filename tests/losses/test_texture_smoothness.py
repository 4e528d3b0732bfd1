"""The texture smoothness loss: closed forms for constant and linear features, and which points it draws."""

import math
from types import SimpleNamespace

import pytest
import torch

from scoredist3d import registry
from scoredist3d.config.validation import parse_component
from scoredist3d.losses.visible import visible_positions
from scoredist3d.renderers import Render
from scoredist3d.seeding import Rng


def loss(**options):
    return registry.build(parse_component("loss", {"type": "texture-smoothness", **options}))


def render(opacity: torch.Tensor) -> Render:
    """One row of pixels; pixel i is at (i / 10, 0, 0)."""
    alpha = opacity.float().view(1, 1, -1, 1)
    place = torch.zeros(1, 1, len(opacity), 3)
    place[..., 0] = torch.arange(float(len(opacity))) / 10
    return Render(rgb=place, opacity=alpha, depth=alpha, background=place, position=place)


def geometry(features, radius: float = 1.0) -> SimpleNamespace:
    return SimpleNamespace(features_at=features, radius=radius)


def test_a_constant_texture_costs_nothing():
    constant = geometry(lambda points: torch.ones(len(points), 3))
    assert loss()(render(torch.ones(8)), constant, 0, Rng()).item() == 0.0


@pytest.mark.parametrize("radius", [1.0, 2.0])
def test_a_slope_costs_its_mean_absolute_change(radius):
    """With s(f) = 1/2 + a x near the middle, the change is a spread radius |n|, with E |n| = sqrt(2 / pi)."""
    slope = geometry(lambda points: torch.logit(0.5 + 0.2 * points[:, :1]), radius)
    value = loss(points=40_000, spread=0.01)(render(torch.tensor([1.0])), slope, 0, Rng())
    assert value.item() == pytest.approx(0.2 * 0.01 * radius * math.sqrt(2 / math.pi), rel=0.03)


def test_points_are_at_covered_pixels():
    covered = torch.tensor([0, 1, 0, 1, 1], dtype=torch.bool)
    points, visible = visible_positions(render(covered), 3000, torch.Generator().manual_seed(0))
    counts = (points[:, 0] * 10).round().long().bincount(minlength=5)
    assert visible and (counts[~covered] == 0).all()
    assert ((counts[covered] - 1000).abs() < 5 * math.sqrt(3000 * 2 / 9)).all()


def test_an_empty_view_costs_nothing_and_has_no_gradient():
    weight = torch.ones(1, requires_grad=True)
    rough = geometry(lambda points: weight * torch.sin(100 * points[:, :1]))
    value = loss()(render(torch.zeros(4)), rough, 0, Rng())
    value.backward()
    assert value.item() == 0.0 and weight.grad is not None and weight.grad.item() == 0.0


def test_steps_draw_different_points_and_repeat_them():
    rough = geometry(lambda points: torch.sin(50 * points[:, :1]))
    first, again, second = (loss(points=16)(render(torch.ones(8)), rough, step, Rng()) for step in (0, 0, 1))
    assert first == again and first != second

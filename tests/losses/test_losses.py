"""Regularisers against values worked out by hand."""

import math

import pytest
import torch
from torch import Tensor

from scoredist3d import registry
from scoredist3d.config.fields import ConfigError
from scoredist3d.config.validation import parse_component
from scoredist3d.losses import Loss
from scoredist3d.ops.ray_marching import RaySamples
from scoredist3d.renderers import Render, SampleRecord
from scoredist3d.seeding import Rng


def loss(name: str, **options) -> Loss:
    return registry.build(parse_component("loss", {"type": name, **options}))


def value(name: str, render: Render, **options) -> Tensor:
    return loss(name, **options)(render, None, 0, Rng())


def image(opacity: Tensor, depth: Tensor | None = None, samples: SampleRecord | None = None) -> Render:
    """One row of pixels."""
    opacity = opacity.view(1, 1, -1, 1)
    black = torch.zeros(1, 1, opacity.shape[2], 3)
    depth = torch.zeros_like(opacity) if depth is None else depth.view_as(opacity)
    return Render(rgb=black, opacity=opacity, depth=depth, background=black, samples=samples)


def three_rays(weights: Tensor, normals: Tensor | None = None) -> SampleRecord:
    """Rays with 2, 0 and 1 samples, in directions -x, -y, -z; midpoints at 1, 2 and 3."""
    starts = torch.tensor([0.95, 1.95, 2.95])
    samples = RaySamples(torch.tensor([0, 0, 2]), starts, starts + 0.1, torch.tensor([0, 2, 2, 3]), 3)
    return SampleRecord(samples, weights, -torch.eye(3), normals)


@pytest.mark.parametrize("name", registry.names("loss"))
def test_defaults_build_with_weight_one(name):
    assert loss(name).weight(0) == loss(name).weight(10_000) == 1.0


def test_weights_are_schedules():
    term = loss("sparsity", weight={"from": 1.0, "to": 0.0, "end": 100})
    assert (term.weight(0), term.weight(50), term.weight(200)) == (1.0, 0.5, 0.0)
    with pytest.raises(ConfigError, match="weight"):
        loss("sparsity", weight=-1.0)


def test_sparsity_by_hand():
    opacity = torch.tensor([0.0, 1.0, 0.5])
    expected = (0.1 + math.sqrt(1.01) + math.sqrt(0.26)) / 3
    assert value("sparsity", image(opacity)).item() == pytest.approx(expected)
    assert value("sparsity", image(opacity), epsilon=1.0).item() == pytest.approx(
        (1 + math.sqrt(2) + math.sqrt(1.25)) / 3
    )


def test_sparsity_pushes_opacity_down_even_from_zero_smoothly():
    opacity = torch.tensor([0.0, 0.5], requires_grad=True)
    value("sparsity", image(opacity)).backward()
    torch.testing.assert_close(opacity.grad, torch.tensor([0.0, 0.5 / math.sqrt(0.26) / 2]))


def test_opaque_by_hand():
    clamped = -(0.001 * math.log(0.001) + 0.999 * math.log(0.999))
    opacity = torch.tensor([0.5, 0.0, 1.0])
    assert value("opaque", image(opacity)).item() == pytest.approx((math.log(2) + 2 * clamped) / 3, rel=1e-5)


def test_opaque_pushes_away_from_one_half_and_leaves_the_ends():
    opacity = torch.tensor([0.3, 0.7, 0.0, 1.0], requires_grad=True)
    value("opaque", image(opacity)).backward()
    # d/dO of the entropy is log((1 - O) / O).
    expected = torch.tensor([math.log(7 / 3), math.log(3 / 7), 0.0, 0.0]) / 4
    torch.testing.assert_close(opacity.grad, expected)


def test_orientation_by_hand():
    """Ray 0 (towards -x): one normal faces the camera (0), one leans away with n . v = 0.6; ray 2: n . v = 1."""
    weights = torch.tensor([0.5, 0.25, 0.1], requires_grad=True)
    normals = torch.tensor([[1.0, 0.0, 0.0], [-0.6, 0.8, 0.0], [0.0, 0.0, -1.0]], requires_grad=True)
    record = three_rays(weights, normals)
    result = value("orientation", image(torch.tensor([0.75, 0.0, 0.1]), samples=record))
    assert result.item() == pytest.approx((0.25 * 0.36 + 0.1) / 2)  # two of the three rays see something
    result.backward()
    assert weights.grad is None  # only the normals are asked to change
    # The gradient is 2 w (n . v) v / 2: sample 1 has v = -x, sample 2 has v = -z.
    torch.testing.assert_close(normals.grad, torch.tensor([[0.0, 0.0, 0.0], [-0.15, 0.0, 0.0], [0.0, 0.0, -0.1]]))


def test_orientation_needs_normals():
    assert loss("orientation").needs_normal and not loss("sparsity").needs_normal
    with pytest.raises(ValueError, match="with_normal=True"):
        value("orientation", image(torch.ones(3), samples=three_rays(torch.ones(3))))


def test_orientation_of_an_empty_image_is_zero():
    record = three_rays(torch.zeros(3), torch.zeros(3, 3))
    assert value("orientation", image(torch.zeros(3), samples=record)).item() == 0.0


def test_z_variance_by_hand():
    """Ray 0: weights 0.6 and 0.2 at 1 and 2, mean 1.25, variance (0.6 * 0.0625 + 0.2 * 0.5625) / 0.8 = 0.1875."""
    record = three_rays(torch.tensor([0.6, 0.2, 0.9]))
    depth = torch.tensor([1.25, 0.0, 3.0])
    result = value("z-variance", image(torch.tensor([0.8, 0.0, 0.9]), depth, record))
    assert result.item() == pytest.approx((0.1875 + 0.0) / 2, rel=1e-5)
    only_second = value("z-variance", image(torch.tensor([0.8, 0.0, 0.9]), depth, record), min_opacity=0.85)
    assert only_second.item() == pytest.approx(0.0, abs=1e-10)


def test_z_variance_of_an_empty_image_is_zero():
    result = value("z-variance", image(torch.zeros(3), torch.zeros(3), three_rays(torch.zeros(3))))
    assert result.item() == 0.0
    with pytest.raises(ValueError, match="render with samples"):
        value("z-variance", image(torch.ones(3)))

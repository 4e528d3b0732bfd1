"""Losses against hand-computed values."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from scoredist3d import registry
from scoredist3d.config.fields import ConfigError
from scoredist3d.config.validation import parse_component
from scoredist3d.geometry import Geometry
from scoredist3d.losses import Loss
from scoredist3d.renderers import Render
from scoredist3d.seeding import Rng


def loss(name: str, **options) -> Loss:
    return registry.build(parse_component("loss", {"type": name, **options}))


class Ball(Geometry):
    """A geometry with a radius only."""

    def density(self, points: Tensor) -> Tensor:
        raise AssertionError("terms on pixels do not look at the object")

    features_at = density


def value(name: str, render: Render, *, radius: float = 1.0, **options) -> Tensor:
    return loss(name, **options)(render, Ball(Ball.Config(radius=radius)), 0, Rng())


REQUIRED: dict[str, dict[str, Any]] = {"sketch-shape": {"mesh": "chair.obj"}}


def image(opacity: Tensor, **maps: Tensor) -> Render:
    """A render with one row of pixels."""
    opacity = opacity.view(1, 1, -1, 1)
    black = torch.zeros(1, 1, opacity.shape[2], 3)
    maps = {name: values.view(1, 1, opacity.shape[2], -1) for name, values in maps.items()}
    return Render(rgb=black, opacity=opacity, depth=torch.zeros_like(opacity), background=black, **maps)


@pytest.mark.parametrize("name", registry.names("loss"))
def test_defaults_build_with_weight_one(name):
    term = loss(name, **REQUIRED.get(name, {}))
    assert term.weight(0) == term.weight(10_000) == 1.0


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


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_opaque_is_computed_in_float32(half):
    """In bfloat16, the largest opacity 0.999 would round to 1, and log(1 - O) would be infinite."""
    opacity = torch.tensor([0.5, 0.0, 1.0])
    found = value("opaque", image(opacity.to(half)))
    assert found.dtype == torch.float32 and torch.equal(found, value("opaque", image(opacity)))


def test_opaque_needs_nothing_that_autocast_forbids():
    """The loss works under autocast on CUDA, where binary_cross_entropy raises an error."""
    called = []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            called.append(getattr(function, "__name__", ""))
            return function(*args, **(kwargs or {}))

    with Watch():
        value("opaque", image(torch.tensor([0.5, 0.0, 1.0])))
    assert called and "binary_cross_entropy" not in called


@pytest.mark.gpu
def test_opaque_under_autocast_on_the_gpu():
    render = image(torch.tensor([0.5, 0.0, 1.0]))
    expected = value("opaque", render)
    render = replace(render, opacity=render.opacity.cuda())
    with torch.autocast("cuda", torch.float16):
        torch.testing.assert_close(value("opaque", render).cpu(), expected)


def test_papers_are_the_right_ones():
    """Orientation is from Ref-NeRF (2111.09883 is a paper on image classification)."""
    assert registry.lookup("loss", "orientation").arxiv == "2112.03907"


def test_orientation_by_hand():
    """The mean is over the two of three rays with an opacity above 0."""
    away = torch.tensor([0.25 * 0.36, 0.0, 0.1], requires_grad=True)
    result = value("orientation", image(torch.tensor([0.75, 0.0, 0.1]), orientation=away))
    assert result.item() == pytest.approx((0.25 * 0.36 + 0.1) / 2)
    result.backward()
    torch.testing.assert_close(away.grad, torch.full((3,), 0.5))


@pytest.mark.parametrize(
    ("name", "lacking"),
    [("orientation", "orientation"), ("z-variance", "depth_variance"), ("distortion", "distortion")],
)
def test_terms_say_which_map_they_need(name, lacking):
    assert loss(name).needs == {lacking} and loss("sparsity").needs == set()
    with pytest.raises(ValueError, match=rf"has no map '{lacking}'; call the renderer with needs=\{{'{lacking}'\}}"):
        value(name, image(torch.ones(3)))


def test_terms_of_an_empty_image_are_zero():
    nothing = torch.zeros(3)
    assert value("orientation", image(nothing, orientation=nothing)).item() == 0.0
    assert value("z-variance", image(nothing, depth_variance=nothing)).item() == 0.0


def test_z_variance_by_hand():
    """The mean is over the rays with an opacity above the limit."""
    render = image(torch.tensor([0.8, 0.0, 0.9]), depth_variance=torch.tensor([0.1875, 7.0, 0.0]))
    assert value("z-variance", render).item() == pytest.approx(0.1875 / 2)
    assert value("z-variance", render, min_opacity=0.85).item() == 0.0


def test_z_variance_does_not_depend_on_the_size_of_the_scene():
    """Doubling the radius and all distances does not change the loss."""
    small, large = (
        value("z-variance", image(torch.ones(2), depth_variance=scale**2 * torch.tensor([0.1, 0.3])), radius=scale)
        for scale in (1.0, 2.0)
    )
    assert small.item() == pytest.approx(0.2) and large.item() == pytest.approx(0.2)


def test_distortion_is_the_mean_over_pixels():
    render = image(torch.zeros(3), distortion=torch.tensor([0.3, 0.0, 0.6]))
    assert value("distortion", render).item() == pytest.approx(0.3)

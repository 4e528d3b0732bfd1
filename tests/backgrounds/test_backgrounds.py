"""Backgrounds: colours, randomness, learning."""

import pytest
import torch
from torch.nn import functional as F

from scoredist3d import registry
from scoredist3d.backgrounds import Background
from scoredist3d.backgrounds import environment as environment_module
from scoredist3d.config.fields import ConfigError
from scoredist3d.config.validation import parse_component


def background(name: str, **options) -> Background:
    return registry.build(parse_component("background", {"type": name, **options}))


def directions(batch: int = 3, size: int = 4) -> torch.Tensor:
    return F.normalize(torch.randn(batch, size, size, 3, generator=torch.Generator().manual_seed(0)), dim=-1)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", ["solid", "random", "environment"])
def test_defaults_build_and_ignore_the_global_stream(name):
    state = torch.random.get_rng_state()
    built = background(name)
    first = built(directions(), generator=seeded(0))
    assert first.shape == (3, 4, 4, 3) and first.min() >= 0 and first.max() <= 1
    assert torch.equal(first, built(directions(), generator=seeded(0)))
    assert torch.equal(built(directions()), built(directions()))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_solid():
    color = torch.tensor([0.1, 0.2, 0.3])
    assert torch.equal(background("solid", color=[0.1, 0.2, 0.3])(directions(), generator=seeded(0))[1, 2, 3], color)


def test_random_gray_is_one_gray_per_image():
    images = background("random", mode="gray", white_probability=0.0)(directions(200), generator=seeded(0))
    levels = images[:, 0, 0, 0]
    assert torch.equal(images, levels[:, None, None, None].expand_as(images))
    assert levels.min() < 0.05 and levels.max() > 0.95  # missed by 200 uniform draws with probability 4e-5
    bounded = background("random", value_range=[0.4, 0.6], white_probability=0.0)(directions(50), generator=seeded(0))
    assert bounded.min() >= 0.4 and bounded.max() <= 0.6


def test_random_rgb_varies_between_channels_and_images():
    colors = background("random", mode="rgb", white_probability=0.0)(directions(2), generator=seeded(0))[:, 0, 0]
    assert len(colors.flatten().unique()) == 6


def test_white_probability():
    assert (background("random", white_probability=1.0)(directions(), generator=seeded(0)) == 1).all()
    half = background("random", white_probability=0.5)(directions(1000), generator=seeded(0))[:, 0, 0, 0]
    assert abs((half == 1).float().mean() - 0.5) < 5 * (0.25 / 1000) ** 0.5


def test_random_is_fixed_in_evaluation():
    images = background("random", evaluation_color=[0.2, 0.4, 0.6])(directions())
    torch.testing.assert_close(images[2, 3, 3], torch.tensor([0.2, 0.4, 0.6]))


def test_environment_depends_on_the_direction_and_learns():
    built = background("environment", random_probability=0.0)
    (group,) = built.parameter_groups()
    assert group["name"] == "background"
    target = 0.5 + 0.4 * directions()
    optimiser = torch.optim.Adam(group["params"], lr=0.02)
    losses = []
    for _ in range(60):
        loss = (built(directions(), generator=seeded(0)) - target).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    # A constant colour cannot do better than the target's variance, 0.4^2 / 3.
    assert losses[-1] < 0.2 * 0.4**2 / 3


def test_environment_replacement_and_evaluation_colour():
    replaced = background("environment", random_probability=1.0)(directions(), generator=seeded(0))
    assert torch.equal(replaced, replaced[:, :1, :1].expand_as(replaced)) and len(replaced[:, 0, 0].unique(dim=0)) == 3
    fixed = background("environment", evaluation_color=[0.0, 0.5, 1.0])(directions())
    assert torch.equal(fixed[0, 0, 0], torch.tensor([0.0, 0.5, 1.0]))


def test_environment_chunks_do_not_change_the_image(monkeypatch):
    built = background("environment")
    with torch.no_grad():
        whole = built(directions())
        monkeypatch.setattr(environment_module, "_CHUNK", 7)
        torch.testing.assert_close(built(directions()), whole)


def test_unordered_range_is_refused():
    with pytest.raises(ConfigError, match="value_range: the first value must not exceed the second"):
        background("random", value_range=[0.9, 0.1])

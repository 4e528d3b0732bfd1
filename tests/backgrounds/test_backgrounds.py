"""Backgrounds: colors, randomness, learning."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from scoredist3d import registry
from scoredist3d.backgrounds import Background
from scoredist3d.backgrounds import environment as environment_module
from scoredist3d.config.fields import ConfigError
from scoredist3d.config.validation import parse_component


def background(name: str, *, num_channels: int = 3, **options) -> Background:
    return registry.build(parse_component("background", {"type": name, **options}), num_channels=num_channels)


def directions(batch: int = 3, size: int = 4) -> torch.Tensor:
    return F.normalize(torch.randn(batch, size, size, 3, generator=torch.Generator().manual_seed(0)), dim=-1)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", ["solid", "random", "environment", "textured"])
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
    # The error of the best constant color is the variance of the target, 0.4^2 / 3.
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


def test_environment_behind_latents_is_unbounded():
    built = background("environment", num_channels=5, random_probability=0.0)
    with torch.no_grad():
        built.network.biases[-1].fill_(7.0)
    values = built(directions())
    assert values.shape == (3, 4, 4, 5) and values.mean() > 3
    with torch.no_grad():
        torch.testing.assert_close(built(directions()), values)
    replaced = background("environment", num_channels=5, random_probability=1.0)(directions(400), generator=seeded(0))
    drawn = replaced[:, 0, 0]
    assert torch.equal(replaced, drawn[:, None, None].expand_as(replaced))
    # 2000 standard normal draws.
    assert abs(drawn.mean()) < 5 / 2000**0.5 and abs(drawn.std() - 1) < 5 / 4000**0.5
    weaker = background("environment", num_channels=5, random_probability=1.0, latent_std=0.25)
    torch.testing.assert_close(weaker(directions(400), generator=seeded(0)), 0.25 * replaced)


@pytest.mark.parametrize("name", ["solid", "random", "textured"])
def test_colours_cannot_be_behind_latents(name):
    with pytest.raises(ValueError, match=rf"^type: {name} supports only colors.* 4 latent .*background.type=environ"):
        background(name, num_channels=4)
    with pytest.raises(ValueError, match="evaluation_color: a color does not fit 4 latent channels"):
        background("environment", num_channels=4, evaluation_color=[1.0, 1.0, 1.0])


def test_texture_from_a_file_is_where_it_should_be(tmp_path):
    """A camera that looks along +x sees the left half of the panorama on its left."""
    pixels = np.zeros((16, 32, 3), dtype=np.uint8)
    pixels[:, :16, 0] = 200
    pixels[:4, :, 2] = 100
    Image.fromarray(pixels).save(tmp_path / "map.png")
    built = background("textured", image=str(tmp_path / "map.png"), learned=False, height=16, width=32)
    assert built.parameter_groups() == [] and not built.texture.requires_grad
    looks = F.normalize(torch.tensor([[1.0, 0.5, 0], [1, -0.5, 0], [0.1, -0.1, 1]]), dim=-1)
    left, right, up = built(looks[None, None])[0, 0]
    torch.testing.assert_close(left, torch.tensor([200 / 255, 0, 0]), atol=2e-3, rtol=0)
    torch.testing.assert_close(right, torch.zeros(3), atol=2e-3, rtol=0)
    assert up[2] == pytest.approx(100 / 255, abs=2e-3)
    smaller = background("textured", image=str(tmp_path / "map.png"), height=8, width=16)(looks[None, None])[0, 0]
    torch.testing.assert_close(smaller[:2], torch.stack([left, right]), atol=3e-3, rtol=0)


def test_texture_learns_what_is_behind():
    built = background("textured", height=8, width=16, random_probability=0.0)
    looks = directions(4, 8)
    target = 0.5 + 0.3 * (3 * torch.atan2(looks[..., 1:2], looks[..., :1])).sin() * looks
    (group,) = built.parameter_groups()
    optimiser = torch.optim.Adam(group["params"], lr=0.1)
    for _ in range(100):
        optimiser.zero_grad()
        loss = (built(looks, generator=seeded(0)) - target).square().mean()
        loss.backward()
        optimiser.step()
    assert loss < 0.1 * target.var()


def test_texture_replacement():
    built = background("textured", random_probability=1.0)
    replaced = built(directions(), generator=seeded(0))
    assert torch.equal(replaced, replaced[:, :1, :1].expand_as(replaced)) and len(replaced[:, 0, 0].unique(dim=0)) == 3
    torch.testing.assert_close(built(directions()), torch.full((3, 4, 4, 3), 0.5))


def test_texture_that_is_neither_given_nor_learned_is_refused():
    with pytest.raises(ConfigError, match=r"image: .* give a file or set learned to true"):
        background("textured", learned=False)
    with pytest.raises(ValueError, match=r"^image: there is no file nowhere.png"):
        background("textured", image="nowhere.png")

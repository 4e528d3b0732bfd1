"""Image statistics, compared with closed forms."""

from __future__ import annotations

import math

import pytest
import torch

from scoredist3d.cameras import orbit
from scoredist3d.evaluation.measures import (
    chroma,
    expected_entropy,
    high_frequency_share,
    kernel_distance,
    label_entropy,
    objects_of_caption,
    pair_distance,
    real_pictures,
    saturation,
)
from scoredist3d.procedural import CATEGORIES, COLORS, PATTERNS, SIZES


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_saturation_of_known_colours() -> None:
    colors = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.5, 0.5], [0.8, 0.4, 0.6], [0.0, 0.0, 0.0]])
    images = colors[:, None, None, :].expand(4, 5, 7, 3)
    torch.testing.assert_close(saturation(images), torch.tensor([1.0, 0.0, 0.5, 0.0]))


def test_chroma_is_that_of_the_pixels_that_show_the_object() -> None:
    images = torch.tensor([[1.0, 0.0, 0.5], [0.6, 0.5, 0.4], [1.0, 1.0, 0.0]]).view(1, 3, 1, 3)
    opacity = torch.tensor([1.0, 0.5, 0.4]).view(1, 3, 1, 1)
    assert chroma(images, opacity) == pytest.approx((1.0 + 0.2) / 2)
    assert chroma(images, torch.zeros_like(opacity)) == 0.0


@pytest.mark.parametrize(("cycles", "share"), [(4, 0.0), (8, 0.0), (9, 1.0), (15, 1.0)])
def test_a_wave_is_fine_above_half_of_nyquist(cycles: int, share: float) -> None:
    wave = 0.5 + 0.4 * torch.cos(2 * math.pi * cycles * torch.arange(32) / 32)
    image = wave[None, None, :, None].expand(1, 32, 32, 3)
    assert float(high_frequency_share(image)[0]) == pytest.approx(share, abs=1e-6)
    assert float(high_frequency_share(image.transpose(1, 2))[0]) == pytest.approx(share, abs=1e-6)


def test_white_noise_spreads_its_power_evenly() -> None:
    y, x = torch.fft.fftfreq(64)[:, None], torch.fft.fftfreq(64)[None, :]
    area = float(((y.square() + x.square()).sqrt() > 0.25).float().mean())
    images = normal(16, 64, 64, 3).float()
    # 16 images with 4095 free frequencies each: the standard error of the share is below 0.002.
    assert float(high_frequency_share(images).mean()) == pytest.approx(area, abs=0.008)


def test_a_picture_that_is_uniform_to_rounding_has_no_fine_detail() -> None:
    rounded = 0.3 + 6e-8 * normal(1, 8, 8, 3).float()
    assert rounded.unique().numel() > 1
    assert float(high_frequency_share(rounded)[0]) == 0.0
    assert float(high_frequency_share(0.3 + 1e-4 * normal(1, 8, 8, 3).float())[0]) > 0.3


def test_kernel_distance_is_unbiased_and_grows_with_a_shift() -> None:
    values = torch.tensor([kernel_distance(normal(6, 4, seed=k), normal(9, 4, seed=k + 1000)) for k in range(400)])
    error = float(values.std()) / math.sqrt(len(values))
    assert abs(float(values.mean())) < 4 * error and float(values.min()) < 0
    shift = kernel_distance(normal(800, 4, seed=1), normal(800, 4, seed=2) + 1.0)
    near = kernel_distance(normal(800, 4, seed=1), normal(800, 4, seed=2) + 0.2)
    assert shift > 10 * near > 0
    with pytest.raises(ValueError, match="both sets need at least two images, got 1 and 3"):
        kernel_distance(normal(1, 4), normal(3, 4))


def test_kernel_distance_by_hand() -> None:
    x, y = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 1.0], [2.0, 0.0]])

    def k(a: torch.Tensor, b: torch.Tensor) -> float:
        return (float(a @ b) / 2 + 1) ** 3

    cross = sum(k(a, b) for a in x for b in y) / 4
    assert kernel_distance(x, y) == pytest.approx(k(x[0], x[1]) + k(y[0], y[1]) - 2 * cross)


def test_pair_distance_of_a_triangle() -> None:
    corners = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]])
    assert pair_distance(corners) == pytest.approx((3 + 4 + 5) / 3)
    with pytest.raises(ValueError, match="at least two images are needed"):
        pair_distance(corners[:1])


def test_entropies() -> None:
    assert label_entropy(torch.tensor([3, 3, 3])) == 0.0
    assert label_entropy(torch.tensor([0, 1, 2, 7])) == pytest.approx(math.log(4))
    assert label_entropy(torch.tensor([0, 0, 1, 1])) == pytest.approx(math.log(2))
    # Two tosses of a fair coin differ with probability 1/2: the mean entropy is log(2) / 2; 4000 draws, s.e. 0.0055.
    assert expected_entropy(torch.tensor([0, 1]), 2, draws=4000) == pytest.approx(0.5 * math.log(2), abs=0.022)
    assert expected_entropy(torch.tensor([5, 5, 5]), 4) == pytest.approx(0.0, abs=1e-12)


def test_objects_of_a_caption_have_what_it_says_and_leave_open_what_it_does_not() -> None:
    red = objects_of_caption("mug", "red", 300)
    assert len(red) == 300
    assert set(red.category.tolist()) == {CATEGORIES.index("mug")} and set(red.color.tolist()) == {COLORS.index("red")}
    assert len(set(red.pattern.tolist())) > 3 and len(set(red.second_color.tolist())) > 5
    # Captions leave out an unusual size with probability 0.35: P(usual | not stated) = 0.55 / (0.55 + 0.45 * 0.35) =
    # 0.777, s.e. 0.024.
    assert float((red.size == SIZES.index("")).float().mean()) == pytest.approx(0.777, abs=0.1)
    assert float((red.pattern == PATTERNS.index("plain")).float().mean()) > 0.5
    assert len(set(objects_of_caption("mug", None, 100).color.tolist())) == len(COLORS)
    with pytest.raises(ValueError, match="category: 'mugg' does not exist"):
        objects_of_caption("mugg", None, 1)


def test_real_pictures_stand_over_white_or_grey() -> None:
    objects = objects_of_caption("bowl", "blue", 12)
    angle = torch.zeros(12)
    cameras = orbit(angle, angle + 20, torch.full((12,), 3.2), torch.full((12,), 40.0), 16, 16)
    assert bool((real_pictures(objects, cameras, white=True)[:, 0, 0] == 1.0).all())
    corners = real_pictures(objects, cameras, white=False)[:, 0, 0]
    assert bool((corners.amax(1) - corners.amin(1) == 0).all())
    assert 0 < int((corners[:, 0] == 1.0).sum()) < 12

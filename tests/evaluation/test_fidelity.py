"""PSNR, SSIM and agreement of coverage and depth, with values computed by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from scoredist3d.evaluation.fidelity import Coverage, coverage, psnr, ssim


def test_psnr_of_a_constant_difference_and_of_equal_images() -> None:
    images = torch.full((2, 4, 4, 3), 0.5)
    assert psnr(images, images) == pytest.approx(100.0)
    assert psnr(images, images + 0.1) == pytest.approx(20.0, abs=1e-4)  # float32
    half = images.clone()
    half[0] += 0.1
    assert psnr(images, half) == pytest.approx(20.0 + 3.0103, abs=1e-4)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def test_ssim_of_equal_images_is_1_and_the_order_does_not_matter() -> None:
    first, second = noise(2, 20, 24, 3), noise(2, 20, 24, 3, seed=1)
    assert ssim(first, first) == pytest.approx(1.0)
    assert ssim(first, second) == pytest.approx(ssim(second, first))
    assert ssim(first, second) < 0.3


def test_ssim_of_a_constant_shift_of_constant_images_is_the_luminance_term() -> None:
    images = torch.full((1, 16, 16, 3), 0.25, dtype=torch.float64)
    expected = (2 * 0.25 * 0.75 + 1e-4) / (0.25**2 + 0.75**2 + 1e-4)
    assert ssim(images, images + 0.5) == pytest.approx(expected)


def test_ssim_of_one_window_is_the_formula_with_gaussian_weights() -> None:
    x, y = noise(1, 11, 11, 3).double(), noise(1, 11, 11, 3, seed=1).double()
    line = torch.exp(-0.5 * (torch.arange(-5, 6, dtype=torch.float64) / 1.5) ** 2)
    weight = (line[:, None] * line)[None, :, :, None] / line.sum() ** 2

    def mean(values: Tensor) -> Tensor:
        return (weight * values).sum((0, 1, 2))

    mx, my = mean(x), mean(y)
    vx, vy, cov = mean(x * x) - mx * mx, mean(y * y) - my * my, mean(x * y) - mx * my
    expected = (2 * mx * my + 1e-4) * (2 * cov + 9e-4) / ((mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4))
    assert ssim(x, y) == pytest.approx(float(expected.mean()))


def test_ssim_needs_a_whole_window() -> None:
    with pytest.raises(ValueError, match="at least 11x11 pixels"):
        ssim(noise(1, 10, 20, 3), noise(1, 10, 20, 3))


def column(*values: float) -> Tensor:
    return torch.tensor(values).view(1, -1, 1, 1)


def test_shares_are_those_of_the_pixels_concerned() -> None:
    found = coverage(
        opacity=column(1, 1, 1, 0, 1),
        depth=column(1.0, 1.2, 0.8, 0.0, 1.0),
        wanted_opacity=column(0.9, 0.9, 0.6, 0.9, 0.4),
        wanted_depth=column(1.05, 1.0, 1.0, 1.0, 9.0),
        tolerance=0.1,
    )
    assert found == Coverage(*(pytest.approx(share) for share in (1 / 4, 2 / 3, 1 / 3)))


def test_nothing_to_compare_is_no_disagreement() -> None:
    nothing = column(0, 0)
    assert coverage(nothing, nothing, nothing, nothing, tolerance=0.1) == Coverage(0.0, 0.0, 0.0)

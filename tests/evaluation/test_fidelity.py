"""PSNR and agreement of coverage and depth, with values computed by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from scoredist3d.evaluation.fidelity import Coverage, coverage, psnr


def test_psnr_of_a_constant_difference_and_of_equal_images() -> None:
    images = torch.full((2, 4, 4, 3), 0.5)
    assert psnr(images, images) == pytest.approx(100.0)
    assert psnr(images, images + 0.1) == pytest.approx(20.0, abs=1e-4)  # float32
    half = images.clone()
    half[0] += 0.1
    assert psnr(images, half) == pytest.approx(20.0 + 3.0103, abs=1e-4)


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

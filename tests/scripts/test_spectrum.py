"""The answer of an autoencoder to detail, on encoders whose answer is known."""

from __future__ import annotations

import pytest
import torch
from prior_training.spectrum import BANDS, band_noise, gains
from torch import Tensor
from torch.nn import functional


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("band", BANDS)
def test_band_noise_has_its_frequencies_and_its_standard_deviation(band: tuple[float, float]) -> None:
    noise = band_noise((4, 3, 64, 64), band, 0.1, generator())
    torch.testing.assert_close(noise.square().mean((1, 2, 3)).sqrt(), torch.full((4,), 0.1))
    power = torch.fft.rfft2(noise).abs().square().sum((0, 1))
    radius = (torch.fft.fftfreq(64)[:, None] ** 2 + torch.fft.rfftfreq(64)[None] ** 2).sqrt()
    inside = (radius >= band[0]) & (radius < band[1])
    assert power[~inside].sum() < 1e-6 * power.sum()


def test_gains_of_known_encoders() -> None:
    images = torch.rand(4, 3, 64, 64, generator=generator())
    exact = gains(lambda x: 3.0 * x, lambda z: z / 3.0, images, generator())
    for row in exact.values():
        assert row == {"latents": pytest.approx(3.0, rel=1e-3), "image": pytest.approx(1.0, rel=1e-3)}

    def shrink(x: Tensor) -> Tensor:
        return functional.avg_pool2d(x, 8)

    def enlarge(z: Tensor) -> Tensor:
        return functional.interpolate(z, scale_factor=8, mode="nearest")

    coarse = gains(shrink, enlarge, images, generator())
    found = [row["image"] for row in coarse.values()]
    # The mean over 8x8 pixels passes low frequencies and hardly answers to fine detail.
    assert found[0] > 0.7 and all(value < 0.2 for value in found[3:])
    assert found[0] > found[1] > found[2]

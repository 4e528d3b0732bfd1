"""Degraded images: every defect moves saturation, sharpness and noise in its own direction."""

import pytest
import torch

from scoredist3d.cameras import orbit
from scoredist3d.procedural import DEFECTS, degrade, render_objects, sample_objects

COUNT, SIZE = 24, 64


@pytest.fixture(scope="module")
def rgba():
    objects = sample_objects(COUNT, torch.Generator().manual_seed(2), pattern=torch.arange(COUNT) % 6)
    full = torch.ones(COUNT)
    cameras = orbit(30.0 * full, 20.0 * full, 3.2 * full, 40.0 * full, SIZE, SIZE)
    return render_objects(objects, cameras).rgba.movedim(-1, 1)


BACKGROUND = torch.full((COUNT, 3, 1, 1), 0.7)


def _degraded(rgba, name: str | None, seed: int = 0):
    index = -1 if name is None else DEFECTS.index(name)
    defect = torch.full((len(rgba),), index)
    return degrade(rgba, BACKGROUND[: len(rgba)], defect, torch.Generator().manual_seed(seed))


def _high_frequencies(image):
    """Mean power at frequencies above 0.25 cycles per pixel along either axis."""
    power = torch.fft.fft2(image).abs() ** 2 / image.shape[-1] ** 2
    frequency = torch.fft.fftfreq(image.shape[-1]).abs()
    high = torch.maximum(frequency[:, None], frequency) > 0.25
    return power[..., high].mean((1, 2))


def _saturation(image):
    return (image.amax(1) - image.amin(1)).mean((1, 2))


def _unevenness(image, rgba):
    """Standard deviation of the background, where the intact image has none."""
    outside = (rgba[:, 3] == 0)[:, None].expand_as(image)
    return torch.stack([one[mask].std() for one, mask in zip(image, outside, strict=True)])


def test_without_a_defect_the_image_is_the_composite(rgba):
    image = _degraded(rgba, None)
    assert torch.equal(image, rgba[:, :3] * rgba[:, 3:] + BACKGROUND * (1 - rgba[:, 3:]))


def test_each_defect_moves_its_own_measure(rgba):
    intact = _degraded(rgba, None)
    images = {name: _degraded(rgba, name) for name in DEFECTS}
    for image in images.values():
        assert image.shape == intact.shape
        assert image.min() >= 0
        assert image.max() <= 1
    base = _high_frequencies(intact)
    assert (_high_frequencies(images["blurry"]) < 0.2 * base).all()
    assert (_high_frequencies(images["noisy"]) > 2.0 * base).all()
    gain = _saturation(images["oversaturated"]) / _saturation(intact)
    assert gain.median() > 1.2
    assert (gain > 0.99).all()
    assert _saturation(images["blurry"]).mean() < 1.02 * _saturation(intact).mean()
    noise = _unevenness(images["noisy"], rgba)
    assert (noise > 0.06).all()
    assert (noise < 0.27).all()


def test_low_detail_keeps_the_silhouette_and_flattens_the_interior(rgba):
    intact, image = _degraded(rgba, None), _degraded(rgba, "low detail")
    outside = (rgba[:, 3] == 0)[:, None].expand_as(image)
    assert torch.allclose(image[outside], intact[outside])

    def roughness(pixels):
        inside = (rgba[:, 3, :, 1:] == 1) & (rgba[:, 3, :, :-1] == 1)
        return ((pixels[..., 1:] - pixels[..., :-1]).abs().mean(1) * inside).sum((1, 2)) / inside.sum((1, 2))

    textured = roughness(intact) > 0.01
    assert textured.sum() > COUNT // 2
    assert (roughness(image)[textured] < 0.6 * roughness(intact)[textured]).all()


def test_pixelated_images_consist_of_blocks(rgba):
    image = _degraded(rgba, "pixelated")
    changed = (image[..., 1:] - image[..., :-1]).abs().amax((1, 2)) > 1e-4
    # Blocks of 2 to 4 pixels at this size: columns change at most at every other place.
    assert (changed.sum(1) <= SIZE // 2).all()
    assert (changed.sum(1) > 4).all()


def test_defects_are_seeded_and_chosen_per_image(rgba):
    defect = torch.arange(COUNT) % (len(DEFECTS) + 1) - 1
    first, again, other = (degrade(rgba, BACKGROUND, defect, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(first[defect < 0], _degraded(rgba, None)[defect < 0])

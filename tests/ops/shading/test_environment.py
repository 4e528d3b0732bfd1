"""Panoramas, their filters and the BRDF table against closed forms and numerical integrals."""

import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from torch.nn import functional as F

from scoredist3d.ops.shading import environment as env


def unit(count: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return F.normalize(torch.randn(count, 3, generator=torch.Generator().manual_seed(seed), dtype=dtype), dim=-1)


def panorama_of(function, height: int = 32) -> torch.Tensor:
    """Panorama (H, 2 H, 3) of a function of directions."""
    return function(env.texel_directions(height, 2 * height, dtype=torch.float64))[..., None].expand(-1, -1, 3).clone()


def noise(height: int = 8, width: int = 16) -> torch.Tensor:
    return torch.rand(height, width, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_solid_angles_cover_the_sphere():
    angles = env.texel_solid_angles(10, 20, dtype=torch.float64)
    assert angles.sum().item() * 20 == pytest.approx(4 * math.pi)


def test_convention_of_the_panorama():
    corners = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, -1, 0], [0, 0, 1], [0, 0, -1]])
    u, v = env.panorama_coordinates(corners)
    torch.testing.assert_close(u[:3], torch.tensor([0.5, 0.25, 0.75]))  # +y is to the left of +x, as seen from inside
    torch.testing.assert_close(v, torch.tensor([0.5, 0.5, 0.5, 0.0, 1.0]))


def test_samples_at_the_texels_are_the_texels():
    panorama = noise()
    directions = env.texel_directions(8, 16, dtype=torch.float64).reshape(-1, 3)
    torch.testing.assert_close(env.sample_panorama(panorama, directions), panorama.reshape(-1, 3))
    stack = env.pad_panorama(torch.stack([panorama, 1 - panorama])).permute(3, 0, 1, 2)
    for level, expected in ((0.0, panorama), (1.0, 1 - panorama), (0.5, torch.full_like(panorama, 0.5))):
        sampled = env.sample_padded_levels(stack, directions, torch.full((128,), level, dtype=torch.float64))
        torch.testing.assert_close(sampled, expected.reshape(-1, 3))


def test_no_seam_and_one_value_at_each_pole():
    panorama = noise()
    height = torch.linspace(-0.9, 0.9, 7, dtype=torch.float64)
    flat = (1 - height**2).sqrt()
    beside = [torch.stack([-flat, side * torch.full_like(flat, 1e-9), height], -1) for side in (1.0, -1.0)]
    torch.testing.assert_close(*(env.sample_panorama(panorama, side) for side in beside), atol=1e-7, rtol=0)
    turns = torch.linspace(0, 2 * math.pi, 9, dtype=torch.float64)
    for z, row in ((1.0, panorama[0]), (-1.0, panorama[-1])):
        around = torch.stack([1e-7 * turns.cos(), 1e-7 * turns.sin(), torch.full_like(turns, z)], -1)
        sampled = env.sample_panorama(panorama, around)
        torch.testing.assert_close(sampled, row.mean(0).expand(9, 3), atol=1e-6, rtol=0)


def test_gradients_of_samples():
    panorama, directions = noise().requires_grad_(), unit(12).requires_grad_()
    assert torch.autograd.gradcheck(env.sample_panorama, (panorama, directions))
    stack = torch.rand(2, 3, 6, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    level = torch.linspace(0.05, 0.93, 12, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(env.sample_padded_levels, (stack, directions, level))


def test_gradients_are_finite_at_the_poles_and_for_the_zero_vector():
    directions = torch.tensor([[0.0, 0, 1], [0, 0, -1], [0, 0, 0], [1e-5, 0, 1]], requires_grad=True)
    sampled = env.sample_panorama(noise().float(), directions)
    sampled.square().sum().backward()
    assert sampled.isfinite().all() and directions.grad.isfinite().all()
    assert directions.grad.abs().max() < 100


@pytest.mark.parametrize("size", [(8, 16), (5, 9), (48, 96)])
def test_resizing_keeps_the_light(size):
    """Resizing preserves the integral over the sphere: exactly when averaging, approximately when interpolating."""
    panorama = panorama_of(lambda d: 1 + 0.5 * d[..., 2] + 0.3 * d[..., 0] * d[..., 1], 24)
    resized = env.resize_panorama(panorama, *size)
    assert resized.shape == (*size, 3)
    totals = [(p * env.texel_solid_angles(*p.shape[:2], dtype=torch.float64)).sum() for p in (panorama, resized)]
    assert totals[1].item() == pytest.approx(totals[0].item(), rel=2e-3)
    torch.testing.assert_close(
        env.resize_panorama(torch.full_like(panorama, 0.7), *size)[..., 0].mean(), totals[0] * 0 + 0.7
    )


# Closed forms of the irradiance divided by pi, at the normal (x, y, z).
IRRADIANCE = {
    "uniform": (lambda d: torch.full_like(d[..., 0], 0.8), lambda n: torch.full_like(n[..., 0], 0.8)),
    "upper half": (lambda d: (d[..., 2] > 0).double(), lambda n: (1 + n[..., 2]) / 2),
    "linear": (lambda d: 1 + d[..., 2] - 0.5 * d[..., 1], lambda n: 1 + 2 / 3 * n[..., 2] - 1 / 3 * n[..., 1]),
    "quadratic": (lambda d: d[..., 0] * d[..., 1], lambda n: n[..., 0] * n[..., 1] / 4),
}


@pytest.mark.parametrize("name", IRRADIANCE)
def test_irradiance(name):
    radiance, expected = IRRADIANCE[name]
    _, irradiance = env.filter_bank(32, 64, 2)(panorama_of(radiance))
    normals = env.texel_directions(32, 64, dtype=torch.float64)
    torch.testing.assert_close(irradiance[..., 0], expected(normals), atol=2e-3, rtol=0)


@pytest.mark.parametrize("level", [1, 2, 3, 4, 5, 6, 7])
def test_glossy_levels_scale_harmonics_as_their_lobe_does(level):
    """Funk-Hecke: a lobe w multiplies a harmonic of degree l by int P_l(c) w(c) dc / int w(c) dc."""
    alpha = (level / 7) ** 2

    def lobe(c: float) -> float:
        half = (1 + c) / 2
        masking = 2 * c / (c + math.sqrt(alpha**2 + (1 - alpha**2) * c**2))
        return masking / (half * (alpha**2 - 1) + 1) ** 2

    # Where quad has to look for the narrow lobes.
    near = [1 - 10 * alpha**2, 1 - alpha**2] if alpha < 0.2 else None
    total = quad(lobe, 0, 1, points=near, limit=200)[0]
    glossy, _ = env.filter_bank(64, 128, 8)(panorama_of(lambda d: 1 + d[..., 2] + d[..., 0] * d[..., 1], 64))
    first = quad(lambda c: c * lobe(c), 0, 1, points=near, limit=200)[0] / total
    second = quad(lambda c: (1.5 * c * c - 0.5) * lobe(c), 0, 1, points=near, limit=200)[0] / total
    n = env.texel_directions(64, 128, dtype=torch.float64)
    expected = 1 + first * n[..., 2] + second * n[..., 0] * n[..., 1]
    torch.testing.assert_close(glossy[level, ..., 0], expected, atol=2e-3, rtol=0)


def test_the_smooth_level_is_the_panorama_and_light_is_kept():
    panorama = noise(16, 32)
    glossy, irradiance = env.filter_bank(16, 32, 4)(panorama)
    assert torch.equal(glossy[0], panorama)
    for blurred in (*glossy, irradiance):
        assert blurred.min() >= panorama.min() - 1e-6 and blurred.max() <= panorama.max() + 1e-6
    white = env.filter_bank(16, 32, 4)(torch.ones_like(panorama))
    assert all((maps - 1).abs().max() < 1e-6 for maps in white)


def test_a_point_of_light_spreads_with_the_roughness_around_its_place():
    panorama = torch.zeros(16, 32, 3, dtype=torch.float64)
    panorama[5, 20] = 1.0
    glossy, _ = env.filter_bank(16, 32, 5)(panorama)
    peaks = glossy[..., 0].flatten(1)
    assert (peaks.argmax(1) == 5 * 32 + 20).all()
    assert (peaks.amax(1).diff() < 0).all()


def test_filters_are_differentiable():
    bank = env.filter_bank(4, 8, 3)
    assert torch.autograd.gradcheck(lambda p: bank(p), noise(4, 8).requires_grad_())


def reflectance(cosine: float, roughness: float, f0: float) -> float:
    """Integral of D G F / (4 n.v n.l) (n.l) over l, with half vectors sampled from D (n . h)."""
    alpha, count = roughness**2, 400
    u = (np.arange(count) + 0.5) / count
    c_half = np.sqrt((1 - u) / (1 + (alpha**2 - 1) * u))[:, None]
    phi = (math.pi * u)[None, :]
    s_half = np.sqrt(1 - c_half**2)
    facing = math.sqrt(1 - cosine**2) * s_half * np.cos(phi) + cosine * c_half
    light = 2 * facing * c_half - cosine
    valid = (light > 0) & (facing > 0)
    light, facing = np.where(valid, light, 1.0), np.where(valid, facing, 1.0)

    def root(c):
        return np.sqrt(alpha**2 + (1 - alpha**2) * c**2)

    # Height-correlated Smith: G / (4 n.v n.l) = 1 / (2 (n.l root(v) + n.v root(l))).
    visibility = 0.5 / (light * root(cosine) + cosine * root(light))
    fresnel = f0 + (1 - f0) * (1 - facing) ** 5
    return float(np.where(valid, fresnel * visibility * light * 4 * facing / c_half, 0.0).mean())


@pytest.mark.parametrize("roughness", [0.1, 0.3, 0.6, 1.0])
@pytest.mark.parametrize("cosine", [0.1, 0.5, 0.95])
def test_brdf_table(roughness, cosine):
    arguments = (torch.tensor([value], dtype=torch.float32) for value in (cosine, roughness))
    scale, bias = (value.item() for value in env.sample_table(env.brdf_table(), *arguments))
    for f0 in (0.04, 1.0):
        assert f0 * scale + bias == pytest.approx(reflectance(cosine, roughness, f0), abs=4e-3)


def test_brdf_table_never_reflects_more_than_it_receives():
    table = env.brdf_table()
    assert table.min() >= 0 and table.sum(0).max() <= 1 + 1e-5
    smooth = table[:, 0].sum(0)
    torch.testing.assert_close(smooth[8:], torch.ones_like(smooth[8:]), atol=1e-3, rtol=0)


def test_brdf_table_is_differentiable():
    cosine, roughness = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in ([0.31, 0.8], [0.2, 0.77]))
    table = env.brdf_table().double()
    assert torch.autograd.gradcheck(lambda c, r: env.sample_table(table, c, r), (cosine, roughness))


def test_lobes_lean_towards_the_normal_as_they_get_rough():
    normal, mirrored = (
        F.normalize(torch.tensor([v], dtype=torch.float64), dim=-1) for v in ([0.0, 0, 1], [1.0, 0, 0.3])
    )
    for roughness, expected in ((0.0, mirrored), (1.0, normal)):
        toward = env.glossy_directions(normal, mirrored, torch.full((1,), roughness, dtype=torch.float64))
        torch.testing.assert_close(toward, expected, atol=1e-6, rtol=0)
    rough = torch.linspace(0.05, 0.95, 10, dtype=torch.float64, requires_grad=True)
    toward = env.glossy_directions(normal.expand(10, 3), mirrored.expand(10, 3), rough)
    assert (toward[:, 2].diff() > 0).all()
    assert torch.autograd.gradcheck(
        lambda r: env.glossy_directions(normal.expand(10, 3), mirrored.expand(10, 3), r), rough
    )

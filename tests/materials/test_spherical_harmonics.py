"""Spherical harmonics: the basis, its rotation, and the material."""

import math

import numpy as np
import pytest
import torch
from scipy.special import sph_harm_y

from scoredist3d import registry
from scoredist3d.config.validation import parse_component
from scoredist3d.materials import ShadingInputs
from scoredist3d.materials.spherical_harmonics import SphericalHarmonics
from scoredist3d.meshes.exportable import SurfaceChannels
from scoredist3d.ops.shading.spherical_harmonics import DC, harmonics, rotation_of


def material(**options) -> SphericalHarmonics:
    return registry.build(parse_component("material", {"type": "spherical-harmonics", **options}))


def directions(count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, 3, generator=generator, dtype=torch.float64)
    return torch.nn.functional.normalize(noise, dim=-1)


def quadrature() -> tuple[torch.Tensor, torch.Tensor]:
    """Directions and weights that integrate polynomials up to degree 15 exactly: Gauss-Legendre by equal angles."""
    z, weight = np.polynomial.legendre.leggauss(8)
    angle = 2 * math.pi * np.arange(16) / 16
    ring = np.sqrt(1 - z**2)
    points = np.stack([np.outer(ring, np.cos(angle)), np.outer(ring, np.sin(angle)), np.outer(z, np.ones(16))], -1)
    weights = np.outer(weight, np.full(16, 2 * math.pi / 16))
    return torch.from_numpy(points).view(-1, 3), torch.from_numpy(weights).view(-1)


def rotation(seed: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(3, 3, generator=generator, dtype=torch.float64))
    return q * torch.linalg.det(q)


@pytest.mark.parametrize("degree", [0, 1, 2, 3])
def test_the_basis_is_orthonormal(degree):
    points, weights = quadrature()
    basis = harmonics(points, degree)
    gram = basis.T @ (weights[:, None] * basis)
    torch.testing.assert_close(gram, torch.eye((degree + 1) ** 2, dtype=torch.float64), atol=1e-12, rtol=0)


def test_order_and_signs_are_those_of_the_complex_harmonics():
    """Real harmonics from complex ones of scipy: sqrt 2 (-1)^m Im Y_l|m| for m < 0, sqrt 2 (-1)^m Re Y_lm for m > 0."""
    points = directions(50)
    theta, phi = torch.acos(points[:, 2]).numpy(), torch.atan2(points[:, 1], points[:, 0]).numpy()
    values = harmonics(points, 3)
    for degree in range(4):
        for order in range(-degree, degree + 1):
            complex_values = sph_harm_y(degree, abs(order), theta, phi)
            part = complex_values.real if order >= 0 else complex_values.imag
            expected = part * (math.sqrt(2) if order else 1.0)
            np.testing.assert_allclose(values[:, degree**2 + degree + order].numpy(), expected, atol=1e-12)


def test_other_degrees_are_refused():
    with pytest.raises(ValueError, match="degree must be from 0 to 3, got 4"):
        harmonics(directions(2), 4)


@pytest.mark.parametrize("degree", [0, 1, 2, 3])
def test_rotated_coefficients_give_the_rotated_function(degree):
    turn, points = rotation(), directions(40)
    coefficients = torch.linspace(-1, 1, (degree + 1) ** 2, dtype=torch.float64)
    matrix = rotation_of(turn, degree)
    there = harmonics(points @ turn.T, degree) @ (matrix @ coefficients)
    torch.testing.assert_close(there, harmonics(points, degree) @ coefficients, atol=1e-12, rtol=0)
    # Rotation keeps the constant, does not mix degrees, and preserves norms.
    torch.testing.assert_close(matrix[0], torch.eye((degree + 1) ** 2, dtype=torch.float64)[0], atol=1e-12, rtol=0)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(len(matrix), dtype=torch.float64), atol=1e-12, rtol=0)


def test_colour_by_hand():
    """Degree 1 along +x: Y = (DC, 0, 0, -sqrt(3 / 4 pi))."""
    built = material(degree=1, degree_every=0)
    assert built.num_features == 12 and built.needs_view_dirs
    features = torch.zeros(1, 12)
    features[0, :3] = torch.tensor([0.2, 0.0, -0.2])
    features[0, 9:] = torch.tensor([0.1, 0.2, 0.3])
    color = built(ShadingInputs(features, view_dirs=torch.tensor([[1.0, 0.0, 0.0]])))
    slope = math.sqrt(3 / (4 * math.pi))
    expected = [0.5 + DC * 0.2 - slope * 0.1, 0.5 - slope * 0.2, 0.5 - DC * 0.2 - slope * 0.3]
    torch.testing.assert_close(color, torch.tensor([expected]))


def test_degrees_are_switched_on_while_training():
    built = material(degree=2, degree_every=10)
    features = torch.randn(5, 27, generator=torch.Generator().manual_seed(0)) * 0.1
    view = directions(5).float()
    degrees = {}
    for step in (0, 9, 10, 25, 1000):
        built.update_step(step)
        degrees[step] = built.active_degree
    assert degrees == {0: 0, 9: 0, 10: 1, 25: 2, 1000: 2}
    built.update_step(0)
    torch.testing.assert_close(built(ShadingInputs(features)), built.channels(ShadingInputs(features)).base_color)
    assert (built.harmonics(features) == 0).all() and built.harmonics(features).shape == (5, 8, 3)
    built.update_step(10)
    with pytest.raises(ValueError, match="needs view directions"):
        built(ShadingInputs(features))
    lower = built(ShadingInputs(features, view_dirs=view))
    changed = features.clone()
    changed[:, 12:] += 1.0
    torch.testing.assert_close(built(ShadingInputs(changed, view_dirs=view)), lower)
    assert material(degree_every=0).active_degree == 3
    assert not material(degree=0).needs_view_dirs and material(degree=0).harmonics(features[:, :3]) is None


def test_features_of_a_colour_give_it_back_from_everywhere():
    built = material(degree=3, degree_every=0)
    color = torch.rand(20, 3, generator=torch.Generator().manual_seed(0))
    features = built.features_of(SurfaceChannels(color))
    assert features.shape == (20, 48) and (features[:, 3:] == 0).all()
    torch.testing.assert_close(built(ShadingInputs(features, view_dirs=directions(20).float())), color)
    torch.testing.assert_close(built.channels(ShadingInputs(features)).base_color, color)


def test_the_mean_over_all_directions_is_the_exported_colour():
    built = material(degree=3, degree_every=0)
    points, weights = quadrature()
    features = 0.05 * torch.randn(1, 48, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    seen = built(ShadingInputs(features.expand(len(points), -1), view_dirs=points))
    mean = (weights[:, None] * seen).sum(0, keepdim=True) / (4 * math.pi)
    torch.testing.assert_close(mean, built.channels(ShadingInputs(features)).base_color, atol=1e-12, rtol=0)


def test_gradients_inside_and_beyond_the_range():
    built = material(degree=2, degree_every=0)
    features = (
        0.1 * torch.randn(4, 27, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    ).requires_grad_()
    view = directions(4)
    assert torch.autograd.gradcheck(lambda value: built(ShadingInputs(value, view_dirs=view)), features)
    # The loss increases both colors; only the one below the range may get a gradient.
    beyond = torch.zeros(1, 27, dtype=torch.float64)
    beyond[0, 0], beyond[0, 1] = 5.0, -5.0
    beyond.requires_grad_()
    color = built(ShadingInputs(beyond, view_dirs=view[:1]))
    assert color[0, 0] == 1.0 and color[0, 1] == 0.0
    (-color).sum().backward()
    assert beyond.grad[0, 0] == 0.0 and beyond.grad[0, 1] < 0.0

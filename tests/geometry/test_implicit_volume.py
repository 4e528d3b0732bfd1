"""The hash-grid density field: blobs, scale, normals, gradients, coarse to fine."""

import math

import pytest
import torch
from torch.nn import functional as F

from scoredist3d import registry
from scoredist3d.config.fields import ConfigError
from scoredist3d.config.validation import parse_component
from scoredist3d.geometry.implicit_volume import ImplicitVolume
from scoredist3d.seeding import Rng

SMALL_GRID = {"num_levels": 3, "log2_hashmap_size": 8, "base_resolution": 4}


def volume(rng: Rng | None = None, **options) -> ImplicitVolume:
    return registry.build(parse_component("geometry", {"type": "implicit-volume", **options}), rng=rng)


def ball_points(count: int, radius: float = 1.0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    direction = F.normalize(torch.randn(count, 3, generator=generator, dtype=dtype), dim=-1)
    return radius * direction * torch.rand(count, 1, generator=generator, dtype=dtype) ** (1 / 3)


def silenced(geometry: ImplicitVolume) -> ImplicitVolume:
    """The same field with a network that is 0 everywhere, so that only the blob remains."""
    with torch.no_grad():
        geometry.network.weights[-1].zero_()
    return geometry


def rough(geometry: ImplicitVolume, scale: float = 0.5) -> ImplicitVolume:
    """The same field with large table entries."""
    with torch.no_grad():
        geometry.table.uniform_(-scale, scale, generator=torch.Generator().manual_seed(5))
    return geometry


def test_default_builds_with_seeded_parameters():
    state = torch.random.get_rng_state()
    first, again, other = volume(Rng(seed=1)), volume(Rng(seed=1, rank=3)), volume(Rng(seed=2))
    assert torch.equal(torch.random.get_rng_state(), state)
    for a, b in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)  # every rank starts from the same parameters
    assert not torch.equal(first.table, other.table)
    assert first.table.abs().max() <= 1e-4


def test_output_shapes_and_cheap_density():
    geometry, points = rough(volume()), ball_points(50)
    output = geometry(points, with_normal=True)
    assert output.density.shape == (50,) and output.features.shape == (50, 3) and output.normal.shape == (50, 3)
    assert geometry(points).normal is None
    torch.testing.assert_close(geometry.density(points), output.density)
    empty = geometry(torch.zeros(0, 3), with_normal=True)
    assert empty.density.shape == (0,) and empty.normal.shape == (0, 3)


@pytest.mark.parametrize(
    ("blob", "raw"),
    [
        ("blob_magic3d", lambda u: 10 * (1 - u / 0.5)),
        ("blob_dreamfusion", lambda u: 10 * math.exp(-(u**2) / (2 * 0.5**2))),
        ("none", lambda u: 0.0),
    ],
)
@pytest.mark.parametrize(
    ("activation", "act"), [("softplus", lambda x: math.log1p(math.exp(x))), ("trunc-exp", math.exp)]
)
def test_initial_density_is_the_blob(blob, raw, activation, act):
    geometry = silenced(volume(density_blob=blob, density_activation=activation))
    for u in (0.0, 0.3, 0.9):
        density = geometry.density(torch.tensor([[0.6 * u, 0.0, -0.8 * u]])).item()
        assert density == pytest.approx(act(raw(u)), rel=1e-5)


def test_density_is_zero_outside_the_ball():
    geometry = rough(volume(radius=0.7))
    points = torch.tensor([[0.71, 0.0, 0.0], [0.5, 0.5, 0.5], [9.0, 9.0, 9.0], [0.0, 0.0, -0.69]])
    density = geometry.density(points)
    assert (density[:3] == 0).all() and density[3] > 0
    torch.testing.assert_close(geometry(points).density, density)


def test_radius_is_a_change_of_units():
    """At twice the radius, the field has half the density at twice the coordinates, and thus the same opacity."""
    small, large = rough(volume(radius=1.0)), rough(volume(radius=2.0))
    points = ball_points(100)
    a, b = small(points, with_normal=True), large(2 * points, with_normal=True)
    torch.testing.assert_close(b.density, a.density / 2)
    torch.testing.assert_close(b.features, a.features)
    torch.testing.assert_close(b.normal, a.normal, atol=1e-4, rtol=0)


def test_truncated_exp_is_continued_linearly():
    geometry = silenced(volume(density_activation="trunc-exp", density_blob="none"))
    bias = geometry.network.biases[-1]
    for raw, value, slope in [(2.0, math.exp(2), math.exp(2)), (100.0, math.exp(15) * 86, math.exp(15))]:
        with torch.no_grad():
            bias[0] = raw
        density = geometry.density(torch.zeros(1, 3)).sum()
        (gradient,) = torch.autograd.grad(density, bias)
        assert density.item() == pytest.approx(value, rel=1e-5) and gradient[0].item() == pytest.approx(slope, rel=1e-5)


def test_parameter_gradients_match_finite_differences():
    """Directional derivatives of a random functional of density and features, in float64."""
    geometry = rough(volume(grid={**SMALL_GRID, "backend": "torch"})).double()
    points = ball_points(40, dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    mix = torch.randn(40, 4, generator=generator, dtype=torch.float64)

    def functional() -> torch.Tensor:
        output = geometry(points)
        return (torch.cat([output.density[:, None], output.features], dim=-1) * mix).sum()

    check_directional_derivatives(geometry, functional, generator)


@pytest.mark.parametrize("normal", ["analytic", "finite-difference"])
def test_normals_can_be_trained(normal):
    """The gradient of a functional of the normals (for analytic ones a second derivative of the field)."""
    options = {"grid": {**SMALL_GRID, "backend": "torch"}, "normal": normal}
    geometry = rough(volume(**options)).double()
    points = 0.9 * ball_points(40, dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    mix = torch.randn(40, 3, generator=generator, dtype=torch.float64)
    check_directional_derivatives(geometry, lambda: (geometry(points, with_normal=True).normal * mix).sum(), generator)


def check_directional_derivatives(geometry, functional, generator, step=1e-6):
    parameters = list(geometry.parameters())
    gradients = torch.autograd.grad(functional(), parameters, allow_unused=True)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if gradient is None:
            continue
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        values = []
        for sign in (1.0, -1.0):
            with torch.no_grad():
                parameter.add_(sign * step * direction)
            values.append(functional().item())
            with torch.no_grad():
                parameter.sub_(sign * step * direction)
        expected = (values[0] - values[1]) / (2 * step)
        assert (gradient * direction).sum().item() == pytest.approx(expected, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("normal", ["analytic", "finite-difference"])
@pytest.mark.parametrize("blob", ["blob_magic3d", "blob_dreamfusion"])
def test_normals_of_a_blob_point_outward(normal, blob):
    geometry = silenced(volume(normal=normal, density_blob=blob))
    points = ball_points(200)
    points = points[points.norm(dim=-1) > 0.3]
    outward = geometry(points, with_normal=True).normal
    # The four-point stencil sees mixed second derivatives: with offsets of 0.01 / sqrt(3) per axis and the blobs'
    # |Hessian| / |gradient| of at most 4, the direction is off by up to 0.023.
    torch.testing.assert_close(
        outward, F.normalize(points, dim=-1), atol=1e-5 if normal == "analytic" else 0.023, rtol=0
    )


def test_analytic_and_finite_difference_normals_agree():
    options = {"grid": {**SMALL_GRID, "backend": "torch"}, "finite_difference_step": 1e-5}
    analytic, difference = (
        rough(volume(normal=kind, **options)).double() for kind in ("analytic", "finite-difference")
    )
    points = 0.95 * ball_points(500, dtype=torch.float64)
    a, b = (geometry(points, with_normal=True) for geometry in (analytic, difference))
    torch.testing.assert_close(a.density, b.density)
    torch.testing.assert_close(a.normal.norm(dim=-1), torch.ones(500, dtype=torch.float64))
    wrong = (a.normal - b.normal).norm(dim=-1) > 1e-4
    # The field has kinks at the grid's cell faces and the network's; a stencil of 2e-5 rarely straddles one.
    assert wrong.sum() <= 5


def test_analytic_normals_work_without_gradients_and_at_the_centre():
    geometry = rough(volume(normal="analytic"))
    points = torch.cat([torch.zeros(1, 3), ball_points(10)])
    with torch.no_grad():
        output = geometry(points, with_normal=True)
    assert not (output.normal.requires_grad or output.density.requires_grad or output.features.requires_grad)
    geometry(points, with_normal=True).normal[:, 0].sum().backward()
    assert torch.isfinite(output.normal).all() and torch.isfinite(geometry.table.grad).all()


def test_coarse_to_fine_switches_levels_on():
    schedule = {"start_level": 2, "start_step": 100, "every": 50}
    geometry = volume(grid={"num_levels": 4, "coarse_to_fine": schedule})
    levels = {}
    for step in (0, 100, 149, 150, 200, 10_000, 0):
        geometry.update_step(step)
        levels[step] = geometry.num_active_levels
    assert levels == {0: 2, 100: 2, 149: 2, 150: 3, 200: 4, 10_000: 4}
    assert volume().num_active_levels == 8


def test_inactive_levels_neither_act_nor_learn():
    geometry = rough(volume(grid={"num_levels": 4, "coarse_to_fine": {"start_level": 2}}))
    points, fine = ball_points(30), geometry.spec.offsets[2]
    before = geometry(points)
    (before.density.sum() + before.features.sum()).backward()
    assert (geometry.table.grad[fine:] == 0).all() and (geometry.table.grad[:fine] != 0).any()
    with torch.no_grad():
        geometry.table[fine:] += 1.0
    after = geometry(points)
    assert torch.equal(after.density, before.density) and torch.equal(after.features, before.features)
    geometry.update_step(10_000)
    assert not torch.equal(geometry(points).density, before.density)


def test_parameter_groups_hold_every_parameter_once():
    geometry = volume()
    groups = {group["name"]: group["params"] for group in geometry.parameter_groups()}
    assert set(groups) == {"encoding", "network"} and groups["encoding"][0] is geometry.table
    grouped = [id(parameter) for params in groups.values() for parameter in params]
    assert sorted(grouped) == sorted(id(parameter) for parameter in geometry.parameters())


def test_finest_resolution_can_be_given():
    spec = volume(grid={"num_levels": 5, "base_resolution": 8, "max_resolution": 128}).spec
    assert spec.resolutions[0] == 8 and abs(spec.resolutions[-1] - 128) <= 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"grid": {"num_levels": 4, "coarse_to_fine": {"start_level": 5}}},
            "start_level: must be at most grid.num_levels = 4",
        ),
        (
            {"grid": {"base_resolution": 16, "max_resolution": 8}},
            "max_resolution: must be at least grid.base_resolution = 16",
        ),
        ({"density_activation": "relu"}, "density_activation"),
        ({"radius": 0}, "radius"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        volume(**options)

"""NeuS against its closed forms on a sphere."""

import math

import pytest
import torch
from shared.volume_scenes import FogBall, SolidSphere, build, impact, orbits, renderer_of
from torch.nn import functional as F

from scoredist3d.ops.volume_rendering.compositing import render_weights
from scoredist3d.ops.volume_rendering.ray_marching import RaySamples
from scoredist3d.renderers.neus import NeuSRenderer
from scoredist3d.seeding import Rng

DENSE = {"occupancy": {"enabled": False}, "cos_anneal_steps": 0}


def test_alpha_is_that_of_the_paper():
    """alpha_i = max(0, (Phi(f_i) - Phi(f_{i+1})) / Phi(f_i)) on a ray straight through the sphere."""
    draw = renderer_of(SolidSphere(0.5), "neus-volume", inv_std=30.0, **DENSE)
    edges = torch.linspace(2.0, 4.0, 41)
    samples = RaySamples(torch.zeros(40, dtype=torch.long), edges[:-1], edges[1:], torch.tensor([0, 40]), 1)
    points = torch.stack([3.0 - samples.midpoints, *[torch.zeros(40)] * 2], dim=1)
    values = draw.geometry(points, with_normal=True)
    view_dirs = torch.tensor([[-1.0, 0.0, 0.0]]).expand(40, 3)
    depth = draw._extinction(values, samples, view_dirs, 0) * samples.lengths
    phi = torch.sigmoid(30.0 * ((3.0 - edges).abs() - 0.5))
    alpha = ((phi[:-1] - phi[1:]) / phi[:-1]).clamp_min(0.0)
    torch.testing.assert_close(1 - torch.exp(-depth), alpha, atol=1e-5, rtol=1e-4)
    weights = render_weights(depth / samples.lengths, samples)
    # The product of all 1 - alpha telescopes to Phi(-1/2) / Phi(1/2) for the front surface.
    assert weights.sum().item() == pytest.approx(1 - math.exp(-15.0), abs=1e-5)


@pytest.mark.parametrize("inv_std", [20.0, 100.0, 1000.0])
def test_depth_of_a_sphere_has_no_bias(inv_std):
    """The maximum and the mean of the weights lie on the surface, up to the effect of curvature at low sharpness."""
    cameras = orbits(0.0, 120.0, size=9, fovy=15.0)
    draw = renderer_of(SolidSphere(0.5), "neus-volume", inv_std=inv_std, num_samples=800, **DENSE)
    render = draw(cameras, step=0)
    rays = cameras.rays()
    distance = impact(cameras)
    middle = -(rays.origins * rays.directions).sum(-1)
    hit = distance < 0.4
    expected = middle - (0.25 - distance.square()).clamp_min(0).sqrt()
    cosine = (0.25 - distance.square()).clamp_min(0).sqrt() / 0.5
    # Steps of 2 / 800; the logistic density has a standard deviation of 1.8 / (s cos) along the ray.
    tolerance = 0.002 + 1.5 / (inv_std * cosine) ** 2 + 0.1 / inv_std
    assert hit.sum() > 20
    assert ((render.depth[..., 0] - expected).abs() < tolerance)[hit].all()
    assert (render.opacity[..., 0][hit] > 0.98 if inv_std > 50 else render.opacity[..., 0][hit] > 0.9).all()
    assert (render.opacity[..., 0][distance > 0.5 + 6 / inv_std] < 0.01).all()


@pytest.mark.parametrize("steps", [0, 1000])
@pytest.mark.parametrize("slope", [0.25, 1.0, 4.0])
def test_a_field_that_is_no_distance_shows_its_surface_where_it_is(slope, steps):
    """A gradient norm other than 1 does not shift the surface."""
    # The same sharpness along the ray in all cases.
    options = DENSE | {"inv_std": 40.0 / slope, "num_samples": 800, "cos_anneal_steps": steps}
    render = renderer_of(SolidSphere(0.5, slope), "neus-volume", **options)(orbits(0.0, size=1), step=0)
    assert render.depth.item() == pytest.approx(2.5, abs=0.003)
    assert render.opacity.item() == pytest.approx(1.0, abs=2e-3)


@pytest.mark.parametrize("slope", [0.25, 4.0])
@pytest.mark.parametrize("step", [0, 50, 100])
def test_hidden_samples_of_such_a_field_do_not_change_the_image(slope, step):
    """The transmittance from distances alone is an upper bound of that from the slopes."""
    cameras, options = orbits(0.0, 100.0, size=12), DENSE | {"inv_std": 60.0 / slope, "cos_anneal_steps": 100}
    every, reached = (
        renderer_of(SolidSphere(0.5, slope), "neus-volume", min_transmittance=limit, **options)(
            cameras, step=step, rng=Rng()
        )
        for limit in (0.0, 1e-3)
    )
    torch.testing.assert_close(reached.opacity, every.opacity, atol=2e-3, rtol=0)
    torch.testing.assert_close(reached.depth, every.depth, atol=5e-3, rtol=0)


def test_what_has_passed_is_not_underestimated():
    """The bound holds for each sample of a ray through the sphere at all annealing stages."""
    edges = torch.linspace(2.0, 2.9, 41)
    samples = RaySamples(torch.zeros(40, dtype=torch.long), edges[:-1], edges[1:], torch.tensor([0, 40]), 1)
    points = torch.stack([3.0 - samples.midpoints, *[torch.zeros(40)] * 2], dim=1)
    view_dirs = torch.tensor([[-1.0, 0.0, 0.0]]).expand(40, 3)
    for slope in (0.25, 1.0, 4.0):
        draw = renderer_of(SolidSphere(0.5, slope), "neus-volume", inv_std=30.0 / slope, cos_anneal_steps=100)
        values = draw.geometry(points, with_normal=True)
        for step in (0, 50, 100):
            depth = draw._extinction(values, samples, view_dirs, step) * samples.lengths
            reached = torch.exp(depth - depth.cumsum(0))
            assert (draw._transmittance(samples, points) >= reached - 1e-5).all()


def test_the_slope_is_annealed():
    """At the start, surfaces have half weight at any orientation; at the end, only front faces count."""
    draw = renderer_of(SolidSphere(0.5), "neus-volume", inv_std=10.0, cos_anneal_steps=100)
    points = torch.tensor([[0.5, 0.0, 0.0], [-0.5, 0.0, 0.0], [0.0, 0.5, 0.0]])
    samples = RaySamples(torch.arange(3), torch.full((3,), 1.0), torch.full((3,), 1.1), torch.arange(4), 3)
    view_dirs = torch.tensor([[-1.0, 0.0, 0.0]]).expand(3, 3)
    values = draw.geometry(points, with_normal=True)
    for step, slopes in ((0, [1.0, 0.0, 0.5]), (50, [1.0, 0.0, 0.25]), (100, [1.0, 0.0, 0.0]), (900, [1.0, 0.0, 0.0])):
        depth = draw._extinction(values, samples, view_dirs, step) * 0.1
        # On the surface log Phi(h) - log Phi(-h) = s h, with h the slope times half a step.
        half = 10.0 * 0.05 * torch.tensor(slopes)
        torch.testing.assert_close(depth, F.logsigmoid(half) - F.logsigmoid(-half), atol=1e-5, rtol=1e-4)


def test_hidden_samples_do_not_change_the_image():
    """This also holds for an edge so sharp that a single interval contains it."""
    cameras = orbits(0.0, 100.0, size=12)
    for inv_std in (20.0, 3000.0):
        every, reached = (
            renderer_of(SolidSphere(0.5), "neus-volume", inv_std=inv_std, min_transmittance=limit, **DENSE)
            for limit in (0.0, 1e-3)
        )
        first, second = every(cameras, step=0, rng=Rng()), reached(cameras, step=0, rng=Rng())
        torch.testing.assert_close(second.opacity, first.opacity, atol=2e-3, rtol=0)
        torch.testing.assert_close(second.rgb, first.rgb, atol=2e-3, rtol=0)


@pytest.mark.parametrize("estimator", ["occupancy", "importance", "proposal"])
def test_every_estimator_and_its_gradients(estimator):
    geometry = SolidSphere(0.5)
    draw = renderer_of(geometry, "neus-volume", estimator=estimator, inv_std=60.0, cos_anneal_steps=0)
    for step in range(0, 320, 16):
        draw.update_step(step, Rng())
    cameras = orbits(0.0, 100.0, size=12)
    render = draw(cameras, step=0)
    opacity, distance = render.opacity[..., 0], impact(cameras)
    assert (opacity[distance < 0.42] > 0.97).all() and (opacity[distance > 0.62] < 0.03).all()
    # A larger sphere covers more of the image.
    (gradient,) = torch.autograd.grad(render.opacity.mean(), geometry.size, retain_graph=True)
    assert gradient > 0
    (sharper,) = torch.autograd.grad(render.opacity[:, 5:7, 5:7].mean(), draw.log_inv_std)
    assert sharper.isfinite() and sharper >= 0


def test_sharpness_is_learned_and_the_law_of_the_geometry_is_not():
    geometry = build("geometry", "implicit-sdf", grid={"num_levels": 2, "log2_hashmap_size": 6})
    draw = renderer_of(geometry, "neus-volume", inv_std=25.0)
    (group,) = draw.parameter_groups()
    assert group["name"] == "inv_std" and draw.inv_std.item() == pytest.approx(25.0)
    render = draw(orbits(0.0), step=5, rng=Rng(), needs=draw.outputs)
    (render.rgb.sum() + render.depth.sum()).backward()
    assert draw.log_inv_std.grad is not None and float(draw.log_inv_std.grad.abs()) > 0
    assert not geometry.log_beta.requires_grad
    assert [group["name"] for group in geometry.parameter_groups()] == ["encoding", "network"]
    assert all(p.grad is not None for p in geometry.parameters() if p.requires_grad)


@pytest.mark.parametrize("normal", ["analytic", "finite-difference"])
def test_fields_hand_on_their_gradient_as_long_as_it_is(normal):
    geometry = build("geometry", "implicit-sdf", normal=normal)
    with torch.no_grad():
        geometry.table.uniform_(-0.5, 0.5, generator=torch.Generator().manual_seed(0))
        geometry.network.weights[-1][0].fill_(1.0)
    points = torch.rand(50, 3, generator=torch.Generator().manual_seed(1)) - 0.5
    values = geometry(points, with_normal=True)
    torch.testing.assert_close(values.gradient, geometry.sdf_gradient(points))
    torch.testing.assert_close(values.normal, F.normalize(values.gradient, dim=-1))
    assert ((values.gradient.norm(dim=-1) - 1).abs() > 0.1).any()
    assert geometry(points).gradient is None


def test_fields_without_a_distance_are_refused():
    with pytest.raises(ValueError, match=r"^type: NeuSRenderer cannot render FogBall"):
        renderer_of(FogBall(1.0), "neus-volume")
    assert NeuSRenderer.outputs >= {"normal", "depth_variance"}

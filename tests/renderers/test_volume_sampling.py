"""Coarse bins, resampling, proposals, and every estimator's image of a ball."""

import math

import pytest
import torch
from shared.volume_scenes import FogBall, impact, orbits, renderer_of, rough_volume

from scoredist3d.ops.volume_rendering.ray_marching import RaySamples
from scoredist3d.renderers.volume_sampling import Bins, RayBatch, interlevel, quantiles, resample, uniform_bins
from scoredist3d.seeding import Rng

ESTIMATORS = ("occupancy", "importance", "proposal")


def bins_of(count: int, num_rays: int = 1, near: float = 2.0, length: float = 2.0) -> Bins:
    ones = torch.ones(num_rays, 1)
    return Bins(torch.arange(num_rays), near * ones, length / count * ones, count, num_rays)


def intervals(edges: list[float]) -> RaySamples:
    edges_ = torch.tensor(edges)
    count = len(edges) - 1
    return RaySamples(torch.zeros(count, dtype=torch.long), edges_[:-1], edges_[1:], torch.tensor([0, count]), 1)


def test_quantiles_invert_the_distribution_function():
    """Mass 1, 0, 3 in three bins: the lowest quarter fills the first bin, the rest the third."""
    mass = torch.tensor([[1.0, 0.0, 3.0]])
    levels = torch.tensor([[0.125, 0.2499, 0.5, 0.75, 1.0]])
    expected = torch.tensor([[0.5, 0.9996, 2 + 1 / 3, 2 + 2 / 3, 3.0]])
    torch.testing.assert_close(quantiles(mass, levels), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(quantiles(torch.zeros(1, 4), levels), 4 * levels)


def test_quantiles_of_random_levels_follow_the_density():
    """Kolmogorov-Smirnov: the distance to the true distribution function is below 1.63 / sqrt(n) in 99 of 100 cases."""
    generator = torch.Generator().manual_seed(3)
    mass = torch.rand(1, 16, generator=generator)
    count = 20_000
    positions = quantiles(mass, torch.rand(1, count, generator=generator))[0].sort().values
    below = torch.nn.functional.pad(mass[0].cumsum(0), (1, 0)) / mass.sum()
    index = positions.long().clamp_max(15)
    truth = below[index] + (positions - index) * (below[index + 1] - below[index])
    assert (truth - torch.arange(count) / count).abs().max() < 1.63 / math.sqrt(count)


@pytest.mark.parametrize("jitter", [None, 0.0, 0.3, 0.999])
def test_resampled_intervals_cover_the_chord_and_share_the_weight(jitter):
    bins = bins_of(8, num_rays=2)
    weights = torch.tensor([[0, 0, 0.1, 0.5, 0.2, 0, 0, 0], [0.0] * 8])
    shift = None if jitter is None else torch.full((2,), jitter)
    samples = resample(bins, weights, 16, jitter=shift, padding=0.02)
    assert samples.offsets.tolist() == [0, 16, 32] and samples.ray_indices.tolist() == [0] * 16 + [1] * 16
    starts, ends = samples.t_starts.view(2, 16), samples.t_ends.view(2, 16)
    assert (starts[:, 0] == 2.0).all() and torch.allclose(ends[:, -1], torch.full((2,), 4.0))
    assert torch.equal(starts[:, 1:], ends[:, :-1]) and (samples.lengths >= 0).all()
    if jitter is None:
        # The blur is a max filter of width 2, followed by a mean of width 2.
        mass = torch.tensor([0, 0.05, 0.3, 0.5, 0.35, 0.1, 0, 0]) + 0.02 / 8
        below = torch.nn.functional.pad(mass.cumsum(0), (1, 0)) / mass.sum()
        place = (ends[0] - 2.0) / 0.25
        index = place.long().clamp_max(7)
        reached = below[index] + (place - index) * (below[index + 1] - below[index])
        torch.testing.assert_close(reached, torch.arange(1, 17) / 16, atol=1e-4, rtol=0)
        torch.testing.assert_close(samples.lengths.view(2, 16)[1], torch.full((16,), 2 / 16), atol=1e-5, rtol=0)


def test_bins_know_which_rays_hit():
    origins = torch.tensor([[3.0, 0.0, 0.0], [3.0, 0.0, 2.0], [3.0, 0.6, 0.0]])
    rays = RayBatch(origins, torch.tensor([[-1.0, 0.0, 0.0]]).expand(3, 3), torch.zeros(3, dtype=torch.long))
    bins = uniform_bins(rays, 1.0, 4)
    assert bins.rays.tolist() == [0, 2]
    torch.testing.assert_close(bins.near[:, 0], torch.tensor([2.0, 2.2]))
    torch.testing.assert_close(bins.width[:, 0], torch.tensor([0.5, 0.4]))
    torch.testing.assert_close(bins.points(rays)[:2, 0], torch.tensor([0.75, 0.25]))
    weights = bins.weights(torch.full((8,), 1.5))
    torch.testing.assert_close(weights.sum(-1), 1 - torch.exp(torch.tensor([-3.0, -2.4])))
    samples = resample(bins, weights, 3, jitter=None, padding=0.01)
    assert samples.offsets.tolist() == [0, 3, 3, 6] and samples.ray_indices.tolist() == [0] * 3 + [2] * 3


def test_interlevel_loss_is_zero_where_the_proposal_bounds_the_weights():
    bins = bins_of(4)  # bins of length 0.5, from 2 to 4
    samples = intervals([2.0, 2.25, 2.75, 3.0, 4.0])
    weights = torch.tensor([0.1, 0.3, 0.2, 0.4])
    # The second sample overlaps the first two bins, and the last one the last two.
    enclosing = torch.tensor([[0.1, 0.2, 0.15, 0.25]])
    assert interlevel(bins, enclosing, samples, weights).item() < 1e-12
    short = torch.tensor([[0.05, 0.2, 0.15, 0.25]], requires_grad=True)
    loss = interlevel(bins, short, samples, weights)
    assert loss.item() == pytest.approx(0.05**2 / 0.1 + 0.05**2 / 0.3, rel=1e-4)
    loss.sum().backward()
    # d/dbound (w - bound)^2 / w = -2 (w - bound) / w; the first bin is in both bounds, the second in one.
    expected = torch.tensor([[-1.0 - 1 / 3, -1 / 3, 0.0, 0.0]])
    torch.testing.assert_close(short.grad, expected, atol=1e-4, rtol=0)


def test_a_histogram_bounds_what_was_sampled_from_it():
    """The weights of a medium are bounded by its weights at a coarser resolution, so the loss is 0."""
    generator = torch.Generator().manual_seed(1)
    fine = torch.rand(8, generator=generator) * 3
    samples = intervals([2.0 + 0.25 * index for index in range(9)])
    weights = bins_of(8).weights(fine)[0]
    coarse = bins_of(4).weights(fine.view(4, 2).mean(-1))
    assert interlevel(bins_of(4), coarse, samples, weights).item() == pytest.approx(0.0, abs=1e-10)
    thin = 0.5 * coarse
    assert interlevel(bins_of(4), thin, samples, weights).item() > 0.01


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("extinction", [0.7, 8.0])
def test_every_estimator_shows_the_opacity_of_a_ball(estimator, extinction):
    """O = 1 - exp(-sigma c), with the chord c = 2 sqrt(0.36 - b^2) of a ball of size 0.6 in a scene of radius 1."""
    options = {"num_samples": 600, "resampling": {"coarse_samples": 128, "padding": 1.0}}
    cameras = orbits(10.0, 200.0, size=9, fovy=30.0)
    draw = renderer_of(FogBall(extinction, size=0.6), estimator=estimator, **options)
    for step in range(0, 160, 16):
        draw.update_step(step, Rng())
    chord = 2 * (0.36 - impact(cameras).square()).clamp_min(0).sqrt()
    expected = 1 - torch.exp(-extinction * chord)
    for rng in (None, Rng(1)):
        opacity = draw(cameras, step=0, rng=rng).opacity[..., 0]
        # Two borders in steps of 2 / 600, or of twice that where half of them go where an unlearned proposal says;
        # the occupancy grid may miss the corners of its cells, an eleventh of the ball's size wide.
        wrong = (opacity - expected).abs()
        assert wrong.max() < extinction * (0.02 if estimator == "occupancy" else 0.0067) + 1e-4
        assert wrong.mean() < 0.005


def test_importance_spends_its_samples_on_the_object():
    """Resampling needs a tenth of the samples of uniform steps for the depth of a thin shell."""
    cameras = orbits(0.0, size=1)
    even, near = (
        renderer_of(FogBall(60.0, size=0.3), estimator=kind, num_samples=24, occupancy={"enabled": False})
        for kind in ("occupancy", "importance")
    )
    wanted = 3.0 - 0.3 + 1 / 60
    errors = [abs(draw(cameras, step=0).depth.item() - wanted) for draw in (even, near)]
    assert errors[1] < 0.006 and errors[1] < 0.5 * errors[0]


def test_the_proposal_learns_to_enclose_the_object():
    """The proposal loss decreases. It trains only the proposal, and only it trains the proposal."""
    geometry = FogBall(30.0, size=0.35)
    draw = renderer_of(geometry, estimator="proposal", num_samples=32)
    (group,) = draw.parameter_groups()
    assert group["name"] == "proposal" and {id(p) for p in group["params"]} == {id(p) for p in draw.parameters()}
    optimizer = torch.optim.Adam(group["params"], lr=0.02)
    cameras, losses = orbits(0.0, 120.0, size=12), []
    for step in range(40):
        render = draw(cameras, step=step, rng=Rng())
        loss = render.auxiliary_losses["interlevel"]
        optimizer.zero_grad()
        loss.backward(retain_graph=step == 0)
        assert geometry.level.grad is None
        if step == 0:
            before = [p.grad.clone() for p in group["params"]]
            render.rgb.sum().backward()
            assert all(torch.equal(p.grad, old) for p, old in zip(group["params"], before, strict=True))
            geometry.level.grad = None
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
    with torch.no_grad():
        assert draw(cameras, step=0).auxiliary_losses == {}


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_estimators_agree_on_a_rough_field(estimator):
    """With many samples, all estimators give the same image, also in chunks."""
    geometry = rough_volume(density_blob_strength=20.0)
    cameras = orbits(0.0, 100.0)
    truth = renderer_of(geometry, num_samples=600, occupancy={"enabled": False}, min_transmittance=0.0)
    draw = renderer_of(geometry, num_samples=300, estimator=estimator, evaluation_chunk=37)
    for step in range(0, 160, 16):
        draw.update_step(step, Rng())
    with torch.no_grad():
        expected, result = (one(cameras, step=0, needs={"normal"}) for one in (truth, draw))
    torch.testing.assert_close(result.rgb, expected.rgb, atol=0.02, rtol=0)
    seen = expected.opacity > 0.5
    assert (result.depth - expected.depth)[seen].abs().max() < 0.03

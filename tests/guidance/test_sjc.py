"""Score Jacobian chaining: equal to SDS with weight 1; without variance reduction noisier around the same mean."""

import pytest
import torch
from shared.method_cases import CountingPrior, gradient, latents, method, prompted

from scoredist3d.diffusion.cfg import guided_prediction
from scoredist3d.diffusion.schedule import FlowSchedule
from scoredist3d.seeding import Rng

LEVELS = {"t_min": 0.01, "t_max": 0.969}


@pytest.mark.parametrize("kind", ["vp-epsilon", "vp-v_prediction", "rf-v_prediction"])
def test_variance_reduced_form_is_sds_with_weight_one(kind):
    sjc = method("sjc", CountingPrior(kind), guidance_scale=7.5)
    sds = method("sds", CountingPrior(kind), guidance_scale=7.5, weighting="uniform", **LEVELS)
    for step in (0, 9):
        torch.testing.assert_close(gradient(sjc, latents(3), step), gradient(sds, latents(3), step), rtol=0, atol=1e-11)


@pytest.mark.parametrize("variance_reduction", [True, False])
def test_is_the_papers_formula_in_its_own_coordinates(variance_reduction):
    prior = CountingPrior()
    guidance = method("sjc", prior, guidance_scale=7.5, variance_reduction=variance_reduction)
    z, b = latents(3), prompted(guidance)
    context = guidance.begin(z, 4, Rng())
    n = context.noise(z)
    ratio = prior.schedule.lambda_(context.t)[:, None, None, None]
    y = z + ratio * n
    eps = guided_prediction(prior, y / (1 + ratio**2).sqrt(), context.t, b, 7.5).eps
    denoised = y - ratio * eps
    expected = -(denoised - (z if variance_reduction else y)) / ratio
    torch.testing.assert_close(gradient(guidance, z, 4, conditions=b), expected, rtol=0, atol=1e-10)


def test_plain_form_has_the_same_mean_and_more_variance():
    draws = {}
    for variance_reduction in (True, False):
        guidance = method(
            "sjc",
            CountingPrior(std=2.0),
            guidance_scale=1.0,
            variance_reduction=variance_reduction,
            t_min=0.8,
            t_max=0.8,
        )
        b = prompted(guidance)
        draws[variance_reduction] = torch.stack(
            [gradient(guidance, latents(8), step, conditions=b) for step in range(100)]
        )
    reduced, plain = draws[True], draws[False]
    # The data's spread of 2 keeps eps_hat close to eps where alpha is 0.2, so nearly all variance comes from the noise.
    assert plain.var(0).mean() > 4 * reduced.var(0).mean()
    difference = (plain - reduced).mean((0, 1))  # per element of (3, 8, 8), 800 draws
    assert (difference.abs() < 4.5 * (plain - reduced).std((0, 1)) / 800**0.5).all()


def test_default_timesteps_omit_the_papers_ends_and_nfe_is_one_prediction():
    prior = CountingPrior()
    guidance = method("sjc", prior)
    timesteps = [guidance.sample_timesteps(1, step, Rng())[0] for step in range(2000)]
    assert 0.01 <= min(timesteps) < 0.012 and 0.967 < max(timesteps) <= 0.969
    z, b = latents(2), prompted(guidance)
    assert guidance.nfe(b, guidance.begin(z, 0, Rng())).prior == 2
    gradient(guidance, z, conditions=b)
    assert prior.rows == [4]


def test_infinite_weights_are_refused():
    prior = CountingPrior()
    prior.schedule = FlowSchedule()
    for weighting in ("lambda", "flow"):
        with pytest.raises(ValueError, match=rf"^weighting: {weighting} is infinite at t_max 1"):
            method("sjc", prior, weighting=weighting, variance_reduction=False, t_max=1.0)
        method("sjc", prior, weighting=weighting, variance_reduction=True, t_max=1.0)
        method("sjc", prior, weighting=weighting, variance_reduction=False, t_max=0.9)

"""Probability-flow distillation against SDI, diffusers' samplers and closed forms on Gaussian data."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from shared.method_cases import CountingPrior, gradient, latents, method, prompted, views
from shared.sdi_cases import at, falling, red
from shared.trajectory_cases import M, S, coefficients, ddim, descend, empty, euler, gaussian

from scoredist3d.guidance.core.weighting import WEIGHTINGS
from scoredist3d.guidance.pfd import ProbabilityFlowDistillation as PFD
from scoredist3d.guidance.sdi import ScoreDistillationViaInversion as SDI
from scoredist3d.priors import CFGConditions, guided_prediction
from scoredist3d.seeding import Rng

PLAIN = {"guidance_scale": 1.0, "inversion_guidance_scale": 1.0}


def pfd(prior, **options: Any) -> PFD:
    return PFD(PFD.Config(**options), prior=prior)


@pytest.mark.parametrize("kind", ["vp-epsilon", "vp-sample", "vp-v_prediction", "rf-v_prediction"])
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_one_step_is_sdi(kind: str, weighting: str) -> None:
    prior = CountingPrior(kind)
    for noise in ({}, {"inversion_eta": 0.3}, {"inversion_eta": 0.3, "inversion_noise": "once", "tau_max": 0.1}):
        options = {"tau_max": 0.0, "inversion_eta": 0.0, "inversion_guidance_scale": -4.0, "weighting": weighting}
        options |= {**at(0.6), "guidance_scale": 5.0, "guidance_rescale": 0.3, **noise}
        ours, sdi = pfd(prior, ode_steps=1, **options), SDI(SDI.Config(**options), prior=prior)
        found, expected = (gradient(guidance, latents(2), 3, conditions=red(prior)) for guidance in (ours, sdi))
        if weighting == "lambda":
            assert torch.equal(found, expected)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10 * expected.abs().max().item())


@pytest.mark.parametrize("steps", [4, 20])
@pytest.mark.parametrize("kind", ["vp-epsilon", "vp-v_prediction"])
def test_target_is_the_end_of_ddim(kind: str, steps: int) -> None:
    prior, scheduler = CountingPrior(kind), ddim(steps, set_alpha_to_one=True)
    guidance = pfd(prior, guidance_scale=5.0, ode_steps=steps, **at(0.999))
    z, b = latents(2), red(prior)
    x = guidance.inverted(z, b, guidance.begin(z, 0, Rng()))[0]
    for timestep in scheduler.timesteps.tolist():
        t = torch.full((2,), timestep / 1000, dtype=torch.float64)
        x = scheduler.step(guided_prediction(prior, x, t, b, 5.0).eps, timestep, x, eta=0.0).prev_sample
    torch.testing.assert_close(gradient(guidance, z, conditions=b), z - x, rtol=0, atol=1e-10)


def test_target_of_a_flow_is_the_end_of_the_euler_sampler() -> None:
    prior = CountingPrior("rf-v_prediction")
    timesteps = [0.9 * (1 - k / 6) for k in range(6)]
    guidance = pfd(prior, guidance_scale=3.0, ode_steps=6, **at(0.9))
    z, b, scheduler = latents(2), red(prior), euler(timesteps)
    x = guidance.inverted(z, b, guidance.begin(z, 0, Rng()))[0]
    for sigma, timestep in zip(timesteps, scheduler.timesteps, strict=True):
        velocity = guided_prediction(prior, x, torch.full((2,), sigma, dtype=torch.float64), b, 3.0).v
        x = scheduler.step(velocity, timestep, x).prev_sample
    # The arithmetic of the scheduler is float32.
    torch.testing.assert_close(gradient(guidance, z, conditions=b), z - x, rtol=0, atol=5e-5)


def factor(timesteps: list[float]) -> float:
    """Factor of x - alpha M over DDIM steps on N(M, S^2) data, for timesteps down to -1 or up from -1.

    With D = alpha^2 S^2 + sigma^2, a step from t to s multiplies by (alpha_s alpha_t S^2 + sigma_s sigma_t) / D_t. The
    first step of an inversion starts at z, and its noise is predicted as at timestep 0.
    """
    product = 1.0
    for start, stop in pairwise(timesteps):
        alpha, sigma = coefficients(max(start, 0.0))
        alpha_s, sigma_s = coefficients(stop) if stop >= 0 else (1.0, 0.0)
        spread = alpha**2 * S**2 + sigma**2
        kept = alpha_s if start < 0 else alpha_s * alpha * S**2 / spread
        product *= kept + sigma_s * sigma / spread
    return product


@pytest.mark.parametrize(("inversion_steps", "ode_steps"), [(10, 1), (10, 10), (4, 7), (50, 50)])
@pytest.mark.parametrize("timestep", [0.2, 0.5, 0.9])
def test_gaussian_data_have_a_closed_form(timestep: float, inversion_steps: int, ode_steps: int) -> None:
    prior = gaussian()
    guidance = pfd(prior, inversion_steps=inversion_steps, ode_steps=ode_steps, **PLAIN, **at(timestep))
    z = M + S * torch.tensor([-2.0, -0.5, 1.0, 1.5], dtype=torch.float64).reshape(1, 1, 2, 2)
    up = guidance.inversion_timesteps(guidance.begin(z, 0, Rng()))
    down = factor(prior.schedule.timesteps(ode_steps, start=timestep))
    # The first prediction of an inversion is made for z at timestep 0, whose mean there is alpha M instead of M.
    alpha, sigma = coefficients(0.0)
    first = sigma / (alpha**2 * S**2 + sigma**2) * (1 - alpha) * M * coefficients(up[1])[1]
    expected = (z - M) * (1 - factor(up) * down) - first * factor(up[1:]) * down
    torch.testing.assert_close(gradient(guidance, z, conditions=empty(prior)), expected, rtol=0, atol=1e-9)


def test_samples_of_the_prior_stay_where_sdi_contracts_them() -> None:
    """Without guidance the gradient of PFD decreases with the number of steps; that of SDI has a limit above 0."""
    prior = gaussian()
    z = M + S * torch.randn(50, 1, 2, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    errors = []
    for steps in (5, 25, 125):
        options = {**PLAIN, **at(0.6), "inversion_steps": steps}
        ours, one = (
            gradient(pfd(prior, ode_steps=count, **options), z, conditions=empty(prior)) for count in (steps, 1)
        )
        errors.append(ours.square().mean().sqrt().item())
    assert errors[1] < 0.4 * errors[0] and errors[2] < 0.4 * errors[1] and errors[2] < 0.02
    assert one.square().mean().sqrt() > 0.2
    options = {**PLAIN, "inversion_steps": 125, **falling(0.9, 0.3, 3)}
    kept, contracted = (
        descend(pfd(prior, ode_steps=count, **options), z, empty(prior), range(4))[-1].std() / z.std()
        for count in (125, 1)
    )
    assert 0.85 < kept.item() < 1.0 and contracted.item() < 0.05


def test_inversion_guides_away_from_the_prompt() -> None:
    """The default scale 1 - gamma is the scale gamma with exchanged prompts."""
    prior = CountingPrior()
    z, b = latents(2), red(prior)
    implied, stated = pfd(prior, guidance_scale=5.0, **at(0.6)), pfd(prior, inversion_guidance_scale=-4.0, **at(0.6))
    swapped = pfd(prior, inversion_guidance_scale=5.0, **at(0.6))
    context = implied.begin(z, 0, Rng())
    x_t, kappa = implied.inverted(z, b, context)
    assert torch.equal(x_t, stated.inverted(z, b, context)[0])
    exchanged = swapped.inverted(z, CFGConditions(b.unconditional, b.positive), context)[0]
    torch.testing.assert_close(x_t, exchanged, rtol=0, atol=1e-10)
    alpha, sigma = coefficients(0.6)
    torch.testing.assert_close(x_t, alpha * z + sigma * kappa, rtol=0, atol=1e-12)
    assert torch.equal(implied.noisy_input(z, b, context), x_t)


@pytest.mark.parametrize(("perp_neg", "rows"), [(False, 2), (True, 4)])
def test_cost_is_that_of_both_odes(perp_neg: bool, rows: int) -> None:
    prior = CountingPrior()
    guidance = method("pfd", prior, inversion_steps=10, ode_steps=5, **at(0.6))
    b = prompted(guidance, cameras=views(2), perp_neg=perp_neg)
    gradient(guidance, latents(2), conditions=b)
    assert prior.rows == [2 * rows] * (7 + 5)
    assert guidance.nfe(b, guidance.begin(latents(2), 0, Rng())).prior == rows * (7 + 5)


def test_nothing_is_random_unless_noise_is_configured() -> None:
    prior = CountingPrior()
    z, b = latents(2), red(prior)
    still = pfd(prior, **at(0.5))
    assert torch.equal(gradient(still, z, 0, conditions=b), gradient(still, z, 9, conditions=b, rng=Rng(5)))
    for moving in (pfd(prior, tau_max=0.1, **at(0.5)), pfd(prior, inversion_eta=0.3, **at(0.5))):
        assert not torch.equal(gradient(moving, z, 0, conditions=b), gradient(moving, z, 9, conditions=b))


def test_no_prediction_is_made_where_the_noise_is_infinite() -> None:
    """A clean image predicted at the lowest timestep of a flow gives no finite noise in float32, and needs none."""
    guidance = pfd(CountingPrior("rf-sample"), ode_steps=8, **at(0.001))
    assert gradient(guidance, latents(2, torch.float32), conditions=red(guidance.prior)).isfinite().all()

"""Asynchronous score distillation: closed forms on Gaussian data, the limit without shift, and the drawn timesteps."""

from __future__ import annotations

import pytest
import torch
from shared.gaussian_data import M, S, between, coefficients, gaussian, normal
from shared.method_cases import CountingPrior, PairPrior, gradient, latents, method, prompted, views
from torch import Tensor

from scoredist3d.guidance.core.context import item_noise
from scoredist3d.priors import CFGConditions, guided_prediction, predict_each
from scoredist3d.seeding import Rng

RANGE = {"t_min": 0.1, "t_max": 0.9}


def steps(guidance, count: int, batch: int = 1) -> list[tuple[float, float]]:
    """(t, u) of every image in the first steps, in timesteps of 1000."""
    found = []
    for step in range(count):
        context = guidance.begin(latents(batch), step, Rng())
        pairs = zip(context.timesteps, guidance.later_timesteps(context), strict=True)
        found += [(1000 * t, 1000 * u) for t, u in pairs]
    return found


@pytest.mark.parametrize("gamma", [1.0, 7.5, 100.0])
@pytest.mark.parametrize("kind", ["vp-epsilon", "vp-sample", "rf-v_prediction"])
def test_without_shift_it_is_classifier_score_distillation(kind: str, gamma: float) -> None:
    prior = CountingPrior(kind)
    ours, csd = method("async-sd", prior, guidance_scale=gamma, shift=0.0), method("csd", prior)
    seen = CFGConditions(prior.embed(["red"]), prior.embed([""]))
    found, expected = (gradient(guidance, latents(3), 2, conditions=seen) for guidance in (ours, csd))
    torch.testing.assert_close(found, (gamma - 1.0) * expected, rtol=0, atol=1e-11 * gamma)


def exact(guidance, z: Tensor, step: int) -> tuple[Tensor, Tensor, Tensor]:
    """(w, pull, spread) of G = w (pull (z - M) + spread n) on N(M, S^2) data without guidance, for each item.

    With D = alpha^2 S^2 + sigma^2, the prediction at t is sigma alpha / D (z - M) + sigma^2 / D n.
    """
    context = guidance.begin(z, step, Rng())
    numbers = []
    for t, u in zip(context.timesteps, guidance.later_timesteps(context), strict=True):
        (alpha, sigma, _), (alpha_u, sigma_u, _) = (coefficients(guidance.prior, timestep) for timestep in (t, u))
        d, d_u = (alpha * S) ** 2 + sigma**2, (alpha_u * S) ** 2 + sigma_u**2
        numbers.append((sigma**2, sigma * alpha / d - sigma_u * alpha_u / d_u, sigma**2 / d - sigma_u**2 / d_u))
    w, pull, spread = torch.tensor(numbers, dtype=torch.float64)[:, :, None, None, None].unbind(1)
    return w, pull, spread


def test_gaussian_data_have_a_closed_form() -> None:
    prior = gaussian()
    guidance = method("async-sd", prior, guidance_scale=1.0, shift=0.3, **RANGE)
    z = M + S * normal(6)
    for step in range(3):
        w, pull, spread = exact(guidance, z, step)
        noise = item_noise(Rng(), "noise", step, z)
        found = gradient(guidance, z, step, conditions=between(prior, "thing"))
        torch.testing.assert_close(found, w * (pull * (z - M) + spread * noise), rtol=0, atol=1e-13)


def test_the_expected_gradient_vanishes_at_the_mode() -> None:
    prior = gaussian()
    guidance = method("async-sd", prior, guidance_scale=1.0, random_shift=False, t_min=0.1, t_max=0.5)
    z = torch.full_like(normal(64), M)
    found = gradient(guidance, z, conditions=between(prior, "thing"))
    # 1024 elements of mean 0.
    assert found.std() > 1e-4 and abs(found.mean().item()) < 4 * found.std().item() / 32


@pytest.mark.parametrize("t", [0.1, 0.2, 0.3, 0.4, 0.6, 0.8])
def test_gaussian_data_attract_at_high_noise_and_repel_at_low_noise(t: float) -> None:
    """The pull has the sign of lambda_t lambda_u - S^2."""
    prior = gaussian()
    guidance = method("async-sd", prior, guidance_scale=1.0, random_shift=False, shift=0.2, t_min=0.0, t_max=t)
    guidance.sample_timesteps = lambda batch, step, rng: [t] * batch
    z = normal(2)
    _, pull, _ = exact(guidance, z, 0)
    lambdas = [coefficients(prior, timestep)[2] for timestep in (t, 1.2 * t)]
    assert (pull[0].item() > 0) == (lambdas[0] * lambdas[1] > S**2)


@pytest.mark.parametrize("perp_neg", [False, True], ids=["plain", "perp-neg"])
def test_the_second_prediction_is_that_of_the_prompt_with_the_same_noise(perp_neg: bool) -> None:
    prior = CountingPrior()
    guidance = method("async-sd", prior, guidance_scale=7.5, shift=0.5, weighting="uniform", **RANGE)
    seen, z = prompted(guidance, cameras=views(2), perp_neg=perp_neg), latents(2)
    context = guidance.begin(z, 3, Rng())
    u = torch.tensor(guidance.later_timesteps(context), dtype=torch.float64)
    assert bool((u > context.t).all())
    noise = item_noise(Rng(), "noise", 3, z)
    first = guided_prediction(prior, prior.schedule.add_noise(z, noise, context.t), context.t, seen, 7.5).eps
    second = predict_each(prior, prior.schedule.add_noise(z, noise, u), u, [seen.positive])[0].eps
    prior.rows.clear()
    found = gradient(guidance, z, 3, conditions=seen)
    torch.testing.assert_close(found, first - second, rtol=0, atol=1e-11)
    assert prior.rows == [8 if perp_neg else 4, 2]


def test_shift_is_uniform_in_whole_timesteps() -> None:
    guidance = method("async-sd", CountingPrior(), shift=0.25, t_min=0.1, t_max=0.7)
    fractions = []
    for t, u in steps(guidance, 150, batch=2):
        assert 0 <= round(u - t) <= 0.25 * (t - 100) and abs(u - round(u)) < 1e-9
        if t > 300:
            fractions.append((u - t + 0.5) / (0.25 * (t - 100)))
    # Uniform on [0, 1]: mean 1/2, standard deviation 0.29.
    assert len(fractions) > 150 and abs(sum(fractions) / len(fractions) - 0.5) < 4 * 0.29 / len(fractions) ** 0.5


def test_largest_shift_is_that_of_the_released_code() -> None:
    guidance = method("async-sd", CountingPrior(), random_shift=False, shift=0.1, t_min=0.02, t_max=0.98)
    for t, u in steps(guidance, 60):
        k = round(t)
        assert round(u) == k + min(k - 20, 10 * (999 - k)) // 10


def test_shift_and_its_lower_end_follow_their_schedules() -> None:
    falling = {"from": 0.5, "to": 0.1, "end": 10}
    options = {"shift": {"from": 0.0, "to": 0.4, "end": 10}, "t_min": falling, "t_max": 0.6}
    guidance = method("async-sd", CountingPrior(), random_shift=False, **options)
    for step, low, eta in ((0, 500, 0.0), (5, 300, 0.2), (10, 100, 0.4)):
        context = guidance.begin(latents(1), step, Rng())
        t, u = (round(1000 * timestep) for timestep in (context.timesteps[0], guidance.later_timesteps(context)[0]))
        assert u == t + int(eta * (t - low) + 1e-6)


@pytest.mark.parametrize("kind", ["vp-epsilon", "vp-zero", "rf-v_prediction"])
def test_the_highest_timestep_is_the_limit(kind: str) -> None:
    guidance = method("async-sd", CountingPrior(kind), random_shift=False, shift=5.0, t_min=0.02, t_max=1.0)
    ends = {round(u) for _, u in steps(guidance, 40)}
    assert max(ends) <= (998 if kind == "vp-zero" else 999)


def test_views_that_are_denoised_jointly_share_a_shift() -> None:
    guidance = method("async-sd", PairPrior(), shift=0.5, **RANGE)
    (first, second, third, _), *_ = [steps(guidance, 1, batch=4)]
    assert first == second and first != third

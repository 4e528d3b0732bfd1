"""Interval and trajectory score matching against explicit inversions, and their limits."""

from itertools import pairwise

import pytest
import torch
from diffusers import DDIMScheduler
from shared.method_cases import CountingPrior, gradient, latents, prompted, views
from shared.trajectory_cases import ABAR, M, S, coefficients, empty, gaussian

from scoredist3d.diffusion.schedule import NoiseSchedule
from scoredist3d.guidance.ism import IntervalScoreMatching as ISM
from scoredist3d.priors import CFGConditions, guided_prediction
from scoredist3d.seeding import Rng

SD_CONFIG = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


def ism(prior, **options) -> ISM:
    return ISM(ISM.Config(**options), prior=prior)


def at(timestep: float, interval: float = 0.08, **options) -> dict:
    return {"t_min": timestep, "t_max": timestep, "interval": interval, **options}


def red(prior) -> CFGConditions:
    return CFGConditions(prior.embed(["red"]), prior.embed(["blue"]), empty=prior.embed([""]))


def times(timestep: float, z: torch.Tensor) -> torch.Tensor:
    return torch.full((len(z),), timestep, dtype=z.dtype)


def by_hand(prior, z, noise, b: CFGConditions, timesteps: list[int], t: int, scale: float):
    """(x_s, e_u(x_s), x_t, e_g(x_t)) computed with Stable Diffusion's scheduler."""

    def unguided(x, k):
        return prior.predict(x, times(k / 1000, z), b.empty.expand(len(z))).eps

    def step(x, e, k, to):
        x0 = (x - (1 - ABAR[k]).sqrt() * e) / ABAR[k].sqrt()
        return ABAR[to].sqrt() * x0 + (1 - ABAR[to]).sqrt() * e

    x = ABAR[timesteps[0]].sqrt() * z + (1 - ABAR[timesteps[0]]).sqrt() * noise
    for k, to in pairwise(timesteps):
        x = step(x, unguided(x, k), k, to)
    e_s = unguided(x, timesteps[-1])
    x_t = step(x, e_s, timesteps[-1], t)
    return x, e_s, x_t, guided_prediction(prior, x_t, times(t / 1000, z), b, scale).eps


@pytest.mark.parametrize(("steps", "timesteps"), [(5, [0, 200, 400, 520]), (2, [120, 320, 520]), (0, [520])])
def test_gradient_is_the_released_codes(steps, timesteps):
    prior = CountingPrior()
    guidance = ism(prior, guidance_scale=7.5, inversion_steps=steps, **at(0.6))
    z, b = latents(2), red(prior)
    context = guidance.begin(z, 3, Rng())
    noise = context.noise(z, "noise") + 0.1 * context.noise(z[:, :, :1, :1], "offset")
    x_s, e_s, x_t, e_g = by_hand(prior, z, noise, b, timesteps, 600, 7.5)
    expected = ((1 - ABAR[600]) / ABAR[600]).sqrt() * (e_g - e_s)
    ours = gradient(guidance, z, 3, conditions=b)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-10 * expected.abs().max().item())
    # With lambda weights G is the difference of two predicted images.
    images = [(x - sigma * e) / alpha for x, e, (alpha, sigma) in _at((x_s, e_s, 0.52), (x_t, e_g, 0.6))]
    torch.testing.assert_close(ours, images[0] - images[1], rtol=0, atol=1e-10 * expected.abs().max().item())


@pytest.mark.parametrize("index", [15, 90, 333, 600])
@pytest.mark.parametrize(("step", "interval"), [(1, 99), (700, 90), (3000, 80)])
def test_timesteps_are_those_of_the_samplers_grid(index, step, interval):
    """Stable Diffusion's samplers use the timesteps 1..1000; index i of the released code is timestep i + 1."""
    scheduler = DDIMScheduler(**SD_CONFIG)
    scheduler.set_timesteps(1000)
    grid = scheduler.timesteps.flip(0).tolist()
    s = max(index - interval, 0)
    timesteps = [*(grid[k] for k in range(0, s, 200)), grid[s]]
    prior = CountingPrior()
    prior.schedule = NoiseSchedule.from_config(SD_CONFIG)
    guidance = ISM(ISM.Config(guidance_scale=7.5, t_min=grid[index] / 1000, t_max=grid[index] / 1000), prior=prior)
    z, b = latents(2), red(prior)
    context = guidance.begin(z, step, Rng())
    noise = context.noise(z, "noise") + 0.1 * context.noise(z[:, :, :1, :1], "offset")
    _, e_s, _, e_g = by_hand(prior, z, noise, b, timesteps, grid[index], 7.5)
    expected = ((1 - ABAR[grid[index]]) / ABAR[grid[index]]).sqrt() * (e_g - e_s)
    found = gradient(guidance, z, step, conditions=b)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10 * expected.abs().max().item())


def test_timesteps_stay_on_the_samplers_grid():
    prior = CountingPrior()
    prior.schedule = NoiseSchedule.from_config(SD_CONFIG)
    guidance = ism(prior, **at(0.0))
    assert guidance.sample_timesteps(2, 0, Rng()) == [0.001, 0.001]
    assert guidance.inversion_timesteps(guidance.begin(latents(1), 0, Rng()))[0] == [0.001]


def _at(*states):
    return [(x, e, coefficients(timestep)) for x, e, timestep in states]


def test_a_vanishing_interval_leaves_classifier_guidance():
    prior = CountingPrior()
    z, b = latents(2), CFGConditions(prior.embed(["red"]), prior.embed([""]), empty=prior.embed([""]))

    def error(interval: float) -> float:
        guidance = ism(prior, guidance_scale=7.5, **at(0.8, interval))
        context = guidance.begin(z, 0, Rng())
        timesteps, _ = guidance.inversion_timesteps(context)
        below = guidance.predict_at(
            guidance.walk(_start(guidance, z, context, timesteps[0]), timesteps, b, 0.0), timesteps[-1], b, 0.0
        )
        x_t = guidance.move(below, timesteps[-1], 0.8)
        e_y, e_u = (guided_prediction(prior, x_t, context.t, b, scale).eps for scale in (1.0, 0.0))
        classifier = prior.schedule.lambda_(context.t)[0] * 7.5 * (e_y - e_u)
        return ((gradient(guidance, z, conditions=b) - classifier).norm() / classifier.norm()).item()

    errors = [error(interval) for interval in (0.08, 0.008, 0.001)]
    assert errors[1] < 0.2 * errors[0] and errors[2] < 0.2 * errors[1]


def _start(guidance: ISM, z, context, timestep: float):
    noise = context.noise(z, "noise") + 0.1 * context.noise(z[:, :, :1, :1], "offset")
    return guidance.schedule.add_noise(z, noise, times(timestep, z))


@pytest.mark.parametrize("gamma", [1.0, 0.6, 0.0])
def test_trajectory_score_matching_moves_the_baseline(gamma):
    prior = CountingPrior()
    guidance = ism(prior, guidance_scale=7.5, tsm_gamma=gamma, **at(0.8, 0.1))
    z, b = latents(2), red(prior)
    context = guidance.begin(z, 0, Rng())
    timesteps, mu = guidance.inversion_timesteps(context)
    assert mu == pytest.approx({1.0: 0.7, 0.6: 0.78, 0.0: 0.8}[gamma])  # s + 0.1 sqrt(1 - gamma^2)
    noise = context.noise(z, "noise") + 0.1 * context.noise(z[:, :, :1, :1], "offset")
    index = [round(timestep * 1000) for timestep in timesteps]
    _, e_s, x_t, e_g = by_hand(prior, z, noise, b, index, 800, 7.5)
    x_mu = by_hand(prior, z, noise, b, index, round(mu * 1000), 7.5)[2]
    empty_prompt = b.empty.expand(2)
    baseline = prior.predict(x_mu, times(mu, z), empty_prompt).eps
    if gamma == 1.0:
        torch.testing.assert_close(baseline, e_s, rtol=0, atol=1e-12)
    if gamma == 0.0:  # classifier score distillation on x_t
        baseline = prior.predict(x_t, times(0.8, z), empty_prompt).eps
    expected = prior.schedule.lambda_(context.t)[0] * (e_g - baseline)
    torch.testing.assert_close(
        gradient(guidance, z, conditions=b), expected, rtol=0, atol=1e-10 * expected.abs().max().item()
    )


def test_the_baseline_uses_the_empty_prompt_and_the_scale_affects_the_inversion():
    prior = CountingPrior()
    z = latents(2)
    plain = CFGConditions(prior.embed(["red"]), prior.embed([""]))
    negative = CFGConditions(prior.embed(["red"]), prior.embed(["blue"]), empty=prior.embed([""]))
    conditional = ism(prior, guidance_scale=1.0, **at(0.8))
    # At scale 1 the negative prompt has no effect, nor has it in the inversion.
    conditionals = (gradient(conditional, z, conditions=b) for b in (plain, negative))
    torch.testing.assert_close(*conditionals, rtol=0, atol=1e-11)
    guided = ism(prior, guidance_scale=7.5, **at(0.8))
    assert not torch.allclose(gradient(guided, z, conditions=plain), gradient(guided, z, conditions=negative))
    # The released code's reversed guidance e_y + c (e_u - e_y) is scale 1 - c.
    c = 3.0
    bent = ism(prior, inversion_steps=0, inversion_guidance_scale=1.0 - c, guidance_scale=1.0, **at(0.8))
    context = bent.begin(z, 0, Rng())
    x_s = _start(bent, z, context, 0.72)
    e_y, e_u = (prior.predict(x_s, times(0.72, z), c.expand(2)).eps for c in (plain.positive, plain.unconditional))
    e_s = e_y + c * (e_u - e_y)
    (alpha, sigma), (alpha_t, sigma_t) = coefficients(0.72), coefficients(0.8)
    x_t = alpha_t * (x_s - sigma * e_s) / alpha + sigma_t * e_s
    e_t = prior.predict(x_t, context.t, plain.positive.expand(2)).eps
    ours = gradient(bent, z, conditions=plain)
    torch.testing.assert_close(ours, sigma_t / alpha_t * (e_t - e_s), rtol=0, atol=1e-10 * ours.abs().max().item())


@pytest.mark.parametrize(("timestep", "evaluations"), [(0.6, 4), (0.28, 2), (0.08, 1), (0.05, 1)])
@pytest.mark.parametrize(("perp_neg", "rows"), [(False, 2), (True, 4)])
def test_nfe(timestep, evaluations, perp_neg, rows):
    prior = CountingPrior()
    for gamma, more in ((1.0, 0), (0.5, 1)):
        guidance = ism(prior, tsm_gamma=gamma, **at(timestep))
        b = prompted(guidance, cameras=views(3), perp_neg=perp_neg)
        prior.rows.clear()
        gradient(guidance, latents(3), conditions=b)
        spent = evaluations + more + rows
        assert sum(prior.rows) == 3 * spent
        assert guidance.nfe(b, guidance.begin(latents(3), 0, Rng())).prior == spent


def test_schedules_are_the_released_ones():
    guidance = ism(CountingPrior())
    for step, widest, interval in ((0, 0.98, 100), (750, 0.74, 90), (1500, 0.5, 80), (5000, 0.5, 80)):
        timesteps = [guidance.sample_timesteps(2, draw, Rng(step)) for draw in (step,)]
        assert all(a == b and 0.02 <= a <= widest for a, b in timesteps)
        context = guidance.begin(latents(1), step, Rng(step))
        t, s = (
            round(timestep * 1000) for timestep in (context.timesteps[0], guidance.inversion_timesteps(context)[0][-1])
        )
        assert s == max(t - interval, 0)


def test_fixed_noise_repeats_and_fresh_noise_does_not():
    prior = CountingPrior()
    z, b = latents(1).expand(2, -1, -1, -1), red(prior)
    fixed, fresh = (ism(prior, fixed_noise=choice, **at(0.5)) for choice in (True, False))
    one = gradient(fixed, z, 0, conditions=b, particles=(1, 1))
    assert torch.equal(one, gradient(fixed, z, 8, conditions=b, particles=(1, 1)))
    torch.testing.assert_close(one[0], one[1], rtol=0, atol=1e-11)
    assert not torch.equal(gradient(fresh, z, 0, conditions=b), gradient(fresh, z, 8, conditions=b))
    context = fixed.begin(z, 0, Rng())
    offset = fixed._start_noise(z, context) - context.particle_noise(z, "noise")
    assert torch.allclose(offset, offset[:, :, :1, :1].expand_as(offset)) and 0.0 < offset.abs().max() < 0.5


def test_gaussian_data_is_left_where_sampling_would_leave_it():
    # Prompt and empty prompt mean the same, so the gradient is x0(x_s) - x0(x_t) along one trajectory. The exact ODE
    # takes z to alpha M + (z - M) sqrt(D) / S, where x0 is M + alpha S / sqrt(D) (z - M).
    prior = gaussian()
    options = {"inversion_interval": 0.002, "inversion_steps": 500, "offset_noise": 0.0}
    guidance = ism(prior, guidance_scale=1.0, **options, **at(0.5, 0.08))
    z = M + S * torch.tensor([-2.0, -0.5, 1.0, 1.5], dtype=torch.float64).reshape(1, 1, 2, 2)
    share = [a * S / ((a * S) ** 2 + s**2) ** 0.5 for a, s in (coefficients(timestep) for timestep in (0.42, 0.5))]
    # The initial noise, sigma = 0.03, moves the trajectory by up to 3 * 0.03 / S of an image; the last step is a single
    # long step.
    torch.testing.assert_close(
        gradient(guidance, z, conditions=empty(prior)), (share[0] - share[1]) * (z - M), rtol=0.1, atol=0.02
    )


def test_timesteps_without_signal_are_rejected():
    with pytest.raises(
        ValueError, match=r"lambda is infinite at t = 1, where the noisy input of this prior contains no signal"
    ):
        gradient(ism(CountingPrior("rf-v_prediction"), **at(1.0)), latents(1))
    uniform = ism(CountingPrior("rf-v_prediction"), weighting="uniform", **at(1.0))
    assert gradient(uniform, latents(1)).isfinite().all()


def test_flow_priors_invert_with_euler_steps():
    prior = CountingPrior("rf-v_prediction")
    guidance = ism(prior, guidance_scale=3.0, inversion_steps=2, offset_noise=0.0, **at(0.6, 0.1))
    z, b = latents(2), red(prior)
    context = guidance.begin(z, 0, Rng())
    x = 0.9 * z + 0.1 * context.noise(z)
    for s, to in ((0.1, 0.3), (0.3, 0.5), (0.5, 0.6)):
        v = prior.predict(x, times(s, z), b.empty.expand(2)).v
        eps = x + (1 - s) * v
        x = x + (to - s) * v
    guided = guided_prediction(prior, x, context.t, b, 3.0).eps
    ours = gradient(guidance, z, conditions=b)
    torch.testing.assert_close(ours, 0.6 / 0.4 * (guided - eps), rtol=0, atol=1e-10 * ours.abs().max().item())

"""Diverse score distillation against DDIM, its own limits and a Gaussian."""

import pytest
import torch
from shared.method_cases import CountingPrior, PairPrior, gradient, latents, prompted, views
from shared.trajectory_cases import S, coefficients, ddim, descend, empty, euler, gaussian, gaussian_ddim_end

from scoredist3d.guidance.dsd import DiverseScoreDistillation as DSD
from scoredist3d.guidance.sdi import ScoreDistillationViaInversion as SDI
from scoredist3d.priors import CFGConditions, guided_prediction
from scoredist3d.seeding import Rng


def dsd(prior, **options) -> DSD:
    return DSD(DSD.Config(**options), prior=prior)


def star(prior, scale: float, start: float, end: float, last: int, **options) -> DSD:
    timesteps = {"from": start, "to": end, "end": last}
    exact = {"exact": True, "weighting": "lambda", "sub_guidance_scale": None}
    return dsd(prior, guidance_scale=scale, t_min=timesteps, t_max=timesteps, **exact, **options)


def at(timestep: float, floor: float | None = None, **options) -> dict:
    """Options with one timestep at step 0, in a schedule that ends at ``floor``."""
    timesteps = timestep if floor is None else {"from": timestep, "to": floor, "start": 99, "end": 100}
    return {"t_min": timesteps, "t_max": timesteps, **options}


def red(prior) -> CFGConditions:
    return CFGConditions(prior.embed(["red"]), prior.embed([""]))


def noise_of(guidance: DSD, z: torch.Tensor) -> torch.Tensor:
    return guidance.start_noise(z, guidance.begin(z, 0, Rng(), particles=range(len(z))))


@pytest.mark.parametrize("cache", ["auto", "never"])
@pytest.mark.parametrize("scale", [1.0, 7.5])
def test_dsd_star_is_ddim_step_by_step(scale, cache):
    prior, scheduler = CountingPrior(), ddim(10)
    guidance = star(prior, scale, 0.999, 0.099, 9, cache_trajectory=cache)
    trail = descend(guidance, latents(2), red(prior), range(10))
    x = noise_of(guidance, latents(2))
    for after, timestep in zip(trail, scheduler.timesteps.tolist(), strict=True):
        t = torch.full((2,), timestep / 1000, dtype=torch.float64)
        stepped = scheduler.step(guided_prediction(prior, x, t, red(prior), scale).eps, timestep, x)
        torch.testing.assert_close(after, stepped.pred_original_sample, rtol=0, atol=1e-9)
        x = stepped.prev_sample
    assert (trail[-1] - trail[0]).abs().max() > 0.5


def test_dsd_star_is_the_euler_sampler_of_a_flow_from_pure_noise():
    prior = CountingPrior("rf-v_prediction")
    timesteps = [1.0 - 0.1 * k for k in range(10)]
    guidance, scheduler = star(prior, 3.0, 1.0, 0.1, 9), euler(timesteps)
    x = noise_of(guidance, latents(2))
    trail = descend(guidance, latents(2), red(prior), range(10))
    for after, t_now, timestep in zip(trail, timesteps, scheduler.timesteps, strict=True):
        t = torch.full((2,), t_now, dtype=torch.float64)
        velocity = guided_prediction(prior, x, t, red(prior), 3.0).v
        torch.testing.assert_close(after, x - t_now * velocity, rtol=0, atol=2e-5)  # x is rounded to float32
        x = scheduler.step(velocity, timestep, x).prev_sample


@pytest.mark.parametrize("timestep", [0.9, 0.749, 0.3])
def test_the_simulated_trajectory_is_ddims(timestep):
    prior, scheduler = CountingPrior(), ddim(10)
    guidance = dsd(prior, interval=0.05, random_interval=False, **at(timestep, floor=0.0))
    z, b = latents(2), red(prior)
    step = guidance.begin(z, 0, Rng(), particles=(0, 1))
    timesteps = guidance.ode_timesteps(step)
    u = round(timesteps[-1] * 1000)
    assert [round(start * 1000) for start in timesteps[:-1]] == [k for k in range(999, 0, -100) if k > u]
    assert u == round(timestep * 1000) + int(0.05 * round(timestep * 1000))
    x = noise_of(guidance, z)
    for timestep in scheduler.timesteps.tolist():
        if timestep <= u:
            break
        t = torch.full((2,), timestep / 1000, dtype=torch.float64)
        eps = guided_prediction(prior, x, t, b, 7.5).eps
        if timestep - 100 >= u:
            x = scheduler.step(eps, timestep, x).prev_sample
        else:  # the last step is shorter, and the scheduler only knows equal ones
            (alpha, sigma), (alpha_u, sigma_u) = coefficients(timestep / 1000), coefficients(u / 1000)
            x = alpha_u * (x - sigma * eps) / alpha + sigma_u * eps
    ours = guidance.walk(noise_of(guidance, z), timesteps, b, 7.5)
    torch.testing.assert_close(ours, x, rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", ["vp-epsilon", "vp-v_prediction", "rf-v_prediction"])
@pytest.mark.parametrize("weighting", ["sds", "lambda", "uniform"])
def test_gradient_is_the_papers_formula(kind, weighting):
    prior = CountingPrior(kind)
    scales = {"guidance_scale": 5.0, "ode_guidance_scale": 3.0, "sub_guidance_scale": 2.0}
    guidance = dsd(prior, weighting=weighting, interval=0.5, **scales, **at(0.5, floor=0.1))
    z, b = latents(2), red(prior)
    step = guidance.begin(z, 3, Rng(), particles=(0, 1))
    timesteps = guidance.ode_timesteps(step)
    u, t = (torch.full((2,), timestep, dtype=torch.float64) for timestep in (timesteps[-1], 0.5))
    assert 0.5 < timesteps[-1] <= 0.7
    schedule = prior.schedule
    n = guided_prediction(prior, guidance.walk(noise_of(guidance, z), timesteps, b, 3.0), u, b, 3.0).eps
    leading = guided_prediction(prior, schedule.add_noise(z, n, t), t, b, 5.0).eps
    subtracted = guided_prediction(prior, schedule.add_noise(z, n, u), u, b, 2.0).eps
    alpha, sigma = (c[0].item() for c in schedule.coefficients(t))
    w = {"sds": sigma**2, "lambda": sigma / alpha, "uniform": 1.0}[weighting]
    ours = gradient(guidance, z, 3, conditions=b, particles=(0, 1))
    torch.testing.assert_close(ours, w * (leading - subtracted), rtol=0, atol=1e-10 * ours.abs().max().item())


def test_on_the_trajectory_it_is_the_step_of_cached_sdi():
    prior = CountingPrior()
    equal = {"guidance_scale": 3.0, "sub_guidance_scale": None, "weighting": "lambda"}
    guidance = dsd(prior, interval=1.0, random_interval=False, **equal, **at(0.5, floor=0.4))
    z, b = latents(2), red(prior)
    step = guidance.begin(z, 0, Rng(), particles=(0, 1))
    timesteps = guidance.ode_timesteps(step)
    u, t = (torch.full((2,), timestep, dtype=torch.float64) for timestep in (timesteps[-1], 0.5))
    x_u = guidance.walk(noise_of(guidance, z), timesteps, b, 3.0)
    readout = guided_prediction(prior, x_u, u, b, 3.0)
    x_t = prior.schedule.ddim_step(readout.eps, readout.x0, u, t)
    after = readout.x0 - gradient(guidance, readout.x0, 0, conditions=b, particles=(0, 1))
    torch.testing.assert_close(after, guided_prediction(prior, x_t, t, b, 3.0).x0, rtol=0, atol=1e-10)
    # SDI gives the same with its noise set to the ODE's prediction.
    sdi = SDI(SDI.Config(kappa="fixed", guidance_scale=3.0, t_min=0.5, t_max=0.5), prior=prior)
    sdi.noised = lambda z, step: (prior.schedule.add_noise(z, readout.eps, step.t), readout.eps)
    theirs = readout.x0 - gradient(sdi, readout.x0, 0, conditions=b)
    torch.testing.assert_close(after, theirs, rtol=0, atol=1e-10)


def test_a_closed_window_leaves_classifier_guidance():
    prior = CountingPrior()
    z, b = latents(2), red(prior)
    equal = dsd(prior, sub_guidance_scale=None, **at(0.8))
    assert gradient(equal, z, conditions=b).abs().max() < 1e-11
    usual = dsd(prior, **at(0.8))  # 7.5 and 1
    step = usual.begin(z, 0, Rng(), particles=(0, 1))
    timesteps = usual.ode_timesteps(step)
    assert timesteps[-1] == 0.8
    n = usual.predict_at(usual.walk(usual.start_noise(z, step), timesteps, b, 7.5), 0.8, b, 7.5).eps
    x_t = prior.schedule.add_noise(z, n, step.t)
    e_y, e_u = (guided_prediction(prior, x_t, step.t, b, scale).eps for scale in (1.0, 0.0))
    expected = coefficients(0.8)[1] ** 2 * 6.5 * (e_y - e_u)
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(gradient(usual, z, conditions=b), expected, rtol=0, atol=1e-11)


def test_only_seed_and_particle_choose_the_start():
    guidance = dsd(CountingPrior(), **at(0.6, floor=0.1))
    z = latents(3)
    starts = [
        guidance.start_noise(z, guidance.begin(z, step, rng, particles=(0, 0, 1)))
        for step, rng in ((0, Rng(1)), (50, Rng(1)), (0, Rng(1, rank=3)), (0, Rng(2)))
    ]
    assert torch.equal(starts[0], starts[1]) and torch.equal(starts[0], starts[2])
    assert torch.equal(starts[0][0], starts[0][1]) and not torch.equal(starts[0][0], starts[0][2])
    assert not torch.equal(starts[0], starts[3])
    b = red(guidance.prior)
    again = dsd(CountingPrior(), **at(0.6, floor=0.1))
    assert torch.equal(gradient(guidance, z, 4, conditions=b), gradient(again, z, 4, conditions=b))
    assert not torch.allclose(gradient(guidance, z, 4, conditions=b), gradient(again, z, 4, conditions=b, rng=Rng(2)))


def test_views_seen_jointly_share_their_start_or_have_their_own():
    z = latents(4)
    for choice, equal in (("shared", True), ("per-view", False)):
        guidance = dsd(PairPrior(), view_noise=choice)
        noise = guidance.start_noise(z, guidance.begin(z, 0, Rng(), particles=(0, 0, 1, 1)))
        assert torch.equal(noise[0], noise[1]) == equal and torch.equal(noise[2], noise[3]) == equal
        assert not torch.equal(noise[0], noise[2])


def falling(last: int) -> dict:
    timesteps = {"from": 0.98, "to": 0.2, "end": last, "shape": "sqrt"}
    return {"t_min": timesteps, "t_max": timesteps}


def test_cached_and_simulated_trajectories_agree_and_the_cache_pays():
    runs, spent = [], []
    for cache in ("auto", "never"):
        prior = CountingPrior()
        guidance = dsd(prior, guidance_scale=3.0, cache_trajectory=cache, **falling(20))
        runs.append(descend(guidance, latents(3), red(prior), range(20), rate=0.1))
        spent.append(sum(prior.rows))
    for cached, simulated in zip(*runs, strict=True):
        torch.testing.assert_close(cached, simulated, rtol=0, atol=1e-11)
    # With the cache: 2 evaluations at u, 2 leading and 1 subtracted per image and step, and one prediction for each of
    # the grid's timesteps above the last u.
    final_u = guidance.ode_timesteps(guidance.begin(latents(3), 19, Rng()))[:-1]
    assert spent[0] == 3 * (20 * 5 + 2 * len(final_u)) and spent[1] > 2 * spent[0]


def test_the_cache_notices_other_views_and_other_scales():
    cameras = views(2)
    timesteps = at(0.5, floor=0.1)
    cached, simulated = (dsd(CountingPrior(), cache_trajectory=cache, **timesteps) for cache in ("auto", "never"))
    for step, camera in enumerate((0, 1, 0, 1)):
        b = prompted(cached, cameras=cameras[camera])
        one, other = (gradient(guidance, latents(1), step, conditions=b) for guidance in (cached, simulated))
        torch.testing.assert_close(one, other, rtol=0, atol=1e-11)
        nfes = [guidance.nfe(b, guidance.begin(latents(1), step, Rng())).prior for guidance in (cached, simulated)]
        assert nfes[0] == nfes[1]  # the cache is empty at the first step, and off once the views differ
    scales = {"from": 3.0, "to": 5.0, "start": 1, "end": 2}
    changing, simulated = (
        dsd(CountingPrior(), ode_guidance_scale=scales, cache_trajectory=cache, **timesteps)
        for cache in ("auto", "never")
    )
    for step in range(4):
        b = red(changing.prior)
        pair = (gradient(guidance, latents(1), step, conditions=b) for guidance in (changing, simulated))
        torch.testing.assert_close(*pair, rtol=0, atol=1e-11)


def test_particles_that_come_and_go_are_counted():
    guidance = dsd(CountingPrior(), **at(0.95, floor=0.1))
    b, z = red(guidance.prior), latents(2)
    gradient(guidance, z, 0, conditions=b, particles=(0, 1))
    guidance.prior.rows.clear()
    gradient(guidance, z, 1, conditions=b, particles=(1, 2))
    step = guidance.begin(z, 1, Rng(), particles=(1, 2))
    above = len(guidance.ode_timesteps(step)) - 1
    assert above == 1 and guidance.prior.rows == [2, 4, 2, 4]  # one new image on the grid, then both
    assert guidance.nfe(b, step).prior == (2 + 4 + 2 + 4) / 2


@pytest.mark.parametrize(("timestep", "above"), [(0.98, 1), (0.5, 5), (0.32, 7)])
@pytest.mark.parametrize(("perp_neg", "rows"), [(False, 2 + 1), (True, 4 + 4)])
def test_nfe_of_a_simulated_step(timestep, above, perp_neg, rows):
    prior = CountingPrior()
    guidance = dsd(prior, cache_trajectory="never", **at(timestep))
    b = prompted(guidance, cameras=views(2), perp_neg=perp_neg)
    gradient(guidance, latents(2), conditions=b)
    guided = 4 if perp_neg else 2
    assert sum(prior.rows) == 2 * ((above + 1) * guided + rows)
    assert guidance.nfe(b, guidance.begin(latents(2), 0, Rng())).prior == (above + 1) * guided + rows


def test_timesteps_follow_the_released_schedule():
    guidance = dsd(CountingPrior())
    for step, expected in ((0, 0.98), (2500, 0.65), (10000, 0.32), (20000, 0.32)):
        assert guidance.sample_timesteps(3, step, Rng()) == [pytest.approx(expected, abs=5.1e-4)] * 3
    shares = []
    for step in range(0, 10001, 50):
        t = guidance.sample_timesteps(1, step, Rng())[0]
        one, many = (guidance.ode_timesteps(guidance.begin(latents(n), step, Rng()))[-1] for n in (1, 3))
        assert one == many and t <= one <= min(t + 0.1 * (t - 0.32), 0.999) + 1e-9
        if t > 0.4 and t < 0.9:
            shares.append((one - t) / (0.1 * (t - 0.32)))
    # Uniform in the window, rounded down to whole timesteps of 8 to 58: about 120 draws, standard error 0.026.
    assert len(shares) > 100 and abs(sum(shares) / len(shares) - 0.5) < 4 * 0.026 + 0.03
    assert guidance.ode_timesteps(guidance.begin(latents(1), 10000, Rng()))[-1] == 0.32


@pytest.mark.parametrize("shape", ["linear", "sqrt"])
@pytest.mark.parametrize("start", [0.98, 0.02])
def test_the_upper_timestep_avoids_the_lowest_ones_late_in_the_run(shape, start):
    timesteps = {"from": start, "to": 0.0, "end": 400, "shape": shape}
    guidance = dsd(CountingPrior(), interval=0.0, t_min=timesteps, t_max=timesteps)
    seen = set()
    for step in range(401):
        share = step / 400 if shape == "linear" else (step / 400) ** 0.5
        t = round(guidance.sample_timesteps(1, step, Rng())[0] * 1000)
        lowest = 10 if share > 0.75 else 1
        seen.add((lowest, t < lowest))
        u = round(guidance.ode_timesteps(guidance.begin(latents(1), step, Rng()))[-1] * 1000)
        assert u == max(t, lowest)
        assert t > 0 or share > 0.75
    assert (10, True) in seen and (1, False) in seen
    assert start > 0.02 or guidance.sample_timesteps(1, 240 if shape == "linear" else 150, Rng())[0] < 0.01  # and early


def test_the_upper_timestep_without_annealing_is_at_least_one():
    for timesteps in (at(0.003), {"t_min": 0.0, "t_max": {"from": 0.98, "to": 0.002, "end": 1}}, at(0.0)):
        guidance = dsd(CountingPrior(), interval=0.0, **timesteps)
        step = guidance.begin(latents(1), 50, Rng())
        assert guidance.ode_timesteps(step)[-1] == max(step.timesteps[0], 0.001)


def test_seeds_keep_the_spread_of_the_data():
    prior, count = gaussian(), 30
    guidance = dsd(
        prior,
        guidance_scale=1.0,
        weighting="lambda",
        ode_steps=25,
        t_min={"from": 0.98, "to": 0.05, "end": 60},
        t_max={"from": 0.98, "to": 0.05, "end": 60},
    )
    z = torch.zeros(count, 1, 2, 2, dtype=torch.float64)
    end = descend(guidance, z, empty(prior), range(61))[-1]
    exact = gaussian_ddim_end(noise_of(guidance, z), 0.999, 0.05)
    correlation = torch.corrcoef(torch.stack([end.flatten(), exact.flatten()]))[0, 1].item()
    # Spread of 120 normals: standard error S / sqrt(240) = 0.039. Each seed converges to the
    # end of its own trajectory, up to a common factor, which is 1 only for DSD*; SDS converges to one point.
    assert correlation > 0.999 and abs(exact.std().item() - S) < 4 * 0.039
    assert 0.7 < (end.std() / exact.std()).item() < 1.0


def test_impossible_options_are_named():
    def problems(**options) -> list[str]:
        return DSD.Config(**options).validate()

    assert problems() == [] and star(CountingPrior(), 7.5, 0.98, 0.02, 9).config.validate() == []
    assert problems(exact=True) == [
        "exact: needs weighting: lambda; set it, or set exact: false",
        "exact: needs equal scales; set ode_guidance_scale and sub_guidance_scale to null",
    ]
    free = problems(exact=True, weighting="lambda", sub_guidance_scale=None, t_min=0.1, t_max=0.9)
    assert free == ["exact: needs one decreasing schedule; set t_min and t_max to the same schedule"]
    with pytest.raises(ValueError, match=r"^weighting: lambda is infinite at t = 1, where"):
        gradient(dsd(CountingPrior("rf-v_prediction"), weighting="lambda", **at(1.0)), latents(1))

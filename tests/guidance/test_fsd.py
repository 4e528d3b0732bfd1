"""Flow score distillation against diffusers' samplers, SDS and closed forms."""

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from shared.method_cases import SIZE, CountingPrior, gradient, latents, method, prompted, views

from scoredist3d import registry
from scoredist3d.config.validation import parse_component
from scoredist3d.diffusion.cfg import guided_prediction
from scoredist3d.diffusion.schedule import VPSchedule
from scoredist3d.guidance.fsd import FlowScoreDistillation
from scoredist3d.priors import CFGConditions, Prediction
from scoredist3d.priors.analytic import GaussianMixturePrior, Mixture
from scoredist3d.seeding import Rng

M, S = 0.4, 0.6
STEPS = 50


def falling(start: float, end: float, last: int) -> dict:
    schedule = {"from": start, "to": end, "end": last}
    return {"t_min": schedule, "t_max": schedule}


def noise_of(guidance, z, b, step, *, particles=None, **keywords):
    """Noise n of a step; by default every item shows its own particle, as in ``gradient``."""
    particles = range(len(z)) if particles is None else particles
    return guidance.noise(z, b, guidance.begin(z, step, Rng(), particles=particles, **keywords))


def gaussian(schedule=None) -> GaussianMixturePrior:
    means = torch.full((1, 1, 4, 4), M, dtype=torch.float64)
    one = Mixture(means, torch.full((1, 1, 1, 1), S, dtype=torch.float64), torch.ones(1), (frozenset({"thing"}),))
    return GaussianMixturePrior(GaussianMixturePrior.Config(), mixture=one, schedule=schedule)


def ddim(offset: int) -> DDIMScheduler:
    options = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    scheduler = DDIMScheduler(**options, clip_sample=False, set_alpha_to_one=False, steps_offset=offset)
    table = VPSchedule.stable_diffusion().alpha(torch.arange(1000, dtype=torch.float64) / 1000) ** 2
    scheduler.alphas_cumprod, scheduler.final_alpha_cumprod = table, table[0]
    scheduler.set_timesteps(STEPS)
    return scheduler


def test_is_registered_with_its_paper():
    entry = registry.lookup("guidance", "fsd")
    assert entry.cls is FlowScoreDistillation and entry.arxiv == "2405.10988"


@pytest.mark.parametrize("kind", ["vp-epsilon", "vp-v_prediction"])
@pytest.mark.parametrize(("offset", "compared"), [(0, STEPS), (1, STEPS - 1)])
def test_gradient_descent_is_ddim_at_every_step(kind, offset, compared):
    scheduler = ddim(offset)
    first, last = scheduler.timesteps[0].item() / 1000, scheduler.timesteps[-1].item() / 1000
    prior = CountingPrior(kind)
    guidance = method(
        "fsd",
        prior,
        weighting="lambda-step",
        noise_field="constant",
        guidance_scale=3.0,
        **falling(first, last, STEPS - 1),
    )
    b = prompted(guidance)
    z = latents(2)
    n = noise_of(guidance, z, b, 0)
    alpha, sigma = (c.item() for c in prior.schedule.coefficients(torch.tensor([first], dtype=torch.float64)))
    x, z = n, (1 - sigma) * n / alpha  # both start at x_T = n
    for step in range(compared):
        timestep = scheduler.timesteps[step]
        t = torch.full((2,), timestep / 1000.0, dtype=torch.float64)
        eps = guided_prediction(prior, x, t, b, 3.0).eps
        x = scheduler.step(eps, timestep, x).prev_sample
        z = z - gradient(guidance, z, step, conditions=b)
        following = torch.tensor(guidance.sample_timesteps(2, step + 1, Rng()), dtype=torch.float64)
        torch.testing.assert_close(prior.schedule.add_noise(z, n, following), x, rtol=0, atol=1e-10)
    assert (x - n).abs().max() > 1.0


def test_flow_version_is_euler_and_diffusers_scheduler():
    prior = CountingPrior("rf-v_prediction")
    timesteps = [0.99 - 0.09 * k for k in range(11)]
    guidance = method(
        "fsd",
        prior,
        weighting="lambda-step",
        noise_field="constant",
        guidance_scale=3.0,
        **falling(timesteps[0], timesteps[-1], 10),
    )
    b = prompted(guidance)
    z = latents(2)
    n = noise_of(guidance, z, b, 0)
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=timesteps)
    x = y = n
    z = (1 - timesteps[0]) * n / (1 - timesteps[0])
    for step in range(10):
        t = torch.full((2,), timesteps[step], dtype=torch.float64)
        y = scheduler.step(guided_prediction(prior, y, t, b, 3.0).v, scheduler.timesteps[step], y).prev_sample
        x = x + (timesteps[step + 1] - timesteps[step]) * guided_prediction(prior, x, t, b, 3.0).v
        z = z - gradient(guidance, z, step, conditions=b)
        here = (1 - timesteps[step + 1]) * z + timesteps[step + 1] * n
        torch.testing.assert_close(here, x, rtol=0, atol=1e-11)
        torch.testing.assert_close(here, y.double(), rtol=0, atol=2e-5)  # the scheduler computes in float32


def test_first_step_of_a_flow_from_pure_noise_is_the_one_step_prediction():
    # At s = 1 alpha is 0, and the weight lambda_t - lambda_p is infinite but the step is finite.
    prior = CountingPrior("rf-v_prediction")
    guidance = method("fsd", prior, weighting="lambda-step", noise_field="constant", **falling(1.0, 0.5, 10))
    b, z = prompted(guidance), latents(2)
    n = noise_of(guidance, z, b, 0)
    expected = n - guided_prediction(prior, n, torch.ones(2, dtype=torch.float64), b, 7.5).v
    torch.testing.assert_close(z - gradient(guidance, z, 0, conditions=b), expected, rtol=0, atol=1e-12)


def test_starting_from_zero_is_the_sampler_started_from_sigma_n():
    guidance = method(
        "fsd", CountingPrior(), weighting="lambda-step", noise_field="constant", **falling(0.999, 0.0, 20)
    )
    b, z, rng = prompted(guidance), torch.zeros(2, 3, SIZE, SIZE, dtype=torch.float64), Rng()
    n = noise_of(guidance, z, b, 0)
    t = torch.full((2,), 0.999, dtype=torch.float64)
    x = guidance.schedule.sigma(t)[:, None, None, None] * n
    assert guidance.schedule.sigma(t[0]).item() == pytest.approx(0.99767, abs=1e-5)
    for step in range(20):
        prediction = guided_prediction(guidance.prior, x, t, b, 7.5)
        following = torch.tensor(guidance.sample_timesteps(2, step + 1, rng), dtype=torch.float64)
        x = guidance.schedule.ddim_step(prediction.eps, prediction.x0, t, following)
        z, t = z - gradient(guidance, z, step, conditions=b), following
    torch.testing.assert_close(guidance.schedule.add_noise(z, n, t), x, rtol=0, atol=1e-9)


@pytest.mark.parametrize("weighting", ["lambda", "sds", "uniform", "flow", "fantasia3d"])
@pytest.mark.parametrize("options", [{"sqrt_beta": 0.0}, {"noise_field": "random"}])
def test_without_deterministic_noise_it_is_sds_bit_for_bit(weighting, options):
    shared = {"guidance_scale": 7.5, "weighting": weighting}
    fsd = method("fsd", CountingPrior(), **shared, **options)
    sds = method("sds", CountingPrior(), **shared)
    cameras = views(3)
    extras = {"conditions": prompted(sds, cameras=cameras), "opacity": torch.ones(3, 8, 8, 1)}
    for step in (0, 9):
        assert torch.equal(gradient(fsd, latents(3), step, **extras), gradient(sds, latents(3), step, **extras))


@pytest.mark.parametrize("noise_field", ["constant", "world-map"])
def test_deterministic_noise_is_that_of_seed_particle_and_view(noise_field):
    guidance = method("fsd", CountingPrior(), noise_field=noise_field, t_min=0.5, t_max=0.5)
    cameras = views(2)
    b, z, opacity = prompted(guidance, cameras=cameras), latents(2), torch.ones(2, 8, 8, 1)
    first = gradient(guidance, z, 0, conditions=b, opacity=opacity)
    assert torch.equal(gradient(guidance, z, 77, conditions=b, opacity=opacity), first)
    assert torch.equal(gradient(guidance, z, 77, conditions=b, opacity=opacity, rng=Rng(0, rank=2)), first)
    assert not torch.allclose(gradient(guidance, z, 0, conditions=b, opacity=opacity, rng=Rng(1)), first)
    assert not torch.allclose(gradient(guidance, z, 0, conditions=b, opacity=opacity, particles=[3, 3]), first)
    n = noise_of(guidance, z, b, 0, particles=[0, 0])
    assert torch.equal(n[0], n[1]) == (noise_field == "constant")


@pytest.mark.parametrize("sqrt_beta", [0.0, 0.3, 0.8, 1.0])
def test_blends_keep_unit_variance(sqrt_beta):
    guidance = method("fsd", CountingPrior(), noise_field="constant", sqrt_beta=sqrt_beta)
    z = torch.zeros(1, 4, 64, 64, dtype=torch.float64)
    b = prompted(guidance)
    one, two = (noise_of(guidance, z, b, step) for step in (0, 1))
    count = z.numel()  # 16384: standard error of the variance 0.011, of the correlation at most 0.011
    assert abs(one.var() - 1) < 4.5 * (2 / count) ** 0.5
    assert abs((one * two).mean() - sqrt_beta**2) < 4.5 * (2 / count) ** 0.5


def test_background_takes_its_own_noise_by_opacity():
    z, cameras = latents(3), views(3)
    half = torch.zeros(3, 16, 16, 1)
    half[:, :, 8:] = 1.0
    full, none = torch.ones(3, 16, 16, 1), torch.zeros(3, 16, 16, 1)

    def noise(step: int = 0, opacity=None, **options):
        guidance = method("fsd", CountingPrior(), **options)
        return noise_of(guidance, z, prompted(guidance, cameras=cameras), step, opacity=opacity, particles=[0] * 3)

    crop, background = noise(opacity=full), noise(opacity=none)
    assert torch.equal(crop, noise()) and torch.equal(crop, noise(opacity=half, background_noise="none"))
    assert torch.equal(background[0], background[1]) and torch.equal(background, noise(5, opacity=none))
    assert not torch.equal(crop[0], crop[1])
    split = noise(opacity=half)
    assert torch.equal(split[..., 4:], crop[..., 4:]) and torch.equal(split[..., :4], background[..., :4])
    fresh, later = (noise(step, opacity=half, background_noise="random") for step in (0, 1))
    assert torch.equal(fresh[..., 4:], crop[..., 4:]) and torch.equal(later[..., 4:], crop[..., 4:])
    assert not torch.isclose(fresh[..., :4], later[..., :4]).any()
    assert not torch.isclose(fresh[..., :4], background[..., :4]).any()


def test_oracle_that_knows_the_noise_leaves_the_image_alone():
    class Oracle(CountingPrior):
        def predict(self, x_t, t, conditioning):
            return Prediction(self.answer, "epsilon", x_t, t, self.schedule)

    prior = Oracle()
    for weighting in ("uniform", "lambda", "lambda-step"):
        guidance = method(
            "fsd", prior, guidance_scale=1.0, noise_field="constant", weighting=weighting, **falling(0.9, 0.1, 10)
        )
        z = latents(2)
        prior.answer = noise_of(guidance, z, prompted(guidance), 0)
        # z - x0_hat rounds at the size of x_t / alpha.
        assert max(gradient(guidance, z, step).abs().max().item() for step in (0, 5)) < 1e-13


def test_particles_keep_the_datas_spread_where_sds_collapses():
    prior = gaussian()
    b = CFGConditions(prior.embed(["thing"]), prior.embed([""]))
    steps, ends = 200, {}
    options = {"guidance_scale": 1.0, "weighting": "lambda-step", **falling(0.999, 0.0, steps)}
    start = torch.zeros(64, 1, 4, 4, dtype=torch.float64)  # particles
    for field in ("constant", "random"):
        guidance = method("fsd", prior, noise_field=field, **options)
        z = start
        for step in range(steps):
            z = z - gradient(guidance, z, step, conditions=b)
        ends[field] = z
    n = noise_of(method("fsd", prior, noise_field="constant", **options), start, b, 0)
    timesteps = [guidance.sample_timesteps(1, step, Rng())[0] for step in range(steps + 1)]
    alpha, sigma = prior.schedule.coefficients(torch.tensor(timesteps, dtype=torch.float64))
    spread = alpha**2 * S**2 + sigma**2
    u = (sigma[0] * n - alpha[0] * M) / spread[0].sqrt()
    exact = M + (spread[-1].sqrt() * u - sigma[-1] * n) / alpha[-1]
    # 1024 independent elements: standard error of a measured spread s / sqrt(2048).
    assert (ends["constant"] - exact).square().mean().sqrt() < 0.06 * S  # first-order error of 200 steps
    assert abs(ends["constant"].std() - S) < 4 * S / 2048**0.5
    # Annealed SDS from the same start: its variance follows a linear recursion.
    variance = 0.0
    for k in range(steps):
        share = 1 - (sigma[k + 1] * alpha[k]) / (alpha[k + 1] * sigma[k])
        keep = 1 - share * (1 - alpha[k] ** 2 * S**2 / spread[k])
        variance = keep**2 * variance + (share * alpha[k] * sigma[k] * S**2 / spread[k]) ** 2
    collapsed = variance.sqrt()
    assert abs(ends["random"].std() - collapsed) < 4 * collapsed / 2048**0.5 and collapsed < 0.2 * S


def test_slow_renewal_moves_the_noise_by_its_rate():
    guidance = method("fsd", CountingPrior(), noise_field="constant", sde_rate=0.1)
    z = torch.zeros(1, 4, 64, 64, dtype=torch.float64)
    b = prompted(guidance)
    first, later = (noise_of(guidance, z, b, step) for step in (3, 13))
    assert torch.equal(noise_of(guidance, z, b, 13), later)
    assert abs((first * later).mean() - 0.9**5) < 4.5 * (2 / z.numel()) ** 0.5


def test_cost_and_previews():
    prior = CountingPrior()
    for scale, rows in ((7.5, 2), (1.0, 1)):
        guidance = method("fsd", prior, guidance_scale=scale, weighting="lambda-step", **falling(0.9, 0.1, 10))
        b, z = prompted(guidance, cameras=views(2)), latents(2)
        assert guidance.nfe(b, guidance.begin(z, 0, Rng())).prior == rows
        prior.rows.clear()
        gradient(guidance, z, conditions=b)
        assert prior.rows == [2 * rows]
    images = guidance.preview(z, b, 0, Rng(), denoise_steps=1, particles=[0, 1])
    x_t = prior.schedule.add_noise(z, noise_of(guidance, z, b, 0), torch.full((2,), 0.9, dtype=torch.float64))
    torch.testing.assert_close(images["noisy"], prior.decode(x_t).clamp(0, 1), rtol=0, atol=1e-12)


def test_steps_in_lambda_need_decreasing_timesteps():
    with pytest.raises(ValueError, match="weighting: lambda-step needs one timestep per step"):
        parse_component("guidance", {"type": "fsd", "weighting": "lambda-step"})
    block = {"type": "fsd", "weighting": "lambda-step", "dreamtime": {"steps": 10}}
    assert parse_component("guidance", block).weighting == "lambda-step"

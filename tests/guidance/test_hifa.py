"""Both terms of HiFA: SDS for one step, the DDPM chain for several steps, and equal gradients in latents and pixels."""

import pytest
import torch
from diffusers import DDIMScheduler
from shared.method_cases import SIZE, CountingPrior, gradient, latents, method, prompted

from scoredist3d.diffusion.cfg import guided_prediction
from scoredist3d.diffusion.schedule import FlowSchedule, VPSchedule
from scoredist3d.guidance.core.context import item_noise
from scoredist3d.guidance.core.weighting import WEIGHTINGS, regression_weight
from scoredist3d.seeding import Rng

LATENT_ONLY = {"image_weight": 0.0, "weight": 1.0, "guidance_scale": 7.5}
ANNEALED = {"t_min": 0.7, "t_max": 0.7}


class Blocks(CountingPrior):
    """Prior with latents of 4 x 4 pixels each and a nonlinear decoder."""

    def decode(self, z):
        x = (0.5 * z.tanh() + 0.5).repeat_interleave(2, -1).repeat_interleave(2, -2)
        return x.movedim(1, -1)


def image(batch: int, size: int = SIZE) -> torch.Tensor:
    return torch.rand(batch, size, size, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_one_step_is_sds(weighting):
    hifa = method("hifa", CountingPrior(), denoise_steps=1, weighting=weighting, **LATENT_ONLY)
    sds = method("sds", CountingPrior(), guidance_scale=7.5, weighting=weighting)
    expected = gradient(sds, latents(3), 4)
    torch.testing.assert_close(gradient(hifa, latents(3), 4), expected, rtol=0, atol=1e-11 * expected.abs().max())


@pytest.mark.parametrize("schedule", [VPSchedule.stable_diffusion(), FlowSchedule()], ids=["vp", "flow"])
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_regression_weight_is_w_over_lambda_and_finite_without_signal(weighting, schedule):
    t = torch.tensor([0.02, 0.5, 0.98], dtype=torch.float64)
    alpha, sigma = schedule.coefficients(t)
    expected = WEIGHTINGS[weighting](alpha, sigma) * alpha / sigma
    torch.testing.assert_close(regression_weight(weighting, schedule, t), expected, rtol=1e-12, atol=0)
    flow = FlowSchedule()
    assert flow.alpha(torch.ones(1)).item() == 0.0 and regression_weight(weighting, flow, torch.ones(1)).isfinite()


def test_several_steps_are_ddim_with_full_noise():
    prior = CountingPrior()
    guidance = method("hifa", prior, denoise_steps=4, weighting="lambda", **ANNEALED, **LATENT_ONLY)
    b, z, rng = prompted(guidance), latents(2), Rng(3)
    table = prior.schedule.alpha(torch.arange(1000, dtype=torch.float64) / 1000) ** 2
    scheduler = DDIMScheduler(clip_sample=False, set_alpha_to_one=True)
    scheduler.alphas_cumprod, scheduler.final_alpha_cumprod = table, torch.ones((), dtype=torch.float64)
    timesteps = prior.schedule.timesteps(4, start=0.7)
    x = prior.schedule.add_noise(z, item_noise(rng, "noise", 5, z), torch.full((2,), 0.7, dtype=torch.float64))
    for index, timestep in enumerate(timesteps[:-1]):
        eps = guided_prediction(prior, x, torch.full((2,), timestep, dtype=torch.float64), b, 7.5).eps
        timestep, following = round(timestep * 1000), round(timesteps[index + 1] * 1000) if index < 3 else -1
        # The scheduler has a constant stride, which is set to that of this step.
        scheduler.config.num_train_timesteps, scheduler.num_inference_steps = timestep - following, 1
        noise = item_noise(rng, f"hifa/{index}", 5, z)
        x = scheduler.step(eps, timestep, x, eta=1.0, variance_noise=noise).prev_sample
    torch.testing.assert_close(gradient(guidance, z, 5, conditions=b, rng=rng), z - x, rtol=0, atol=1e-10)


def test_without_fresh_noise_the_target_is_the_samplers():
    prior = CountingPrior()
    guidance = method("hifa", prior, eta=0.0, denoise_steps=7, weighting="lambda", **ANNEALED, **LATENT_ONLY)
    z, b = latents(2), prompted(guidance)
    context = guidance.begin(z, 0, Rng())
    x, t = guidance.noised(z, context)[0], context.t
    for timestep in prior.schedule.timesteps(7, start=0.7)[1:]:
        prediction = guided_prediction(prior, x, t, b, 7.5)
        following = torch.full_like(t, timestep)
        x, t = prior.schedule.ddim_step(prediction.eps, prediction.x0, t, following), following
    torch.testing.assert_close(gradient(guidance, z, conditions=b), z - x, rtol=0, atol=1e-12)


def test_items_at_different_timesteps_are_independent():
    guidance = method("hifa", CountingPrior(), **LATENT_ONLY)
    assert len(set(guidance.sample_timesteps(3, 2, Rng()))) == 3
    torch.testing.assert_close(
        gradient(guidance, latents(3), 2)[:1], gradient(guidance, latents(1), 2), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("size", [SIZE, 2 * SIZE])
def test_image_term_pulls_the_render_to_the_decoded_target(size):
    prior = CountingPrior()
    options = {"guidance_scale": 7.5, "weight": 1.0, "latent_weight": 0.5, "image_weight": 0.1, **ANNEALED}
    guidance = method("hifa", prior, **options)
    z, rgb, b = latents(2), image(2, size).requires_grad_(), prompted(guidance)
    target = guidance.target(guidance.noised(z, guidance.begin(z, 2, Rng()))[0], b, guidance.begin(z, 2, Rng()))
    decoded = prior.decode(target).clamp(0, 1)
    if size != SIZE:
        pixels = decoded.movedim(-1, 1)
        decoded = torch.nn.functional.interpolate(pixels, (size, size), mode="bilinear", antialias=True).movedim(1, -1)
    leaf = z.clone().requires_grad_()
    loss = guidance(leaf, b, 2, Rng(), rgb=rgb).loss
    dz, drgb = torch.autograd.grad(loss, (leaf, rgb))
    torch.testing.assert_close(2 * dz, 0.5 * (z - target), rtol=0, atol=1e-12)
    torch.testing.assert_close(2 * drgb, 0.1 * (rgb - decoded).detach(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["hifa", "sds"])
def test_image_term_goes_through_the_decoder_where_latents_are_optimised(name):
    prior = Blocks()
    options = {"guidance_scale": 7.5, "weighting": "uniform", "weight": 1.0, **ANNEALED}
    with_image, without = (method(name, prior, image_weight=weight, **options) for weight in (0.3, 0.0))
    z, b = latents(2), prompted(with_image)
    context = with_image.begin(z, 2, Rng())
    x_t, _ = with_image.noised(z, context)
    target = with_image.target(x_t, b, context) if name == "hifa" else with_image.guided(x_t, b, context).x0
    c = (1 / prior.schedule.lambda_(context.t))[:, None, None, None]
    leaf = z.clone().requires_grad_()
    (0.5 * 0.3 * c * (prior.decode(leaf) - prior.decode(target).clamp(0, 1)).square()).sum().backward()
    term = gradient(with_image, z, 2, conditions=b) - gradient(without, z, 2, conditions=b)
    torch.testing.assert_close(term, leaf.grad, rtol=0, atol=1e-11 * leaf.grad.abs().max())
    assert term.abs().max() > 1e-3


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("name", ["hifa", "sds"])
def test_all_terms_stay_finite_at_a_timestep_without_signal(name, weighting):
    guidance = method(
        name, CountingPrior("rf-v_prediction"), weighting=weighting, image_weight=0.1, t_min=1.0, t_max=1.0
    )
    assert guidance.schedule.alpha(torch.ones(1)).item() == 0.0
    z, rgb = latents(2).requires_grad_(), image(2).requires_grad_()
    both = torch.autograd.grad(guidance(z, prompted(guidance), 0, Rng(), rgb=rgb).loss, (z, rgb))
    assert all(g.isfinite().all() for g in both)
    assert both[1].abs().sum() > 0 or weighting in ("sds", "uniform", "fantasia3d")  # their weight is 0 there


def test_cost_is_a_guided_prediction_per_denoising_step():
    for scale, steps, rows in ((7.5, 4, 8), (7.5, 1, 2), (1.0, 3, 3)):
        prior = CountingPrior()
        guidance = method("hifa", prior, guidance_scale=scale, denoise_steps=steps)
        b, z = prompted(guidance), latents(2)
        assert guidance.nfe(b, guidance.begin(z, 0, Rng())).prior == rows
        gradient(guidance, z, conditions=b)
        assert sum(prior.rows) == 2 * rows and len(prior.rows) == steps

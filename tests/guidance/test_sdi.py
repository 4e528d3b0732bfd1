"""Score distillation via inversion against DDIM, its inverse and closed forms."""

import io
from itertools import pairwise

import pytest
import torch
from shared.method_cases import CountingPrior, gradient, latents, prompted, views
from shared.sdi_cases import at, falling, red, sdi
from shared.surface_scenes import views as surface_views
from shared.trajectory_cases import (
    M,
    S,
    coefficients,
    ddim,
    ddim_inverse,
    descend,
    empty,
    euler,
    gaussian,
    gaussian_ddim_end,
)

from scoredist3d.guidance.core.context import item_noise
from scoredist3d.guidance.core.noise_fields import world_map_crop, world_map_shape
from scoredist3d.guidance.sdi import ScoreDistillationViaInversion as SDI
from scoredist3d.guidance.sds import ScoreDistillationSampling as SDS
from scoredist3d.priors import guided_prediction
from scoredist3d.seeding import Rng


@pytest.mark.parametrize("inner", [1, 3])
@pytest.mark.parametrize("scale", [1.0, 7.5])
def test_cached_form_is_ddim_step_by_step(scale, inner):
    prior, scheduler = CountingPrior(), ddim(20)
    guidance = sdi(
        prior,
        kappa="cached",
        cached_inner_steps=inner,
        guidance_scale=scale,
        **falling(0.999, 0.049, 19 * inner),
    )
    z = latents(2)
    trail = descend(guidance, z, red(prior), range(20 * inner))
    x = guidance.begin(z, 0, Rng(), particles=(0, 1)).particle_noise(z, "kappa")
    for k, timestep in enumerate(scheduler.timesteps.tolist()):
        t = torch.full((2,), timestep / 1000, dtype=torch.float64)
        eps = guided_prediction(prior, x, t, red(prior), scale).eps
        stepped = scheduler.step(eps, timestep, x)
        x = stepped.prev_sample
        for after in trail[k * inner : (k + 1) * inner]:
            torch.testing.assert_close(after, stepped.pred_original_sample, rtol=0, atol=1e-9)
    assert (trail[-1] - trail[0]).abs().max() > 0.5


def test_cached_form_is_the_euler_sampler_of_a_flow():
    prior = CountingPrior("rf-v_prediction")
    timesteps = [1.0 - 0.1 * k for k in range(10)]
    guidance = sdi(prior, kappa="cached", guidance_scale=3.0, **falling(1.0, 0.1, 9))
    z, scheduler = latents(2), euler(timesteps)
    x = guidance.begin(z, 0, Rng(), particles=(0, 1)).particle_noise(z, "kappa")
    for after, t_now, timestep in zip(
        descend(guidance, z, red(prior), range(10)), timesteps, scheduler.timesteps, strict=True
    ):
        t = torch.full((2,), t_now, dtype=torch.float64)
        velocity = guided_prediction(prior, x, t, red(prior), 3.0).v
        torch.testing.assert_close(after, x - t_now * velocity, rtol=0, atol=2e-5)  # x is rounded to float32
        x = scheduler.step(velocity, timestep, x).prev_sample


def test_random_noise_is_sds_with_lambda_weights():
    prior = CountingPrior()
    options = {"guidance_scale": 7.5, "t_min": 0.02, "t_max": 0.98}
    ours = sdi(prior, kappa="random", **options)
    sds = SDS(
        SDS.Config(weighting="lambda", **at(ours.sample_timesteps(1, 4, Rng())[0], guidance_scale=7.5)), prior=prior
    )
    b = red(prior)
    pair = (gradient(guidance, latents(3), 4, conditions=b) for guidance in (ours, sds))
    torch.testing.assert_close(*pair, rtol=0, atol=1e-11)


def test_fixed_noise_belongs_to_the_particle():
    guidance = sdi(CountingPrior(), kappa="fixed", **at(0.5))
    b, z = red(guidance.prior), latents(1).expand(2, -1, -1, -1)
    first, later = (gradient(guidance, z, step, conditions=b, particles=(2, 2)) for step in (0, 7))
    assert torch.equal(first, later)
    torch.testing.assert_close(first[0], first[1], rtol=0, atol=1e-11)
    other = gradient(guidance, z, 0, conditions=b, particles=(2, 3))
    torch.testing.assert_close(other[0], first[0], rtol=0, atol=1e-11)
    assert not torch.allclose(other[1], first[0])


@pytest.mark.parametrize("kind", ["vp-epsilon", "vp-v_prediction", "rf-v_prediction"])
@pytest.mark.parametrize("noise", ["per-step", "once"])
def test_gradient_is_lambda_times_the_noise_difference(kind, noise):
    prior = CountingPrior(kind)
    guidance = sdi(prior, guidance_scale=7.5, inversion_noise=noise, **at(0.6))
    z, b = latents(2), red(prior)
    context = guidance.begin(z, 3, Rng())
    x_t, kappa = guidance.inverted(z, b, context)
    alpha, sigma = (c[:, None, None, None] for c in prior.schedule.coefficients(context.t))
    torch.testing.assert_close(x_t, alpha * z + sigma * kappa, rtol=0, atol=1e-12)
    prediction = guided_prediction(prior, x_t, context.t, b, 7.5)
    expected = sigma / alpha * (prediction.eps - kappa)
    torch.testing.assert_close(
        gradient(guidance, z, 3, conditions=b), expected, rtol=0, atol=1e-10 * expected.abs().max().item()
    )


def test_inversion_is_diffusers_inverse_scheduler():
    prior, scheduler = CountingPrior(), ddim_inverse(10, set_alpha_to_one=True)
    b, z = red(prior), latents(2)
    for scale in (1.0, -7.5):
        guidance = sdi(prior, inversion_guidance_scale=scale, inversion_eta=0.0, tau_max=0.0, **at(0.901))
        x, given = z, 0  # the first step starts from the clean latent, with timestep 0 as the input of the network
        for timestep in scheduler.timesteps.tolist():
            t = torch.full((2,), given / 1000, dtype=torch.float64)
            x = scheduler.step(guided_prediction(prior, x, t, b, scale).eps, timestep, x).prev_sample
            given = timestep
        assert given == 901
        x_t, _ = guidance.inverted(z, b, guidance.begin(z, 0, Rng()))
        torch.testing.assert_close(x_t, x, rtol=0, atol=1e-10)


def test_inversion_and_sampling_close_as_steps_grow_and_large_scales_open_the_gap():
    prior = CountingPrior()
    b, z = red(prior), 0.5 * latents(2)

    def gap(steps: int, scale: float) -> float:
        guidance = sdi(
            prior, inversion_guidance_scale=scale, inversion_eta=0.0, tau_max=0.0, inversion_steps=steps, **at(0.901)
        )
        context = guidance.begin(z, 0, Rng())
        x, _ = guidance.inverted(z, b, context)
        down = guidance.inversion_timesteps(context)[::-1]
        return (guidance.walk(x, down, b, scale) - z).square().mean().sqrt().item()

    gaps = [gap(steps, 1.0) for steps in (10, 50, 250)]
    assert gaps[1] < 0.4 * gaps[0] and gaps[2] < 0.4 * gaps[1] and gaps[2] < 0.02
    assert gap(50, 7.5) > 3 * gap(50, 1.0)


@pytest.mark.parametrize("timestep", [0.2, 0.5, 0.9])
def test_inversion_on_gaussian_data(timestep):
    prior = gaussian()
    options = {"inversion_eta": 0.0, "tau_max": 0.0, "inversion_steps": 250}
    guidance = sdi(prior, guidance_scale=1.0, inversion_guidance_scale=1.0, **options, **at(timestep))
    z = M + S * torch.tensor([-2.0, -0.5, 1.0, 1.5], dtype=torch.float64).reshape(1, 1, 2, 2)
    alpha, sigma = coefficients(timestep)
    root = (alpha**2 * S**2 + sigma**2) ** 0.5
    _, kappa = guidance.inverted(z, empty(prior), guidance.begin(z, 0, Rng()))
    # First order in steps of one timestep, whose lambda grows by less than 0.006 below t = 0.5 and 0.05 at 0.9.
    torch.testing.assert_close(kappa, (z - M) * (root / S - alpha) / sigma, rtol=0, atol=0.02)
    exact_target = M + alpha * S / root * (z - M)
    target = z - gradient(guidance, z, conditions=empty(prior))
    torch.testing.assert_close(target, exact_target, rtol=0, atol=0.01)
    fixed_point = sigma * (z - M) / (alpha * S**2)
    assert (kappa - fixed_point).abs().max() > 0.1  # inversion only approximates it


def test_reinverted_sdi_contracts_where_cached_sdi_keeps_the_spread():
    prior, count = gaussian(), 100
    z = torch.randn(count, 1, 2, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    cached = sdi(prior, kappa="cached", guidance_scale=1.0, **falling(0.98, 0.02, 48))
    kept = descend(cached, z, empty(prior), range(49))[-1]
    start = cached.begin(z, 0, Rng(), particles=range(count)).particle_noise(z, "kappa")
    exact = gaussian_ddim_end(start, 0.98, 0.02)
    # Spread of 400 normals: standard error S / sqrt(800) = 0.021. 49 first-order steps lose 7 % of it, 25 lose 9 %.
    assert abs(exact.std().item() - S) < 4 * 0.021
    assert 0.92 < (kept.std() / exact.std()).item() < 1.0 and (kept - exact).abs().max() < 0.15
    options = {"inversion_guidance_scale": 1.0, "inversion_eta": 0.0, "tau_max": 0.0}
    last = 24
    inverted = sdi(prior, guidance_scale=1.0, **options, **falling(0.98, 0.02, last))
    contracted = descend(inverted, M + S * z[:8], empty(prior), range(last + 1))[-1]
    factor = 1.0
    for step in range(last + 1):
        alpha, sigma = coefficients(inverted.sample_timesteps(1, step, Rng())[0])
        factor *= alpha * S / (alpha**2 * S**2 + sigma**2) ** 0.5
    assert factor < 1e-5 and contracted.std() < 1e-4 and abs(contracted.mean().item() - M) < 1e-4


def test_nothing_is_random_without_eta_and_tau():
    prior = CountingPrior()
    still = sdi(prior, inversion_eta=0.0, tau_max=0.0, **at(0.5))
    z, b = latents(2), red(prior)
    assert torch.equal(gradient(still, z, 0, conditions=b), gradient(still, z, 9, conditions=b, rng=Rng(5)))
    for moving in (sdi(prior, tau_max=0.0, **at(0.5)), sdi(prior, inversion_eta=0.0, **at(0.5))):
        assert not torch.equal(gradient(moving, z, 0, conditions=b), gradient(moving, z, 9, conditions=b))


def test_noise_added_once_is_the_papers_h():
    prior = CountingPrior()
    z, b = latents(2), red(prior)
    with_h, without = (
        sdi(prior, inversion_noise="once", inversion_eta=eta, tau_max=0.0, **at(0.6)) for eta in (0.3, 0.0)
    )
    context = with_h.begin(z, 2, Rng())
    h = with_h.inverted(z, b, context)[1] - without.inverted(z, b, context)[1]
    noise = item_noise(Rng(), "inversion", 2, z)
    torch.testing.assert_close(h, 0.3 * coefficients(0.6)[1] * noise, rtol=0, atol=1e-12)


def test_limited_noise_has_at_most_unit_size():
    """Latents far from the data invert to large noise: kappa = (z - M) (sqrt(D) / S - alpha) / sigma exactly."""
    prior = gaussian()
    z = M + torch.tensor([0.1, 20.0], dtype=torch.float64).reshape(2, 1, 1, 1).expand(-1, 1, 2, 2)
    options = {"inversion_eta": 0.0, "tau_max": 0.0, "inversion_guidance_scale": 1.0, **at(0.6)}
    free, limited = (sdi(prior, kappa_rms=rms, **options) for rms in ("free", "limited"))
    context = free.begin(z, 0, Rng())
    kappa, reduced = (guidance.inverted(z, empty(prior), context)[1] for guidance in (free, limited))
    size = kappa.square().mean((1, 2, 3)).sqrt()
    assert size[0] < 0.5 and size[1] > 5
    torch.testing.assert_close(reduced[0], kappa[0], rtol=0, atol=0)
    torch.testing.assert_close(reduced[1], kappa[1] / size[1], rtol=0, atol=1e-12)
    alpha, sigma = coefficients(0.6)
    x_t = limited.inverted(z, empty(prior), context)[0]
    torch.testing.assert_close(x_t, alpha * z + sigma * reduced, rtol=0, atol=1e-12)


@pytest.mark.parametrize("fill", ["fresh", "world-map"])
def test_unit_noise_is_the_limited_one_with_added_noise(fill):
    """Noise is added up to a variance of 1: fresh noise, or a window of the particle's world map."""
    prior = gaussian()
    z = M + torch.tensor([0.1, 20.0], dtype=torch.float64).reshape(2, 1, 1, 1).expand(-1, 1, 2, 2)
    options = {"inversion_eta": 0.0, "tau_max": 0.0, "inversion_guidance_scale": 1.0, **at(0.6)}
    limited, unit = (sdi(prior, kappa_rms=rms, fill_noise=fill, **options) for rms in ("limited", "unit"))
    context = limited.begin(z, 0, Rng())
    before, kappa = (guidance.inverted(z, empty(prior), context)[1] for guidance in (limited, unit))
    share = 1 - before.square().mean((1, 2, 3), keepdim=True)
    assert share[0] > 0.5 and share[1].abs() < 1e-12
    if fill == "fresh":
        noise = item_noise(Rng(), "inversion/fill", 0, z)
    else:
        world = context.particle_noise(z.new_empty(2, 1, *world_map_shape(2, 2, 180.0)), "inversion/world")
        noise = world_map_crop(world, None, 2, 2)
    torch.testing.assert_close(kappa, before + share.clamp_min(0).sqrt() * noise, rtol=0, atol=1e-12)
    alpha, sigma = coefficients(0.6)
    torch.testing.assert_close(
        unit.inverted(z, empty(prior), context)[0], alpha * z + sigma * kappa, rtol=0, atol=1e-12
    )


def test_the_noise_of_a_world_map_is_fixed_to_the_object():
    """Below the start of the inversion, kappa is the added noise alone."""
    prior = CountingPrior("vp-sample")
    guidance = sdi(prior, kappa_rms="unit", fill_noise="world-map", inversion_start=0.25, **at(0.2))
    cameras, z = surface_views(0.0, 90.0), latents(2)
    conditions = prompted(guidance, cameras=cameras)

    def kappa(step: int = 0, opacity: float = 1.0, particle: int = 0):
        extras = {"opacity": torch.full((2, 8, 8, 1), opacity), "particles": [particle] * 2}
        return guidance.inverted(z, conditions, guidance.begin(z, step, Rng(), **extras))[1]

    front, side = kappa()
    assert not torch.allclose(front, side) and torch.equal(kappa(step=5), kappa())
    half = front.shape[-1] // 2
    torch.testing.assert_close(side[..., :half], front[..., half:])  # 90 of the 180 degrees of a window
    background = kappa(opacity=0.0)
    assert torch.equal(background[0], background[1]) and not torch.isclose(background, kappa()).any()
    assert not torch.isclose(kappa(particle=1), kappa()).any()


def test_a_later_start_of_the_inversion():
    """The state at the first timestep is alpha z; no step is left where t is below the start."""
    prior = gaussian()
    z, conditions = M + torch.linspace(-1, 1, 8, dtype=torch.float64).reshape(2, 1, 2, 2), empty(prior)
    options = {"inversion_start": 0.25, "inversion_eta": 0.0, "tau_max": 0.0, "inversion_guidance_scale": 1.0}
    guidance = sdi(prior, **options, **at(0.6))
    context = guidance.begin(z, 0, Rng())
    timesteps = guidance.inversion_timesteps(context)
    assert timesteps == [0.25, 0.35, 0.45, 0.55, 0.6]
    x = guidance.walk(coefficients(0.25)[0] * z, timesteps, conditions, 1.0)
    torch.testing.assert_close(guidance.inversion(z, conditions, context)[0], x, rtol=0, atol=1e-12)
    early = sdi(prior, **options, **at(0.2))
    context = early.begin(z, 0, Rng())
    assert early.inversion_timesteps(context) == [0.2] and early.inversion_nfe(conditions, context) == 0
    assert early.inversion(z, conditions, context)[1].abs().max() < 1e-12
    beyond = sdi(prior, **options | {"tau_max": 0.3}, **at(0.2))
    assert len(beyond.inversion_timesteps(beyond.begin(z, 0, Rng()))) == 1, "t is below the start, t + tau is not"


@pytest.mark.parametrize(("timestep", "evaluations"), [(0.98, 11), (0.6, 7), (0.25, 4), (0.0, 1)])
@pytest.mark.parametrize(("perp_neg", "rows"), [(False, 2), (True, 4)])
def test_nfe_of_an_inversion(timestep, evaluations, perp_neg, rows):
    prior = CountingPrior()
    guidance = sdi(prior, tau_max=0.0, **at(timestep))
    b = prompted(guidance, cameras=views(2), perp_neg=perp_neg)
    gradient(guidance, latents(2), conditions=b)
    assert prior.rows == [2 * rows] * (evaluations + 1)
    assert guidance.nfe(b, guidance.begin(latents(2), 0, Rng())).prior == rows * (evaluations + 1)


def test_inversion_scale_is_minus_the_scale_and_matters_to_the_inversion_alone():
    prior = CountingPrior()
    z, b = latents(2), red(prior)
    implied, stated, other = (
        gradient(sdi(prior, guidance_scale=5.0, inversion_guidance_scale=scale, **at(0.5)), z, conditions=b)
        for scale in (None, -5.0, 5.0)
    )
    assert torch.equal(implied, stated) and not torch.allclose(implied, other)
    for kappa in ("random", "fixed", "cached"):
        pair = [
            gradient(
                sdi(prior, kappa=kappa, inversion_guidance_scale=scale, **at(0.5)), z, conditions=b, particles=(0, 1)
            )
            for scale in (-5.0, 5.0)
        ]
        assert torch.equal(*pair)


def test_tau_is_shared_by_the_batch_and_uniform():
    guidance = sdi(CountingPrior(), tau_max=0.1, **at(0.5))
    ends = []
    for step in range(200):
        one, many = (guidance.inversion_timesteps(guidance.begin(latents(n), step, Rng())) for n in (1, 3))
        assert one == many and all(a < b for a, b in pairwise(one))
        ends.append(one[-1] - 0.5)
    assert min(ends) >= 0.0 and max(ends) < 0.1
    # Mean of 200 draws from 0, 0.001, ..., 0.099: 0.0495, standard error 0.0020.
    assert abs(sum(ends) / 200 - 0.0495) < 4 * 0.0020


def test_cached_form_evaluates_once_per_target_and_resumes_exactly():
    def fresh() -> SDI:
        options = {"kappa": "cached", "cached_inner_steps": 3, "guidance_scale": 7.5, **falling(0.98, 0.1, 12)}
        return sdi(CountingPrior(), **options)

    z = latents(3)
    straight = fresh()
    b = red(straight.prior)
    whole = []
    for step in range(12):
        straight.prior.rows.clear()
        z = descend(straight, z, b, range(step, step + 1), rate=0.3)[0]
        whole.append(z)
        nfe = straight.nfe(b, straight.begin(z, step, Rng(), particles=(0, 1, 2))).prior
        assert nfe == (2 if step % 3 == 0 else 0) and sum(straight.prior.rows) == 3 * nfe
    stopped = fresh()
    middle = descend(stopped, latents(3), b, range(5), rate=0.3)[-1]  # inside of a block
    file = io.BytesIO()
    torch.save(stopped.state_dict(), file)
    file.seek(0)
    resumed = fresh()
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for got, expected in zip(descend(resumed, middle, b, range(5, 12), rate=0.3), whole[5:], strict=True):
        assert torch.equal(got, expected)


def test_cached_form_supports_particles_that_skip_steps():
    guidance = sdi(CountingPrior(), kappa="cached", cached_inner_steps=2, **at(0.5))
    b, z = red(guidance.prior), latents(2)
    gradient(guidance, z, 0, conditions=b, particles=(0, 1))
    guidance.prior.rows.clear()
    gradient(guidance, z, 1, conditions=b, particles=(1, 2))
    assert guidance.prior.rows == [2]  # particle 2 is new, particle 1 has its target
    step = guidance.begin(z, 1, Rng(), particles=(1, 2))
    assert guidance.nfe(b, step).prior == 1.0


def test_cached_form_refuses_views_of_one_object():
    guidance = sdi(CountingPrior(), kappa="cached", **falling(0.98, 0.1, 9))
    with pytest.raises(ValueError, match="this batch has several views of one object; use kappa: inversion"):
        gradient(guidance, latents(2), particles=(0, 0))
    cameras = views(2)
    gradient(guidance, latents(1), 0, conditions=prompted(guidance, cameras=cameras[0]), particles=(0,))
    gradient(guidance, latents(1), 1, conditions=prompted(guidance, cameras=cameras[0]), particles=(0,))
    with pytest.raises(ValueError, match="the same prompt and camera at every step"):
        gradient(guidance, latents(1), 2, conditions=prompted(guidance, cameras=cameras[1]), particles=(0,))


def test_impossible_options_are_named():
    def problems(**options) -> list[str]:
        return SDI.Config(**options).validate()

    assert problems() == []
    assert problems(kappa="cached", weighting="sds") == [
        "weighting: must be lambda with kappa: cached, which moves to the predicted image"
    ]
    assert problems(reference_quirk=True, kappa="random") == [
        "reference_quirk: needs kappa: inversion and weighting: lambda"
    ]
    assert problems(reference_quirk=True, inversion_noise="once") == [
        "reference_quirk: needs inversion_noise: per-step"
    ]
    needs = ["reference_quirk: needs kappa_rms: free and inversion_start: 0"]
    assert problems(reference_quirk=True, kappa_rms="limited") == needs
    assert problems(reference_quirk=True, inversion_start=0.1) == needs
    for kind, what in (("vp-sample", "predicts the image"), ("rf-v_prediction", "is a flow")):
        with pytest.raises(ValueError, match=f"this prior {what}; set it to false"):
            sdi(CountingPrior(kind), reference_quirk=True)

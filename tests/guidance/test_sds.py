"""Score distillation sampling against closed forms, in float64 on exact denoisers."""

import pytest
import torch

from scoredist3d import registry
from scoredist3d.diffusion.schedule import FlowSchedule, VPSchedule
from scoredist3d.guidance.core.context import item_noise
from scoredist3d.guidance.core.weighting import WEIGHTINGS
from scoredist3d.guidance.sds import ScoreDistillationSampling as SDS
from scoredist3d.priors import CFGConditions, Prediction, predict_each, sample
from scoredist3d.priors.analytic import GaussianMixturePrior, Mixture
from scoredist3d.seeding import Rng

M, S = 0.4, 0.6


def gaussian(parametrization: str = "epsilon", schedule=None) -> GaussianMixturePrior:
    one = Mixture(
        torch.full((1, 1, 2, 2), M, dtype=torch.float64),
        torch.full((1, 1, 1, 1), S, dtype=torch.float64),
        torch.ones(1),
        (frozenset({"thing"}),),
    )
    config = GaussianMixturePrior.Config(parametrization=parametrization)
    return GaussianMixturePrior(config, mixture=one, schedule=schedule)


def blobs(parametrization: str = "epsilon", **keywords) -> GaussianMixturePrior:
    config = GaussianMixturePrior.Config(image_size=8, std=0.5, parametrization=parametrization)
    return GaussianMixturePrior(config, **keywords)


def conditions(prior, prompt: str = "red") -> CFGConditions:
    return CFGConditions(prior.embed([prompt]), prior.embed([""]))


def latents(shape=(3, 3, 8, 8), seed: int = 5) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sds(prior, **options) -> SDS:
    return SDS(SDS.Config(**options), prior=prior)


def gradient_of(guidance: SDS, z: torch.Tensor, step: int = 0, rng: Rng | None = None, b: CFGConditions | None = None):
    """dL/dz times the batch size, which is G."""
    z = z.clone().requires_grad_()
    guidance(z, b or conditions(guidance.prior), step, rng or Rng()).loss.backward()
    return z.grad * len(z)


class Fixed(GaussianMixturePrior):
    """Denoiser with a given output."""

    answer: torch.Tensor

    def predict(self, x_t, t, conditioning) -> Prediction:
        return Prediction(self.answer.expand_as(x_t), "epsilon", x_t, t, self.schedule)


def test_is_registered_with_its_paper():
    entry = registry.lookup("guidance", "sds")
    assert entry.cls is SDS and entry.arxiv == "2209.14988"
    assert SDS.Config().guidance_scale(0) == 100.0 and SDS.Config(guidance_scale=7.5).guidance_scale(0) == 7.5


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_gradient_is_the_papers_formula(weighting):
    prior = blobs()
    guidance = sds(prior, guidance_scale=7.5, weighting=weighting)
    z, rng = latents(), Rng(2)
    t = torch.tensor(guidance.sample_timesteps(3, 6, rng), dtype=torch.float64)
    eps = item_noise(rng, "noise", 6, z)
    abar = prior.schedule.alpha(t) ** 2
    x_t = abar.sqrt()[:, None, None, None] * z + (1 - abar).sqrt()[:, None, None, None] * eps
    b = conditions(prior)
    eps_c, eps_u = (p.eps for p in predict_each(prior, x_t, t, [b.positive, b.unconditional]))
    w = {
        "sds": 1 - abar,
        "uniform": torch.ones_like(abar),
        "fantasia3d": abar.sqrt() * (1 - abar),
        "lambda": ((1 - abar) / abar).sqrt(),
        "flow": 1 / abar.sqrt(),
    }[weighting]
    expected = w[:, None, None, None] * (eps_u + 7.5 * (eps_c - eps_u) - eps)
    torch.testing.assert_close(gradient_of(guidance, z, 6, rng), expected, rtol=0, atol=1e-11 * expected.abs().max())


def test_no_gradient_reaches_the_prior_and_its_state_is_not_saved():
    class Network(Fixed):
        def __init__(self, *args) -> None:
            super().__init__(*args)
            self.weight = torch.nn.Parameter(torch.ones(3, 8, 8, dtype=torch.float64))

        def predict(self, x_t, t, conditioning):
            return Prediction(self.weight * x_t, "epsilon", x_t, t, self.schedule)

    prior = Network(GaussianMixturePrior.Config(image_size=8))
    guidance = sds(prior)
    assert gradient_of(guidance, latents()).abs().sum() > 0
    assert prior.weight.grad is None and guidance.state_dict() == {}


def test_lambda_weighting_is_regression_to_the_predicted_image():
    guidance = sds(blobs(), guidance_scale=7.5, weighting="lambda")
    z, rng = latents(), Rng(2)
    context = guidance.begin(z, 6, rng)
    x_t, eps = guidance.noised(z, context)
    prediction = guidance.guided(x_t, conditions(guidance.prior), context)
    regression = z.clone().requires_grad_()
    (0.5 * (regression - prediction.x0.detach()).square().sum()).backward()
    gradient = gradient_of(guidance, z, 6, rng)
    torch.testing.assert_close(gradient, regression.grad, rtol=0, atol=1e-12)
    ratio = guidance.schedule.lambda_(context.t)[:, None, None, None]
    torch.testing.assert_close(gradient, ratio * (prediction.eps - eps), rtol=0, atol=1e-11 * gradient.abs().max())


def test_oracle_returning_the_injected_noise_gives_zero():
    prior = Fixed(GaussianMixturePrior.Config(image_size=8))
    z, rng = latents(), Rng(4)
    eps = item_noise(rng, "noise", 1, z)
    prior.answer = eps
    assert torch.equal(gradient_of(sds(prior, guidance_scale=1.0), z, 1, rng), torch.zeros_like(z))
    prior.answer = eps + 1.0
    assert gradient_of(sds(prior, guidance_scale=1.0, weighting="uniform"), z, 1, rng).mean().item() == pytest.approx(
        1.0
    )


def test_silent_denoiser_leaves_the_weighted_noise():
    prior = Fixed(GaussianMixturePrior.Config(image_size=8))
    prior.answer = torch.zeros((), dtype=torch.float64)
    guidance = sds(prior, t_min=0.5, t_max=0.5)
    draws = torch.cat([gradient_of(guidance, latents(), step) for step in range(40)]).flatten()
    w = guidance.schedule.sigma(torch.tensor([0.5], dtype=torch.float64)).item() ** 2
    count = len(draws)  # 23040: standard errors w / sqrt(n) of the mean and w^2 sqrt(2 / n) of the variance
    assert abs(draws.mean()) < 4 * w / count**0.5
    assert abs(draws.var() - w**2) < 4 * w**2 * (2 / count) ** 0.5


def test_gradient_is_affine_in_the_scale_and_single_branches_at_zero_and_one():
    prior = blobs()
    z = latents()
    at = {g: gradient_of(sds(prior, guidance_scale=g), z) for g in (0.0, 1.0, 30.0)}
    torch.testing.assert_close(at[30.0], at[0.0] + 30.0 * (at[1.0] - at[0.0]), rtol=0, atol=1e-11)
    wrong = prior.embed(["blue"])
    right = conditions(prior)
    only_unconditional = gradient_of(sds(prior, guidance_scale=0.0), z, b=CFGConditions(wrong, right.unconditional))
    only_conditional = gradient_of(sds(prior, guidance_scale=1.0), z, b=CFGConditions(right.positive, wrong))
    torch.testing.assert_close(only_unconditional, at[0.0], rtol=0, atol=1e-12)
    torch.testing.assert_close(only_conditional, at[1.0], rtol=0, atol=1e-12)
    assert not torch.allclose(
        gradient_of(sds(prior, guidance_scale=2.0), z, b=CFGConditions(wrong, right.unconditional)), at[1.0]
    )


@pytest.mark.parametrize("rescale", [0.0, 0.7])
@pytest.mark.parametrize("kind", ["sample", "v_prediction"])
def test_parametrisations_of_one_denoiser_agree(kind, rescale):
    options = {"guidance_scale": 7.5, "guidance_rescale": rescale}
    eps = gradient_of(sds(blobs(), **options), latents())
    other = gradient_of(sds(blobs(kind), **options), latents())
    torch.testing.assert_close(other, eps, rtol=0, atol=1e-10)


def test_flow_denoiser_agrees_with_the_chain_at_equal_noise_to_signal():
    # Same data, same lambda, same eps: eps_hat is the same, so G with weight 1 is.
    timestep = 0.7
    vp = gaussian(schedule=VPSchedule.stable_diffusion())
    ratio = vp.schedule.lambda_(torch.tensor([timestep], dtype=torch.float64)).item()
    s = ratio / (1 + ratio)
    flow = gaussian("flow", FlowSchedule(num_train_timesteps=10**12))  # timesteps fine enough to hit s
    z = latents((3, 1, 2, 2))
    ours = gradient_of(
        sds(vp, guidance_scale=1.0, weighting="uniform", t_min=timestep, t_max=timestep), z, b=conditions(vp, "")
    )
    theirs = gradient_of(
        sds(flow, guidance_scale=1.0, weighting="uniform", t_min=s, t_max=s), z, b=conditions(flow, "")
    )
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-9)
    # The flow weighting is that of velocity regression: G = v_hat - (eps - z).
    regression = sds(flow, guidance_scale=1.0, weighting="flow", t_min=s, t_max=s)
    context = regression.begin(z, 0, Rng())
    x_t, eps = regression.noised(z, context)
    velocity = flow.predict(x_t, context.t, flow.embed([""] * 3)).v
    torch.testing.assert_close(
        gradient_of(regression, z, b=conditions(flow, "")), velocity - (eps - z), rtol=0, atol=1e-9
    )


@pytest.mark.parametrize("timestep", [0.1, 0.5, 0.9])
def test_expected_gradient_on_gaussian_data(timestep):
    prior = gaussian()
    guidance = sds(prior, guidance_scale=1.0, t_min=timestep, t_max=timestep)
    t = torch.tensor([timestep], dtype=torch.float64)
    alpha, sigma = prior.schedule.alpha(t).item(), prior.schedule.sigma(t).item()
    spread = alpha**2 * S**2 + sigma**2
    z = latents((1, 1, 2, 2))
    exact = sigma**2 * sigma * alpha * (z - M) / spread
    # G is affine in eps here, so the antithetic pair eps, -eps gives its mean without sampling error.
    context = guidance.begin(z, 0, Rng())
    eps = context.noise(z)
    pair = []
    for noise in (eps, -eps):
        x_t = prior.schedule.add_noise(z, noise, context.t)
        pair.append(guidance.weighted(guidance.guided(x_t, conditions(prior, ""), context), z, noise))
    torch.testing.assert_close(0.5 * (pair[0] + pair[1]), exact, rtol=0, atol=1e-12)
    # Monte Carlo check of the whole method: per element G has the std w |1 - sigma^2 / D|.
    count = 400
    mean = torch.cat([gradient_of(guidance, z, step, b=conditions(prior, "")) for step in range(count)]).mean(0)
    error = sigma**2 * abs(1 - sigma**2 / spread) / count**0.5
    assert (mean - exact[0]).abs().max() < 4.5 * error + 1e-12


def test_subtracting_the_noise_lowers_the_variance_and_keeps_the_mean():
    prior = gaussian()
    guidance = sds(prior, guidance_scale=1.0, t_min=0.8, t_max=0.8)
    z = latents((4, 1, 2, 2))
    with_noise, without = [], []
    for step in range(400):
        context = guidance.begin(z, step, Rng())
        x_t, eps = guidance.noised(z, context)
        prediction = guidance.guided(x_t, conditions(prior, ""), context)
        w = guidance.time_weight(context.t)[:, None, None, None]
        with_noise.append(guidance.weighted(prediction, z, eps))
        without.append(w * prediction.eps)
    with_noise, without = torch.stack(with_noise), torch.stack(without)
    assert with_noise.var(0).max() < 0.1 * without.var(0).min()
    error = (without - with_noise).std(0) / 400**0.5
    assert ((with_noise - without).mean(0).abs() < 4.5 * error).all()


def test_all_seeds_converge_to_the_mode_where_sampling_keeps_the_spread():
    prior = gaussian()
    guidance = sds(prior, guidance_scale=1.0, weighting="lambda", t_min=0.02, t_max=0.98)
    z = (2.0 * latents((64, 1, 2, 2))).requires_grad_()
    assert z.std() > 1.5
    optimizer = torch.optim.SGD([z], lr=1.0)
    rates = torch.linspace(0.3, 0.01, 300)
    for step in range(300):
        optimizer.param_groups[0]["lr"] = rates[step].item() * len(z)
        optimizer.zero_grad()
        guidance(z, conditions(prior, ""), step, Rng(1)).loss.backward()
        optimizer.step()
    assert (z.mean() - M).abs() < 0.02 and z.std() < 0.1 * S
    drawn = sample(
        prior, conditions(prior, ""), steps=100, scale=1.0, batch=64, generator=torch.Generator().manual_seed(0)
    )
    assert abs(drawn.std().item() - S) < 0.1 * S


def test_guided_optimisation_finds_the_prompted_mode():
    prior = GaussianMixturePrior(GaussianMixturePrior.Config(image_size=8, std=0.2))
    guidance = sds(prior, guidance_scale=7.5)
    b = CFGConditions(prior.embed(["blue left"]), prior.embed([""]))
    z = torch.zeros(2, 3, 8, 8, requires_grad=True)
    optimizer = torch.optim.Adam([z], lr=0.05)
    for step in range(150):
        optimizer.zero_grad()
        guidance(z, b, step, Rng()).loss.backward()
        optimizer.step()
    rgb = prior.decode(z.detach())
    assert rgb[:, 4, 2, 2].min() > 0.8 > 0.3 > rgb[:, 4, 2, 0].max()
    assert (rgb[:, :, 6:] - 0.5).abs().mean() < 0.1


def test_items_are_independent_of_the_batch_and_runs_repeat():
    guidance = sds(blobs(), guidance_scale=7.5)
    z = latents((4, 3, 8, 8))
    four, two = gradient_of(guidance, z, 9), gradient_of(guidance, z[:2], 9)
    torch.testing.assert_close(four[:2], two, rtol=0, atol=1e-13)
    assert torch.equal(four, gradient_of(guidance, z, 9))
    assert not torch.allclose(four, gradient_of(guidance, z, 10)) and not torch.allclose(
        four, gradient_of(guidance, z, 9, Rng(1))
    )


def test_one_forward_pass_per_step_with_only_the_needed_branches():
    prior = blobs()
    calls = []
    predict = prior.predict
    prior.predict = lambda x_t, t, c: calls.append(len(x_t)) or predict(x_t, t, c)
    for scale, rows in ((7.5, 6), (1.0, 3), (0.0, 3)):
        calls.clear()
        gradient_of(sds(prior, guidance_scale=scale), latents())
        assert calls == [rows]


def test_image_term_is_hifas_pull_on_the_decoded_prediction():
    prior = blobs("v_prediction")
    guidance = sds(prior, guidance_scale=7.5, image_weight=0.01)
    rgb = torch.rand(2, 8, 8, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    z, rng = prior.encode(rgb), Rng(3)
    latent_only = torch.autograd.grad(
        sds(prior, guidance_scale=7.5)(z, conditions(prior), 2, rng).loss, rgb, retain_graph=True
    )[0]
    both = torch.autograd.grad(guidance(z, conditions(prior), 2, rng, rgb=rgb).loss, rgb)[0]
    context = guidance.begin(z.detach(), 2, rng)
    x_t, _ = guidance.noised(z.detach(), context)
    decoded = prior.decode(guidance.guided(x_t, conditions(prior), context).x0).clamp(0, 1)
    alpha, sigma = (c[:, None, None, None] for c in prior.schedule.coefficients(context.t))
    expected = 0.01 * sigma**2 * alpha / sigma * (rgb - decoded) / 2
    torch.testing.assert_close(both - latent_only, expected.detach(), rtol=0, atol=1e-12)


def test_distillation_differs_from_ddim_even_with_decreasing_timesteps():
    prior = gaussian()
    timesteps = prior.schedule.timesteps(10)
    noise = latents((1, 1, 2, 2))
    trail = []
    sample_timesteps = {"from": timesteps[0], "to": timesteps[9], "end": 9}
    guidance = sds(prior, guidance_scale=1.0, weighting="lambda", t_min=sample_timesteps, t_max=sample_timesteps)
    t = torch.tensor(timesteps[:1], dtype=torch.float64)
    z = prior.predict(noise, t, prior.embed([""])).x0
    for step in range(10):
        z = z - gradient_of(guidance, z, step, b=conditions(prior, ""))
        trail.append(z)
    alpha, sigma = prior.schedule.alpha(t).item(), prior.schedule.sigma(t).item()
    ddim_end = M + S * (noise - alpha * M) / (alpha**2 * S**2 + sigma**2) ** 0.5
    assert (trail[-1] - ddim_end).abs().max() > 0.1

"""The Gaussian-mixture prior: exact in every parametrization, conditioned on words."""

import pytest
import torch

from scoredist3d import registry
from scoredist3d.diffusion.schedule import FlowSchedule, VPSchedule
from scoredist3d.priors import CFGConditions, sample
from scoredist3d.priors.analytic import GaussianMixturePrior, Mixture

KINDS = ["epsilon", "sample", "v_prediction", "flow"]


def mixture(seed: int = 0) -> Mixture:
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(3, 1, 2, 2, generator=generator, dtype=torch.float64)
    stds = 0.2 + torch.rand(3, 1, 2, 2, generator=generator, dtype=torch.float64)
    labels = (frozenset({"red", "left"}), frozenset({"red", "right"}), frozenset({"blue", "left"}))
    return Mixture(means, stds, torch.tensor([1.0, 2.0, 1.0], dtype=torch.float64), labels)


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def build(kind: str = "epsilon", **keywords) -> GaussianMixturePrior:
    return GaussianMixturePrior(GaussianMixturePrior.Config(parametrization=kind), mixture=mixture(), **keywords)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prompt", ["", "red", "blue left"])
def test_noise_is_minus_sigma_times_the_score_of_the_marginal(kind, prompt):
    prior, parts = build(kind), mixture()
    x = torch.randn(2, 1, 2, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True)
    t = torch.tensor([0.2, 0.7], dtype=torch.float64)
    conditioning = prior.embed([prompt] * 2)
    alpha, sigma = (c[:, None, None, None, None] for c in prior.schedule.coefficients(t))
    spread = torch.distributions.Normal(alpha * parts.means, (alpha**2 * parts.stds**2 + sigma**2).sqrt())
    log_density = spread.log_prob(x[:, None]).flatten(2).sum(-1) + conditioning.text[:, 0].log()
    (score,) = torch.autograd.grad(log_density.logsumexp(1).sum(), x)
    prediction = prior.predict(x.detach(), t, conditioning)
    torch.testing.assert_close(prediction.eps, -sigma[:, 0] * score, rtol=0, atol=1e-11)
    recombined = prior.schedule.add_noise(prediction.x0, prediction.eps, t)
    torch.testing.assert_close(recombined, x.detach(), rtol=0, atol=1e-11)


def test_single_gaussian_closed_form():
    m, s = 0.4, 0.7
    means, stds = torch.full((1, 1, 2, 2), m), torch.full((1, 1, 1, 1), s)
    one = Mixture(means, stds, torch.ones(1), (frozenset({"thing"}),))
    prior = GaussianMixturePrior(GaussianMixturePrior.Config(), mixture=one)
    x, t = normal(3, 1, 2, 2), torch.tensor([0.1, 0.5, 0.99], dtype=torch.float64)
    alpha, sigma = (c[:, None, None, None] for c in prior.schedule.coefficients(t))
    m, s = torch.tensor(m).double(), torch.tensor(s).double()  # float32 values, exactly as given
    expected = sigma * (x - alpha * m) / (alpha**2 * s**2 + sigma**2)
    torch.testing.assert_close(prior.predict(x, t, prior.embed([""] * 3)).eps, expected, rtol=0, atol=1e-12)


def test_pure_noise_predicts_the_mean():
    prior = build("flow")
    x, t = normal(1, 1, 2, 2), torch.ones(1, dtype=torch.float64)
    parts = mixture()
    expected = (parts.weights[:, None, None, None] * parts.means).sum(0) / parts.weights.sum()
    torch.testing.assert_close(prior.predict(x, t, prior.embed([""])).x0[0], expected, rtol=0, atol=1e-12)


def test_words_choose_components():
    prior = build()
    rows = prior.embed(["", "a red thing", "Red, right view", "blue", "green"]).text[:, 0]
    expected = [[1, 2, 1], [1, 2, 0], [0, 1, 0], [0, 0, 1], [1, 2, 1]]
    expected = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(rows, expected / expected.sum(1, keepdim=True))
    assert prior.unknown_words("a red thing") == ["a", "thing"] and prior.vocabulary >= {"red", "left"}


@pytest.mark.parametrize("factor", [1, 2])
def test_preset_samples_are_images_of_the_prompt(factor):
    prior = registry.lookup("prior", "gaussian-mixture").cls(
        GaussianMixturePrior.Config(image_size=16, factor=factor, std=0.05)
    )
    assert prior.latent_shape(16, 16) == (3, 16 // factor, 16 // factor)
    conditions = CFGConditions(prior.embed(["a red left blob"]), prior.embed([""]))
    z = sample(prior, conditions, steps=50, scale=1.0, batch=8, generator=torch.Generator().manual_seed(0))
    images = prior.decode(z)
    assert images.shape == (8, 16, 16, 3)
    left, right = images[:, 8, 4].mean(0), images[:, 8, 13].mean(0)
    assert left[0] > 0.7 and left[2] < 0.3 and (right - 0.5).abs().max() < 0.1
    torch.testing.assert_close(prior.encode(images), z)


@pytest.mark.parametrize("schedule", [VPSchedule.stable_diffusion(), FlowSchedule(3.0)], ids=["vp", "flow"])
def test_sampling_converges_to_the_exact_flow_of_a_gaussian(schedule):
    m, s = 0.4, 0.3
    one = Mixture(torch.full((1, 1, 1, 1), m), torch.full((1, 1, 1, 1), s), torch.ones(1), (frozenset(),))
    prior = GaussianMixturePrior(GaussianMixturePrior.Config(), mixture=one, schedule=schedule)
    conditions = CFGConditions(prior.embed([""]), prior.embed([""]))
    start = torch.randn(500, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    alpha, sigma = (c.item() for c in schedule.coefficients(torch.tensor([1.0], dtype=torch.float64)))
    exact = m + s * (start - alpha * m) / (alpha**2 * s**2 + sigma**2) ** 0.5
    errors = []
    for steps in (100, 400):
        generator = torch.Generator().manual_seed(0)
        z = sample(prior, conditions, steps=steps, scale=1.0, batch=500, generator=generator)
        errors.append((z - exact).abs().max().item())
    # DDIM is a first-order method: four times the steps, a quarter of the error.
    assert errors[0] < 0.12 and errors[1] < 0.35 * errors[0]


def test_resizes_and_passes_gradients():
    prior = GaussianMixturePrior(GaussianMixturePrior.Config(image_size=16, factor=2))
    rgb = torch.rand(2, 32, 32, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    z = prior.encode(rgb)
    assert z.shape == (2, 3, 8, 8)
    (gradient,) = torch.autograd.grad(z.sum(), rgb)
    # Every pixel has the same share: the sum over all is dz/drgb = 2 per latent.
    assert gradient.sum().item() == pytest.approx(2.0 * z.numel(), rel=1e-5)


def test_bad_mixtures_and_configs_are_named():
    good = mixture()
    with pytest.raises(ValueError, match="3 components needs 3 weights"):
        Mixture(good.means, good.stds, torch.ones(2), good.labels)
    with pytest.raises(ValueError, match=r"\(K, C, h, w\)"):
        Mixture(good.means[0], good.stds, good.weights, good.labels)
    assert GaussianMixturePrior.Config(image_size=9, factor=2).validate()[0].startswith("factor: 2 does not divide")
    assert GaussianMixturePrior.Config().validate() == []


def test_nothing_is_trainable():
    prior = build().train()
    assert not prior.training and list(prior.parameters()) == []

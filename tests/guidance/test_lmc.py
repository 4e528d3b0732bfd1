"""LMC: its identities with exact denoisers, the files of a corrective, and the shipped corrective."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from scoredist3d import registry
from scoredist3d.diffusion.schedule import FlowSchedule
from scoredist3d.guidance.core.context import StepContext, item_noise
from scoredist3d.guidance.core.corrective import (
    SHIPPED_FOLDER,
    Corrective,
    CorrectiveSizes,
    Fingerprint,
    load_corrective,
    read_corrective,
    save_corrective,
)
from scoredist3d.guidance.lmc import ManifoldCorrective
from scoredist3d.guidance.sds import ScoreDistillationSampling
from scoredist3d.priors import CFGConditions, predict_each
from scoredist3d.priors.analytic import GaussianMixturePrior, Mixture
from scoredist3d.seeding import Rng

M, S = 0.4, 0.6


def blobs(parametrization: str = "epsilon", **options) -> GaussianMixturePrior:
    config = GaussianMixturePrior.Config(image_size=8, std=0.5, parametrization=parametrization)
    return GaussianMixturePrior(config, **options)


def gaussian(parametrization: str = "epsilon") -> GaussianMixturePrior:
    one = Mixture(
        torch.full((1, 3, 8, 8), M, dtype=torch.float64),
        torch.full((1, 1, 1, 1), S, dtype=torch.float64),
        torch.ones(1),
        (frozenset({"thing"}),),
    )
    return GaussianMixturePrior(GaussianMixturePrior.Config(parametrization=parametrization), mixture=one)


def latents(count: int = 3, seed: int = 5) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def conditions(prior, negatives: bool = False) -> CFGConditions:
    avoided = ((prior.embed(["green left"]), torch.tensor([-0.7], dtype=torch.float64)),) if negatives else ()
    return CFGConditions(prior.embed(["red"]), prior.embed(["blue"] if negatives else [""]), negatives=avoided)


def lmc(prior, network: nn.Module | None = None, **options) -> ManifoldCorrective:
    guidance = ManifoldCorrective(ManifoldCorrective.Config(corrective="identity", **options), prior=prior)
    guidance.corrective = network
    return guidance


def gradient_of(
    guidance, z: Tensor, step: int = 0, *, b: CFGConditions | None = None, rng: Rng | None = None, **extras
):
    z = z.clone().requires_grad_()
    guidance(z, b or conditions(guidance.prior), step, rng or Rng(), **extras).loss.backward()
    return z.grad * len(z)


def untrained_network(seed: int = 0) -> Corrective:
    with torch.random.fork_rng(devices=[]):  # library modules draw their first weights from the global stream
        torch.manual_seed(seed)
        return Corrective(CorrectiveSizes(channels=3, width=8)).double()


def random_network(seed: int = 0) -> Corrective:
    """Corrective whose last layer is not zero, as after training."""
    network = untrained_network(seed)
    generator = torch.Generator().manual_seed(seed)
    nn.init.normal_(network.last.weight, std=0.1, generator=generator)
    nn.init.normal_(network.last.bias, std=0.1, generator=generator)
    return network.requires_grad_(False)


class Given(nn.Module):
    """Corrective given by a formula."""

    def __init__(self, formula) -> None:
        super().__init__()
        self.formula = formula

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        return self.formula(z, t)


def parts(prior, z: Tensor, guidance, step: int = 0):
    """(t, alpha/sigma, w, eps_c, eps_u, x0_u) of a step with fresh noise; the coefficients broadcast."""
    rng = Rng()
    t = torch.tensor(guidance.sample_timesteps(len(z), step, rng), dtype=torch.float64)
    alpha, sigma = (c[:, None, None, None] for c in prior.schedule.coefficients(t))
    x_t = alpha * z + sigma * item_noise(rng, "noise", step, z)
    b = conditions(prior)
    conditional, unconditional = predict_each(prior, x_t, t, [b.positive, b.unconditional])
    return t, alpha / sigma, sigma**2, conditional.eps, unconditional.eps, unconditional.x0


def close(a: Tensor, b: Tensor, tolerance: float = 1e-11) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance * max(1.0, b.abs().max().item()))


def test_is_registered_with_its_paper():
    entry = registry.lookup("guidance", "lmc")
    assert entry.cls is ManifoldCorrective and entry.arxiv == "2401.05293"


@pytest.mark.parametrize("weighting", ["sds", "flow", "lambda"])
@pytest.mark.parametrize("negatives", [False, True])
@pytest.mark.parametrize("scale", [0.0, 1.0, 8.0])
def test_without_a_corrective_it_is_sds(weighting, negatives, scale):
    prior, z = blobs(), latents()
    b = conditions(prior, negatives)
    options = {"guidance_scale": scale, "weighting": weighting, "guidance_rescale": 0.3 if scale > 1 else 0.0}
    sds = ScoreDistillationSampling(ScoreDistillationSampling.Config(**options), prior=prior)
    if scale == 1.0 and negatives:  # SDS has no negatives to avoid at scale 0
        assert sds.guided_nfe(b, scale) == 3
    expected = gradient_of(sds, z, 4, b=b)
    close(gradient_of(lmc(prior, **options), z, 4, b=b), expected)
    untrained = untrained_network()
    for jacobian in ("identity", "full"):
        close(gradient_of(lmc(prior, untrained, jacobian=jacobian, **options), z, 4, b=b), expected)


def test_gradient_is_the_text_term_plus_the_weighted_difference():
    prior, z, network = blobs("v_prediction"), latents(), random_network()
    guidance = lmc(prior, network, guidance_scale=8.0, lambda_lmc=0.7)
    t, ratio, w, eps_c, eps_u, x0 = parts(prior, z, guidance)
    expected = w * 8.0 * (eps_c - eps_u) + 0.7 * w * ratio * (network(z, t) - x0)
    close(gradient_of(guidance, z), expected, 1e-10)


def test_the_decomposition_of_sds_is_exact():
    prior, z = blobs(), latents()
    guidance = lmc(prior)
    _, ratio, _, eps_c, eps_u, x0 = parts(prior, z, guidance)
    eps = item_noise(Rng(), "noise", 0, z)
    close(eps_u - eps, ratio * (z - x0), 1e-10)
    t, alpha = guidance.begin(z, 0, Rng()).t, prior.schedule.alpha(guidance.begin(z, 0, Rng()).t)[:, None, None, None]
    sigma = prior.schedule.sigma(t)[:, None, None, None]
    x0_c = (alpha * z + sigma * eps - sigma * eps_c) / alpha
    close(eps_c - eps_u, ratio * (x0 - x0_c), 1e-10)


def test_a_perfect_imitation_and_a_zero_weight_leave_the_classifier_score():
    prior, z = blobs(), latents()
    _, _, w, eps_c, eps_u, x0 = parts(prior, z, lmc(prior))
    classifier = 8.0 * w * (eps_c - eps_u)
    close(gradient_of(lmc(prior, Given(lambda z, t: x0)), z), classifier, 1e-10)
    close(gradient_of(lmc(prior, random_network(), lambda_lmc=0.0), z), classifier, 1e-10)


@pytest.mark.parametrize("jacobian", ["identity", "full"])
def test_the_blend_is_affine_without_the_jacobian(jacobian):
    prior, z, network = blobs(), latents(), random_network()
    at = {beta: gradient_of(lmc(prior, network, beta=beta, jacobian=jacobian), z) for beta in (0.0, 0.3, 1.0)}
    mixed = 0.7 * at[0.0] + 0.3 * at[1.0]
    sds = ScoreDistillationSampling(ScoreDistillationSampling.Config(guidance_scale=8.0), prior=prior)
    close(at[0.0], gradient_of(sds, z))
    if jacobian == "identity":
        close(at[0.3], mixed)
    else:
        assert (at[0.3] - mixed).abs().max() > 1e-5


def test_the_full_jacobian_is_that_of_the_regression_loss():
    prior, z, network = blobs(), latents(), random_network()
    for beta in (1.0, 0.4):
        options = {"guidance_scale": 8.0, "lambda_lmc": 0.7, "beta": beta}
        guidance = lmc(prior, network, jacobian="full", **options)
        t, ratio, w, eps_c, eps_u, x0 = parts(prior, z, guidance)
        leaf = z.clone().requires_grad_()
        blend = (1.0 - beta) * leaf + beta * network(leaf, t)
        (0.5 * w * ratio * 0.7 * (blend - x0).square()).sum().backward()
        full = gradient_of(guidance, z)
        close(full, 8.0 * w * (eps_c - eps_u) + leaf.grad, 1e-10)
        assert (full - gradient_of(lmc(prior, network, **options), z)).abs().max() > 1e-3


def test_the_corrective_is_frozen_and_travels_with_the_run():
    guidance = lmc(blobs(), random_network(), jacobian="full")
    before = {name: value.clone() for name, value in guidance.state_dict().items()}
    assert before and all(name.startswith("corrective.") for name in before)
    gradient_of(guidance, latents())
    assert all(p.grad is None and not p.requires_grad for p in guidance.parameters())
    assert all(torch.equal(value, before[name]) for name, value in guidance.state_dict().items())


def test_fixed_noise_makes_a_field_that_depends_on_the_particle_alone():
    prior, z = blobs(), latents(2)[:1].expand(2, -1, -1, -1)
    fixed = lmc(prior, random_network(), noise="fixed", t_min=0.5, t_max=0.5)
    first = gradient_of(fixed, z, 3, particles=(0, 1))
    assert torch.equal(first, gradient_of(fixed, z, 40, particles=(0, 1)))
    torch.testing.assert_close(first.flip(0), gradient_of(fixed, z, 3, particles=(1, 0)), rtol=0, atol=1e-11)
    assert not torch.allclose(first[0], first[1])
    fresh = lmc(prior, random_network(), t_min=0.5, t_max=0.5)
    assert not torch.allclose(gradient_of(fresh, z, 3), gradient_of(fresh, z, 40))


def test_a_constant_in_the_corrective_shifts_the_gradient_unless_means_are_removed():
    prior, z = blobs(), latents()
    network = random_network()
    shifted = Given(lambda z, t: network(z, t) + 0.25)
    _, ratio, w, *_ = parts(prior, z, lmc(prior))
    difference = gradient_of(lmc(prior, shifted), z) - gradient_of(lmc(prior, network), z)
    close(difference, (0.25 * w * ratio).expand_as(z))
    without = [gradient_of(lmc(prior, n, remove_mean=True), z) for n in (network, shifted)]
    close(*without)
    classifier = gradient_of(lmc(prior, network, lambda_lmc=0.0), z)
    close((without[0] - classifier).mean((2, 3)), torch.zeros(3, 3, dtype=torch.float64))


def wiener(prior) -> Given:
    """E[x0_u | z] on Gaussian data: B z + (1 - B) m with B = alpha^2 s^2 / (alpha^2 s^2 + sigma^2)."""

    def formula(z: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = (c[:, None, None, None] for c in prior.schedule.coefficients(t))
        gain = alpha**2 * S**2 / (alpha**2 * S**2 + sigma**2)
        return gain * z + (1.0 - gain) * M

    return Given(formula)


class Signed(StepContext):
    """Step context whose noise is multiplied by a sign."""

    sign = 1.0

    def noise(self, like: Tensor, stream: str = "noise") -> Tensor:
        return self.sign * super().noise(like, stream)


class Mirrored(Signed):
    """Noise of the other half of an antithetic pair."""

    sign = -1.0


def mean_pull(guidance, z: Tensor) -> Tensor:
    """Mean of the gradient over the noise, exact for Gaussian data (affine in eps), under the empty prompt."""
    b = CFGConditions(guidance.prior.embed([""]), guidance.prior.embed([""]))
    context = guidance.begin(z, 0, Rng())
    with torch.no_grad():
        pair = [guidance.score_gradient(z, b, kind(**vars(context))).gradient for kind in (Signed, Mirrored)]
    return 0.5 * (pair[0] + pair[1])


@pytest.mark.parametrize("timestep", [0.02, 0.3, 0.7, 0.98])
def test_the_optimal_corrective_has_no_pull_on_average_where_sds_shrinks(timestep):
    prior, z = gaussian("v_prediction"), latents()
    options = {"t_min": timestep, "t_max": timestep, "weighting": "uniform"}
    t = torch.tensor([timestep], dtype=torch.float64)
    alpha, sigma = prior.schedule.alpha(t).item(), prior.schedule.sigma(t).item()
    gain = alpha**2 * S**2 / (alpha**2 * S**2 + sigma**2)
    close(mean_pull(lmc(prior, wiener(prior), **options), z), torch.zeros_like(z), 1e-10)
    close(mean_pull(lmc(prior, **options), z), alpha / sigma * (1.0 - gain) * (z - M), 1e-10)


def test_towards_the_ends_of_the_schedule():
    prior, z = gaussian(), latents()
    gains = []
    for timestep in (0.0, 0.02, 0.3, 0.98):
        t = torch.tensor([timestep], dtype=torch.float64)
        gains.append(((wiener(prior)(z, t) - M) / (z - M)).mean().item())
    assert gains[0] > 0.997 and gains == sorted(gains, reverse=True) and gains[-1] < 0.01
    low = {"t_min": 0.0, "t_max": 0.0}
    sds, corrected = gradient_of(lmc(prior, **low), z), gradient_of(lmc(prior, wiener(prior), **low), z)
    # The difference is w alpha/sigma (1 - B)(z - m), with w = sigma^2 and 1 - B = sigma^2 / D: third order in sigma.
    sigma = prior.schedule.sigma(torch.zeros(1, dtype=torch.float64)).item()
    assert (sds - corrected).abs().max() < 1.01 * sigma**3 / S**2 * (z - M).abs().max()


@pytest.mark.parametrize("other", ["sample", "v_prediction"])
def test_every_parametrisation_gives_the_same_gradient(other):
    z, network = latents(), random_network()
    a, b = (gradient_of(lmc(blobs(kind), network, jacobian="full"), z) for kind in ("epsilon", other))
    close(a, b, 1e-9)


def test_cost_is_both_branches_and_a_row_of_the_corrective():
    prior = blobs()
    calls: list[int] = []
    predict = prior.predict
    prior.predict = lambda x_t, t, c: calls.append(len(x_t)) or predict(x_t, t, c)
    ramp = {"from": 0.0, "to": 1.0, "start": 10, "end": 20}
    for negatives, scale in ((False, 8.0), (True, 8.0), (False, 0.0), (False, 1.0)):
        guidance, b = lmc(prior, random_network(), guidance_scale=scale, beta=ramp), conditions(prior, negatives)
        calls.clear()
        gradient_of(guidance, latents(), 15, b=b)
        nfe = guidance.nfe(b, guidance.begin(latents(), 15, Rng()))
        assert calls == [3 * nfe.prior] and nfe.prior == 2 + len(b.negatives) and nfe.own == 1
        assert guidance.nfe(b, guidance.begin(latents(), 10, Rng())).own == 0
        assert lmc(prior, guidance_scale=scale).nfe(b, guidance.begin(latents(), 15, Rng())).own == 0


def test_the_network_takes_any_shape_and_both_precisions():
    network = random_network().float()
    for shape in ((1, 3, 1, 1), (2, 3, 5, 7), (1, 3, 16, 16)):
        z = torch.ones(shape, dtype=torch.float64)
        out = network(z, torch.full((shape[0],), 0.5, dtype=torch.float64))
        assert out.shape == shape and out.dtype == torch.float64 and not torch.equal(out, z)
    low, high = (network(torch.ones(1, 3, 4, 4), torch.tensor([t])) for t in (0.1, 0.9))
    assert not torch.allclose(low, high)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_corrective(tmp_path / "b", random_network(), blobs(), {"note": "made up"})
    return tmp_path / "b"


def test_a_saved_corrective_comes_back_frozen_in_half_precision_and_quietly(saved):
    before = torch.random.get_rng_state()
    guidance = ManifoldCorrective(ManifoldCorrective.Config(corrective=str(saved)), prior=blobs("v_prediction"))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not any(parameter.requires_grad for parameter in guidance.parameters())
    z, t = latents(), torch.full((3,), 0.4, dtype=torch.float64)
    torch.testing.assert_close(guidance.corrective(z, t), random_network()(z, t), rtol=0, atol=2e-3)
    assert json.loads((saved / "config.json").read_text())["note"] == "made up"
    assert load_file(saved / "corrective.safetensors")["last.weight"].dtype == torch.float16
    assert gradient_of(guidance, z.float()).dtype == torch.float32


def test_a_corrective_of_another_prior_is_refused(saved):
    with pytest.raises(
        ValueError, match=r"another prior \(a different noise schedule\); train a.*train_corrective\.py"
    ):
        load_corrective(str(saved), blobs(schedule=FlowSchedule()))
    larger = GaussianMixturePrior(GaussianMixturePrior.Config(image_size=16, std=0.5))
    with pytest.raises(ValueError, match=r"latents of shape \(3, 8, 8\), not \(3, 16, 16\)"):
        load_corrective(str(saved), larger)
    other = blobs()
    other._means *= 1.1
    with pytest.raises(ValueError, match="different weights"):
        load_corrective(str(saved), other)
    wider = blobs()
    wider.register_buffer("_more", torch.ones(4), persistent=False)
    with pytest.raises(ValueError, match="a different network"):
        load_corrective(str(saved), wider)
    rounded = blobs()
    rounded._means.copy_(rounded._means.bfloat16())
    assert load_corrective(str(saved), rounded) is not None
    assert Fingerprint.of(blobs("v_prediction")).differs_from(Fingerprint.of(blobs())) is None


def test_choices_that_name_no_corrective_say_what_to_do(saved, tmp_path):
    with pytest.raises(ValueError, match=r"^corrective: auto .*scripts/train_corrective\.py") as error:
        load_corrective("auto", blobs())
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"nowhere does not contain config\.json and corrective\.safetensors"):
        load_corrective(str(tmp_path / "nowhere"), blobs())
    weights = load_file(saved / "corrective.safetensors")
    save_file({name: value for name, value in weights.items() if name != "last.bias"}, saved / "corrective.safetensors")
    with pytest.raises(ValueError, match="cannot read a corrective from") as error:
        load_corrective(str(saved), blobs())
    assert "\n" not in str(error.value)
    assert load_corrective("identity", blobs()) is None


def test_the_shipped_corrective_is_the_embedded_priors_and_small():
    from scoredist3d.priors.diffusers_prior import DiffusersPrior

    prior = DiffusersPrior(DiffusersPrior.Config())
    network = load_corrective("auto", prior)
    assert network is not None and sum(file.stat().st_size for file in SHIPPED_FOLDER.iterdir()) < 2 * 2**20
    assert Fingerprint.of(prior.half()).differs_from(read_corrective(SHIPPED_FOLDER)[1]) is None
    # It blurs: the higher the timestep, the more of pure noise it removes.
    shape = (4, *prior.latent_shape(prior.image_size, prior.image_size))
    z = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.5
    energy = z.square().mean().item()
    change = [(network(z, torch.full((4,), t)) - z).square().mean().item() / energy for t in (0.05, 0.4, 0.8)]
    assert change == sorted(change) and change[-1] > 0.15
    card = (SHIPPED_FOLDER / "README.md").read_text()
    assert "What of LMC is not verified" in card

"""What the papers claim about where optimisation ends, on data whose answer is known in closed form.

Data are N(m, s^2 I) unless said otherwise, D(t) = alpha^2 s^2 + sigma^2 and lambda = sigma / alpha. The exact denoiser
is eps(x, t) = sigma (x - alpha m) / D, so every update is linear in the particles and its mean and spread follow a
recursion that can be written down. All particles are items of one batch, and every element of one is a sample of its
own: the standard error of a standard deviation over n samples is s / sqrt(2 n).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from shared.method_cases import FLOW_KINDS, CountingPrior, gradient, latents, method, views
from torch import Tensor, nn

from scoredist3d.diffusion.schedule import per_item
from scoredist3d.guidance import Guidance
from scoredist3d.priors import CFGConditions, Conditioning, Prediction
from scoredist3d.priors.analytic import GaussianMixturePrior, Mixture
from scoredist3d.prompts.processor import PromptProcessor

M, S = 0.4, 0.6
SHAPE = (1, 4, 4)
PARTICLES = 64
SAMPLES = PARTICLES * 16
ERROR = S / math.sqrt(2 * SAMPLES)
"""Standard error of the measured spread, 0.013."""


def mixture(**components: tuple[float, float]) -> GaussianMixturePrior:
    """Gaussians by name, each (mean, deviation) of every element; the empty prompt keeps all of them."""
    means, stds = (
        torch.tensor([value[index] for value in components.values()], dtype=torch.float64)[:, None, None, None]
        for index in (0, 1)
    )
    labels = tuple(frozenset({name}) for name in components)
    parts = Mixture(means.expand(-1, *SHAPE), stds, torch.ones(len(components), dtype=torch.float64), labels)
    return GaussianMixturePrior(GaussianMixturePrior.Config(), mixture=parts)


def gaussian(mean: float = M, std: float = S) -> GaussianMixturePrior:
    return mixture(thing=(mean, std))


def between(prior: GaussianMixturePrior, positive: str, other: str = "", **extra: str) -> CFGConditions:
    """Conditional on one prompt, guided away from another."""
    return CFGConditions(
        prior.embed([positive]),
        prior.embed([other]),
        plain=prior.embed([positive]),
        empty=prior.embed([""]),
        extra={name: prior.embed([text]) for name, text in extra.items()},
    )


def normal(count: int = PARTICLES, seed: int = 0) -> Tensor:
    return torch.randn((count, *SHAPE), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def coefficients(prior: GaussianMixturePrior, timestep: float) -> tuple[float, float, float]:
    """alpha, sigma and lambda at a timestep."""
    alpha, sigma = (c.item() for c in prior.schedule.coefficients(torch.tensor([timestep], dtype=torch.float64)))
    return alpha, sigma, sigma / alpha


def anneal(guidance: Guidance, z: Tensor, timesteps: list[float], conditions: CFGConditions, **extras: Any) -> Tensor:
    """z <- z - (lambda_t - lambda_p) (eps_hat - noise) down the timesteps: DDIM where the noise is the starting noise.

    The method must be weighted uniformly and its timesteps annealed along ``timesteps``, one per step.
    """
    ratios = [coefficients(guidance.prior, timestep)[2] for timestep in timesteps]
    for step, (start, stop) in enumerate(pairwise(ratios)):
        z = z - (start - stop) * gradient(guidance, z, step, conditions=conditions, **extras)
    return z


def linear_end(
    prior: GaussianMixturePrior, timesteps: list[float], parts: list[tuple[float, float, float]]
) -> tuple[float, float, float]:
    """Where :func:`anneal` takes particles from z = 0 when eps_hat = sum_i w_i eps_i with weights, means and deviations
    ``parts``.

    With k = sum w_i / D_i and h = sum w_i m_i / D_i, a step is z <- (1 - d sigma alpha k) z + d sigma alpha h + d (1 -
    sigma^2 k) n. Returns the mean, and the spread over particles for noise that stays (contributions of all steps add)
    and for noise drawn anew (their squares add).
    """
    mean, kept, variance = 0.0, 0.0, 0.0
    for start, stop in pairwise(timesteps):
        alpha, sigma, ratio = coefficients(prior, start)
        d = ratio - coefficients(prior, stop)[2]
        spreads = [alpha**2 * std**2 + sigma**2 for _, _, std in parts]
        k = sum(w / spread for (w, _, _), spread in zip(parts, spreads, strict=True))
        h = sum(w * m / spread for (w, m, _), spread in zip(parts, spreads, strict=True))
        shrink, noise = 1 - d * sigma * alpha * k, d * (1 - sigma**2 * k)
        mean = shrink * mean + d * sigma * alpha * h
        kept = shrink * kept + noise
        variance = shrink**2 * variance + noise**2
    return mean, abs(kept), math.sqrt(variance)


def falling(steps: int) -> tuple[list[float], dict[str, Any]]:
    """Timesteps 0.98 ... 0, then the clean image, and the options that make a method follow them."""
    span = {"from": 0.98, "to": 0.0, "end": steps - 1}
    timesteps = [round(0.98 - 0.98 * k / (steps - 1), 3) for k in range(steps)]
    return [*timesteps, -1.0], {"t_min": span, "t_max": span, "guidance_scale": 1.0}


def descend(
    guidance: Guidance, z: Tensor, steps: int, rate: Callable[[float], float], conditions: CFGConditions, **extras: Any
) -> Tensor:
    """Plain gradient descent; ``rate`` is a function of progress in [0, 1]."""
    for step in range(steps):
        z = z - rate(step / steps) * gradient(guidance, z, step, conditions=conditions, **extras)
    return z


# Score distillation seeks modes.


def test_sds_forgets_where_it_started() -> None:
    """E[G] = lambda sigma alpha (z - m) / D contracts every particle to m; falling rates average the noise out."""
    prior = gaussian()
    guidance = method("sds", prior, guidance_scale=1.0, weighting="lambda", t_min=0.02, t_max=0.98)
    end = descend(guidance, 2.0 * normal(), 200, lambda p: 0.3 * (1 - p) + 0.01, between(prior, "thing"))
    assert abs(end.mean().item() - M) < 0.02
    assert end.std().item() < 0.1 * S


def test_annealing_does_not_keep_the_spread_where_the_noise_is_drawn_anew() -> None:
    """Flow score distillation keeps s with the same timesteps and steps (below): what differs is the noise."""
    prior = gaussian()
    timesteps, options = falling(100)
    end = anneal(
        method("sds", prior, weighting="uniform", **options), 0.0 * normal(), timesteps, between(prior, "thing")
    )
    mean, _, fresh = linear_end(prior, timesteps, [(1.0, M, S)])
    assert fresh < 0.3 * S and abs(mean - M) < 0.05
    assert end.mean().item() == pytest.approx(mean, abs=4 * fresh / math.sqrt(SAMPLES))
    assert end.std().item() == pytest.approx(fresh, abs=4 * fresh / math.sqrt(2 * SAMPLES))
    # Finer steps end nearer to one point.
    fine = linear_end(prior, falling(400)[0], [(1.0, M, S)])[2]
    assert fine < 0.6 * fresh


def test_sds_picks_modes() -> None:
    """Every particle ends on one of the two modes, both are found, and around a mode there is next to no spread."""
    prior = mixture(low=(-1.0, 0.2), high=(1.0, 0.2))
    guidance = method("sds", prior, guidance_scale=1.0, weighting="lambda", t_min=0.02, t_max=0.5)
    end = descend(guidance, normal(), 200, lambda p: 0.3 * (1 - p) + 0.01, between(prior, ""))
    mode = end.mean((1, 2, 3)).sign()
    assert 0.3 < (mode > 0).double().mean() < 0.7
    offset = end - mode[:, None, None, None]
    assert offset.abs().max() < 0.1 and offset.std() < 0.1 * 0.2


# Guidance moves and sharpens.


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
def test_guidance_between_equal_spreads_moves_the_mean(scale: float) -> None:
    """For N(m_u, s^2) and N(m_c, s^2), eps_u + gamma (eps_c - eps_u) = sigma (x - alpha m_gamma) / D with m_gamma = m_u
    + gamma (m_c - m_u): exactly the denoiser of N(m_gamma, s^2). SDS ends at m_gamma, beyond the data for gamma > 1."""
    prior = mixture(cold=(-0.3, S), warm=(0.2, S))
    moved = -0.3 + scale * 0.5
    options = {"weighting": "lambda", "t_min": 0.02, "t_max": 0.98}
    guided = method("sds", prior, guidance_scale=scale, **options)
    alone = method("sds", gaussian(moved), guidance_scale=1.0, **options)
    z = normal(8)
    for step in range(3):
        torch.testing.assert_close(
            gradient(guided, z, step, conditions=between(prior, "warm", "cold")),
            gradient(alone, z, step, conditions=between(alone.prior, "thing")),
            rtol=0,
            atol=1e-10,
        )
    end = descend(guided, normal(64), 150, lambda p: 0.3 * (1 - p) + 0.01, between(prior, "warm", "cold"))
    assert abs(end.mean().item() - moved) < 0.02


def test_guidance_towards_a_narrower_conditional_sharpens() -> None:
    """With s_c < s_u the precision is 1 / D_u + gamma (1 / D_c - 1 / D_u) > 1 / D_c: samples of scale 3 spread less
    than the conditional data, by the amount that the recursion says."""
    prior = mixture(broad=(0.0, 0.8), narrow=(0.3, 0.4))
    timesteps, options = falling(60)
    spread = {}
    for scale in (1.0, 3.0):
        guidance = method(
            "fsd", prior, weighting="uniform", noise_field="constant", **options | {"guidance_scale": scale}
        )
        end = anneal(guidance, 0.0 * normal(), timesteps, between(prior, "narrow", "broad"))
        mean, kept, _ = linear_end(prior, timesteps, [(scale, 0.3, 0.4), (1 - scale, 0.0, 0.8)])
        assert end.std().item() == pytest.approx(kept, abs=4 * kept / math.sqrt(2 * SAMPLES))
        assert end.mean().item() == pytest.approx(mean, abs=4 * kept / math.sqrt(SAMPLES))
        spread[scale] = kept
    assert spread[3.0] < 0.8 * spread[1.0]


# Deterministic noise samples.


def test_flow_score_distillation_keeps_the_spread_of_the_data() -> None:
    """With its noise fixed per particle the same loop is DDIM, a map of slope s from noise to data (proposition 1)."""
    prior = gaussian()
    timesteps, options = falling(60)
    guidance = method("fsd", prior, weighting="uniform", noise_field="constant", **options)
    end = anneal(guidance, 0.0 * normal(), timesteps, between(prior, "thing"))
    mean, kept, _ = linear_end(prior, timesteps, [(1.0, M, S)])
    assert kept == pytest.approx(S, abs=0.03) and mean == pytest.approx(M, abs=0.03)
    assert end.std().item() == pytest.approx(kept, abs=4 * ERROR)
    assert end.mean().item() == pytest.approx(mean, abs=4 * kept / math.sqrt(SAMPLES))


def test_flow_score_distillation_fills_both_modes() -> None:
    """Half of the particles each (standard error 0.0625 over 64), spread as the data around them; SDS has no spread."""
    prior = mixture(low=(-1.0, 0.2), high=(1.0, 0.2))
    timesteps, options = falling(60)
    guidance = method("fsd", prior, weighting="uniform", noise_field="constant", **options)
    end = anneal(guidance, 0.0 * normal(), timesteps, between(prior, ""))
    mode = end.mean((1, 2, 3)).sign()
    assert abs((mode > 0).double().mean().item() - 0.5) < 4 * 0.0625
    offset = end - mode[:, None, None, None]
    assert offset.std().item() == pytest.approx(0.2, abs=0.02 + 4 * 0.2 / math.sqrt(2 * SAMPLES))


def ddim_end(prior: GaussianMixturePrior, timesteps: list[float]) -> tuple[float, float]:
    """Mean and spread of x0_hat at the last timestep of DDIM from N(0, I): with r = x - alpha m, a step is r <- r (alpha_p
    alpha s^2 + sigma_p sigma) / D."""
    alpha, sigma, _ = coefficients(prior, timesteps[0])
    mean, slope = -alpha * M, 1.0
    for start, stop in pairwise(timesteps):
        alpha, sigma, _ = coefficients(prior, start)
        alpha_p, sigma_p, _ = coefficients(prior, stop)
        factor = (alpha_p * alpha * S**2 + sigma_p * sigma) / (alpha**2 * S**2 + sigma**2)
        mean, slope = mean * factor, slope * factor
    alpha, sigma, _ = coefficients(prior, timesteps[-1])
    shrink = alpha * S**2 / (alpha**2 * S**2 + sigma**2)
    return M + shrink * mean, abs(shrink * slope)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("sdi", {"kappa": "cached"}),
        ("dsd", {"exact": True, "ode_guidance_scale": None, "sub_guidance_scale": None}),
    ],
    ids=["cached sdi", "dsd*"],
)
def test_ddim_in_the_space_of_predictions_keeps_the_spread_of_the_data(name: str, options: dict[str, Any]) -> None:
    """Unit steps along the gradient z - x0_hat are DDIM from each particle's own noise (SDI, eq. 6; DSD's 2D limit)."""
    prior = gaussian()
    timesteps, span = falling(40)
    guidance = method(name, prior, weighting="lambda", **options, **span)
    end = descend(guidance, normal(), 40, lambda p: 1.0, between(prior, "thing"))
    mean, spread = ddim_end(prior, timesteps[:-1])
    assert spread == pytest.approx(S, abs=0.04) and mean == pytest.approx(M, abs=0.03)
    assert end.std().item() == pytest.approx(spread, abs=4 * ERROR)
    assert end.mean().item() == pytest.approx(mean, abs=4 * spread / math.sqrt(SAMPLES))


def test_diverse_score_distillation_keeps_the_spread_of_the_data() -> None:
    """With its own grid and window the ODE is coarser than DDIM, so the spread is only near to s; SDS's would be 0."""
    prior = gaussian()
    span = {"from": 0.98, "to": 0.02, "end": 60}
    guidance = method(
        "dsd", prior, guidance_scale=1.0, weighting="lambda", t_min=span, t_max=span, ode_steps=20, interval=0.1
    )
    end = descend(guidance, normal(), 80, lambda p: 1.0, between(prior, "thing"))
    assert 0.7 * S < end.std().item() < 1.3 * S
    assert abs(end.mean().item() - M) < 0.1


def test_inverting_again_and_again_forgets_the_seed() -> None:
    """Exact inversion finds kappa = (z - m) (sqrt(D) / s - alpha) / sigma, whose target is m + (alpha s / sqrt(D)) (z -
    m): every update contracts, so SDI's quality does not come with diversity (limit of fine steps: 3 % here)."""
    prior = gaussian()
    guidance = method(
        "sdi", prior, guidance_scale=1.0, inversion_guidance_scale=1.0, inversion_steps=200, inversion_eta=0.0,
        tau_max=0.0, weighting="lambda", t_min=0.5, t_max=0.5,
    )  # fmt: skip
    z = normal(4)
    alpha, sigma, _ = coefficients(prior, 0.5)
    target = M + alpha * S / math.sqrt(alpha**2 * S**2 + sigma**2) * (z - M)
    g = gradient(guidance, z, conditions=between(prior, "thing"))
    assert (z - g - target).abs().max() < 0.03 * (z - target).abs().max()


# Variational methods know how the particles are spread.


class ExactPhi(nn.Module):
    """The denoiser of N(mean, std^2) fitted to all elements of the particles; told a camera (or if ``dirac``), that of
    each particle alone, which finds the very noise that was added."""

    def __init__(self, prior: GaussianMixturePrior) -> None:
        super().__init__()
        self.prior, self.z, self.dirac = [prior], torch.zeros(0), False

    def predict(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Prediction:
        """By the formula in this file's head."""
        schedule = self.prior[0].schedule
        alpha, sigma = (per_item(c, x_t) for c in schedule.coefficients(t))
        alone = (x_t - alpha * torch.cat([self.z] * (len(x_t) // len(self.z)))) / sigma
        together = sigma * (x_t - alpha * self.z.mean()) / (alpha**2 * self.z.var() + sigma**2)
        seen = (conditioning.camera.abs().sum(1) > 0) | self.dirac
        return Prediction(torch.where(seen[:, None, None, None], alone, together), "epsilon", x_t, t, schedule)


def variational(name: str, prior: GaussianMixturePrior, **options: Any) -> tuple[Guidance, ExactPhi]:
    """A variational method whose second network is exact and needs no training."""
    guidance: Any = method(name, prior, **options)
    phi = ExactPhi(prior)
    guidance.phi = phi
    guidance.update = lambda z, conditions, step: {}
    return guidance, phi


def settle(guidance: Guidance, phi: ExactPhi, z: Tensor, steps: int, conditions: CFGConditions) -> Tensor:
    for step in range(steps):
        phi.z = z
        z = z - 1.5 * gradient(guidance, z, step, conditions=conditions)
    return z


@pytest.mark.parametrize("start", [0.2, 1.5])
def test_variational_particles_take_the_spread_of_the_data(start: float) -> None:
    """E[G] = w sigma alpha ((z - m) / D_p - (z - mu) / D_q) is zero for all z only at mu = m and u = s, reached from
    narrower and wider starts; the noise of G vanishes there too, so the end is exact up to how far the flow is."""
    prior = gaussian()
    guidance, phi = variational("vsd", prior, guidance_scale=1.0, t_min=0.02, t_max=0.98)
    end = settle(guidance, phi, start * normal(), 100, between(prior, "thing"))
    assert end.std().item() == pytest.approx(S, abs=1e-3) and end.mean().item() == pytest.approx(M, abs=1e-3)


def test_variational_distillation_of_a_point_is_sds() -> None:
    prior = gaussian()
    guidance, phi = variational("vsd", prior, guidance_scale=3.0)
    phi.z, phi.dirac = normal(8), True
    for step in range(3):
        same = method("sds", prior, guidance_scale=3.0)
        g = [gradient(each, phi.z, step, conditions=between(prior, "thing")) for each in (guidance, same)]
        torch.testing.assert_close(g[0], g[1], rtol=0, atol=1e-11)


@pytest.mark.parametrize(("entropy", "timestep"), [(1.0, 0.5), (0.8, 0.2)])
def test_entropic_distillation_chooses_the_spread(entropy: float, timestep: float) -> None:
    """A phi that knows each view finds eps itself, mean 0, and one that does not gives sigma alpha (z - mu) / D_q, so
    that E[G] = 0 where D_q = lambda D_p: alpha^2 u^2 = lambda alpha^2 s^2 - (1 - lambda) sigma^2. lambda = 1 keeps the
    data's spread, lambda = 0 is VSD with perfect knowledge of the view, which is SDS. Small steps average the noise
    out that is left in G."""
    prior = gaussian()
    alpha, sigma, _ = coefficients(prior, timestep)
    expected = math.sqrt(entropy * S**2 - (1 - entropy) * (sigma / alpha) ** 2)
    guidance, phi = variational(
        "esd", prior, guidance_scale=1.0, entropy=entropy, weighting="uniform", t_min=timestep, t_max=timestep
    )
    z, conditions = expected * 1.3 * normal(), seen_from_everywhere(between(prior, "thing"), PARTICLES)
    for step in range(150):
        phi.z = z
        z = z - 0.3 * (1 - step / 150) * gradient(guidance, z, step, conditions=conditions)
    assert z.std().item() == pytest.approx(expected, abs=0.03)
    assert abs(z.std().item() - 1.3 * expected) > 0.1


def test_collapse_without_entropy() -> None:
    """The same run with lambda = 0 is SDS and ends on a point."""
    prior = gaussian()
    guidance, phi = variational("esd", prior, guidance_scale=1.0, entropy=0.0, weighting="lambda")
    z, conditions = normal(), seen_from_everywhere(between(prior, "thing"), PARTICLES)
    for step in range(150):
        phi.z = z
        z = z - (0.3 * (1 - step / 150) + 0.01) * gradient(guidance, z, step, conditions=conditions)
    assert z.std().item() < 0.1 * S and abs(z.mean().item() - M) < 0.02


@pytest.mark.parametrize(("repulsion", "low", "high"), [(0, 0.0, 0.25), ("sigma", 0.8, 1.2)])
def test_stein_particles_keep_the_spread_that_repulsion_gives_them(repulsion: Any, low: float, high: float) -> None:
    """48 scalar particles under SVGD with the exact score: with its repulsion in units of the score they spread as the
    data (a standard deviation of 48 has an error of 10 %), without it they share their directions and meet."""
    prior = gaussian()
    guidance = method(
        "collaborative-sd", prior, guidance_scale=1.0, repulsion_scale=repulsion, noise_sharing="shared",
        weighting="uniform", t_min=0.1, t_max=0.1,
    )  # fmt: skip
    z = normal(48)[:, :, :1, :1]
    narrow = mixture(thing=(M, S))
    narrow._means, narrow._variances = narrow._means[..., :1, :1], narrow._variances[..., :1, :1]
    guidance._outside = (narrow,)
    z = descend(guidance, 0.5 * z, 300, lambda p: 1.0 - 0.9 * p, between(narrow, "thing"))
    assert low * S <= z.std().item() < high * S
    assert abs(z.mean().item() - M) < 3 * S / 48**0.5  # three standard errors of a mean of 48


# Differences of two prompts.


def test_a_bridge_between_equal_spreads_drifts_without_end() -> None:
    """eps_tgt - eps_src = alpha sigma (m_s - m_t) / D whatever z and eps: a constant drift to the target, with no
    point where it stops. That is why stage two is short."""
    prior = mixture(old=(-0.2, S), new=(0.3, S))
    guidance = method("bridge", prior, stage_two_start_step=0, stage_two_weighting="uniform", t_min=0.5, t_max=0.5)
    (name,) = guidance.extra_prompts("new").keys() - {"target"}
    conditions = between(prior, "new", **dict.fromkeys(guidance.extra_prompts("new"), "new") | {name: "old"})
    alpha, sigma, _ = coefficients(prior, 0.5)
    drift = alpha * sigma * (-0.2 - 0.3) / (alpha**2 * S**2 + sigma**2)
    for step, z in enumerate((normal(4), 100.0 + normal(4))):
        g = gradient(guidance, z, step, conditions=conditions)
        torch.testing.assert_close(g, torch.full_like(g, drift), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["dds", "pds", "bridge"])
def test_the_same_prompt_on_both_sides_changes_nothing(name: str) -> None:
    """Edits of the source to itself, and a render described as what it should be."""
    prior = CountingPrior()
    own = {"stage_two_start_step": 0, "target_modifier": ""} if name == "bridge" else {}
    guidance = method(name, prior, **own | {"source_prompt": "red"})
    z = latents(2)
    assert gradient(guidance, z, source=z, conditions=told(guidance)).abs().max() < 1e-12
    other = method(name, prior, **own | {"source_prompt": "green"})
    assert gradient(other, z, source=z, conditions=told(other)).abs().max() > 1e-3


def test_posterior_distillation_of_neighbouring_levels_is_weighted_delta_denoising() -> None:
    """At stride 1 psi is 0 and chi = sqrt(beta_t / (alpha_t^step (1 - abar_{t-1}))) is all that differs."""
    prior = CountingPrior()
    options = {"guidance_scale": 3.0, "source_prompt": "green", "t_min": 0.5, "t_max": 0.5}
    pds, dds = method("pds", prior, stride=1, **options), method("dds", prior, **options)
    abar, before = (coefficients(prior, timestep)[0] ** 2 for timestep in (0.5, 0.499))
    chi = math.sqrt((1 - abar / before) / (abar / before * (1 - before)))
    z, source = latents(2), latents(2, seed=8)
    torch.testing.assert_close(
        gradient(pds, z, source=source, conditions=told(pds)),
        chi * gradient(dds, z, source=source, conditions=told(dds)),
        rtol=1e-7,
        atol=1e-10,
    )


# Limits in which a method is another one.

LEVEL = {"t_min": 0.4, "t_max": 0.4}
LIMITS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "fsd": ({"sqrt_beta": 0.0, "weighting": "sds"}, {}),
    # One timestep for the whole batch.
    "sdi": ({"kappa": "random", "weighting": "lambda", **LEVEL}, {"weighting": "lambda", **LEVEL}),
    "lmc": ({"corrective": "identity"}, {}),
    "csd": ({"c_y": 3.0, "c_0": -2.0, "c_eps": -1.0}, {}),
    "bridge": ({"stage_two_start_step": 9, "target_modifier": ""}, {}),
    "sjc": ({"t_min": 0.02, "t_max": 0.98}, {"weighting": "uniform"}),
    "hifa": (
        {"denoise_steps": 1, "image_weight": 0.0, "weighting": "uniform", "weight": 1.0},
        {"weighting": "uniform"},
    ),
    "rfds": ({}, {"weighting": "flow"}),
    "vsd": ({}, {}),
}
"""Method to the options that make it SDS, and those of that SDS."""


@pytest.mark.parametrize("name", LIMITS)
@pytest.mark.parametrize("kind", ["vp-epsilon", FLOW_KINDS[0]])
def test_equals_score_distillation_in_its_limit(name: str, kind: str) -> None:
    prior = CountingPrior(kind)
    own, of_sds = LIMITS[name]
    if name == "vsd":
        guidance, phi = variational(name, prior, guidance_scale=3.0)
        phi.z, phi.dirac = latents(3), True
    else:
        guidance = method(name, prior, guidance_scale=3.0, **own)
    same = method("sds", prior, guidance_scale=3.0, **of_sds)
    for step in range(2):
        g = gradient(guidance, latents(3), step, conditions=told(guidance))
        expected = gradient(same, latents(3), step, conditions=told(same))
        torch.testing.assert_close(g, expected, rtol=0, atol=1e-11 * expected.abs().max().item())


def test_one_collaborator_works_alone() -> None:
    prior = CountingPrior()
    alone, sds = (method(name, prior, guidance_scale=3.0) for name in ("collaborative-sd", "sds"))
    g = [gradient(each, latents(1), 2, conditions=told(each)) for each in (alone, sds)]
    torch.testing.assert_close(g[0], g[1], rtol=0, atol=1e-12)


@pytest.mark.parametrize(("name", "options"), [("asd", {"gamma": 0.0}), ("esd", {"entropy": 0.0})])
def test_relatives_of_variational_distillation_reduce_to_it(name: str, options: dict[str, Any]) -> None:
    prior = CountingPrior()
    gradients = []
    for each, own in ((name, options), ("vsd", {})):
        guidance, phi = variational(each, prior, guidance_scale=3.0, **own)
        phi.z = latents(3)
        gradients.append(gradient(guidance, latents(3), 1, conditions=told(guidance)))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=1e-12)


def test_noise_free_distillation_without_a_negative_prompt_is_a_classifier() -> None:
    """Above the threshold timestep e_0 - e_n vanishes and gamma (e_y - e_0) is left."""
    prior = CountingPrior()
    nfsd = method("nfsd", prior, guidance_scale=3.0, negative_prompt="", t_min=0.3)
    classifier = method("csd", prior, c_y=3.0, c_0=-3.0, t_min=0.3)
    g = [gradient(each, latents(2), 1, conditions=told(each)) for each in (nfsd, classifier)]
    torch.testing.assert_close(g[0], g[1], rtol=0, atol=1e-11)


def test_an_empty_window_leaves_diverse_distillation_nothing_to_do() -> None:
    """At u = t both predictions are one: G is 0 with equal scales, and w (gamma - gamma_sub) (e_y - e_0) otherwise."""
    prior = CountingPrior()
    options = {"guidance_scale": 3.0, "t_min": 0.5, "t_max": 0.5}
    g = {
        sub: gradient(guidance, latents(2), conditions=told(guidance))
        for sub in (3.0, 2.0, 1.0)
        for guidance in [method("dsd", prior, sub_guidance_scale=sub, **options)]
    }
    assert g[3.0].abs().max() < 1e-12 < 1e-3 < g[1.0].abs().max()
    torch.testing.assert_close(g[1.0], 2.0 * g[2.0], rtol=0, atol=1e-12)


def test_trajectory_matching_at_its_end_is_a_classifier() -> None:
    """TSM with gamma 0 compares two predictions at the same point: lambda g (e_y - e_0), linear in g."""
    prior = CountingPrior()
    g = {
        scale: gradient(guidance, latents(2), conditions=told(guidance))
        for scale in (0.0, 1.0, 3.0)
        for guidance in [method("ism", prior, guidance_scale=scale, tsm_gamma=0.0, t_min=0.5, t_max=0.5)]
    }
    assert g[0.0].abs().max() < 1e-11 < 1e-3 < g[1.0].abs().max()
    torch.testing.assert_close(g[3.0], 3.0 * g[1.0], rtol=0, atol=1e-10)


def told(guidance: Guidance) -> CFGConditions:
    """A prompt without views or negative prompt, and what the method asks for besides."""
    extra = guidance.extra_prompts("red")
    return PromptProcessor(PromptProcessor.Config(), prior=guidance.prior, prompt="red", extra=extra)()


def seen_from_everywhere(conditions: CFGConditions, count: int) -> CFGConditions:
    return dataclasses.replace(conditions, cameras=views(count))

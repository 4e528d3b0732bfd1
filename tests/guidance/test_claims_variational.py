"""Claims of the papers about the spread of particles, and about methods that compare two prompts."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from shared.gaussian_data import (
    PARTICLES,
    ExactPhi,
    M,
    S,
    between,
    coefficients,
    default_conditions,
    descend,
    gaussian,
    mixture,
    normal,
    seen_from_everywhere,
    variational,
)
from shared.method_cases import CountingPrior, gradient, latents, method
from torch import Tensor

from scoredist3d.guidance import Guidance
from scoredist3d.nn.unregistered import Unregistered
from scoredist3d.priors import CFGConditions


def settle(guidance: Guidance, phi: ExactPhi, z: Tensor, steps: int, conditions: CFGConditions) -> Tensor:
    for step in range(steps):
        phi.z = z
        z = z - 1.5 * gradient(guidance, z, step, conditions=conditions)
    return z


@pytest.mark.parametrize("start", [0.2, 1.5])
def test_variational_particles_take_the_spread_of_the_data(start: float) -> None:
    """E[G] = w sigma alpha ((z - m) / D_p - (z - mu) / D_q) is zero for all z only at mu = m and u = s, reached from
    narrower and wider starts. The noise of G also vanishes there, so the result is exact up to convergence."""
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
    """With a camera phi predicts eps itself, with mean 0, and without one sigma alpha (z - mu) / D_q. E[G] is therefore
    0 for D_q = lambda D_p: alpha^2 u^2 = lambda alpha^2 s^2 - (1 - lambda) sigma^2. lambda = 1 keeps the spread of the
    data; lambda = 0 is VSD with perfect knowledge of the view, which is SDS. Small steps average out the remaining
    noise of G."""
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
    """The same run with lambda = 0 is SDS and converges to a point."""
    prior = gaussian()
    guidance, phi = variational("esd", prior, guidance_scale=1.0, entropy=0.0, weighting="lambda")
    z, conditions = normal(), seen_from_everywhere(between(prior, "thing"), PARTICLES)
    for step in range(150):
        phi.z = z
        z = z - (0.3 * (1 - step / 150) + 0.01) * gradient(guidance, z, step, conditions=conditions)
    assert z.std().item() < 0.1 * S and abs(z.mean().item() - M) < 0.02


@pytest.mark.parametrize(("repulsion", "low", "high"), [(0, 0.0, 0.25), ("sigma", 0.8, 1.2)])
def test_stein_particles_keep_the_spread_that_repulsion_gives_them(repulsion: Any, low: float, high: float) -> None:
    """48 scalar particles under SVGD with the exact score: with the repulsion in units of the score they have the
    spread of the data (a standard deviation of 48 samples has an error of 10 %); without it they collapse."""
    prior = gaussian()
    guidance = method(
        "collaborative-sd", prior, guidance_scale=1.0, repulsion_scale=repulsion, noise_sharing="shared",
        weighting="uniform", t_min=0.1, t_max=0.1,
    )  # fmt: skip
    z = normal(48)[:, :, :1, :1]
    narrow = mixture(thing=(M, S))
    narrow._means, narrow._variances = narrow._means[..., :1, :1], narrow._variances[..., :1, :1]
    guidance._prior = Unregistered(narrow)
    z = descend(guidance, 0.5 * z, 300, lambda p: 1.0 - 0.9 * p, between(narrow, "thing"))
    assert low * S <= z.std().item() < high * S
    assert abs(z.mean().item() - M) < 3 * S / 48**0.5  # three standard errors of a mean of 48


# Differences of two prompts.


def test_a_bridge_between_equal_spreads_drifts_without_end() -> None:
    """eps_tgt - eps_src = alpha sigma (m_s - m_t) / D for all z and eps: a constant drift to the target without a fixed
    point. Stage two must therefore be short."""
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
    """Editing the source to its own text, and describing a render by the target text."""
    prior = CountingPrior()
    own = {"stage_two_start_step": 0, "target_modifier": ""} if name == "bridge" else {}
    guidance = method(name, prior, **own | {"source_prompt": "red"})
    z = latents(2)
    assert gradient(guidance, z, source=z, conditions=default_conditions(guidance)).abs().max() < 1e-12
    other = method(name, prior, **own | {"source_prompt": "green"})
    assert gradient(other, z, source=z, conditions=default_conditions(other)).abs().max() > 1e-3


def test_pds_of_adjacent_timesteps_is_weighted_dds() -> None:
    """At stride 1 psi is 0, and PDS is DDS times chi = sqrt(beta_t / (alpha_t^step (1 - abar_{t-1})))."""
    prior = CountingPrior()
    options = {"guidance_scale": 3.0, "source_prompt": "green", "t_min": 0.5, "t_max": 0.5}
    pds, dds = method("pds", prior, stride=1, **options), method("dds", prior, **options)
    abar, before = (coefficients(prior, timestep)[0] ** 2 for timestep in (0.5, 0.499))
    chi = math.sqrt((1 - abar / before) / (abar / before * (1 - before)))
    z, source = latents(2), latents(2, seed=8)
    torch.testing.assert_close(
        gradient(pds, z, source=source, conditions=default_conditions(pds)),
        chi * gradient(dds, z, source=source, conditions=default_conditions(dds)),
        rtol=1e-7,
        atol=1e-10,
    )

"""PDS against its definition by stochastic latents, and the weights of its forms."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from shared.method_cases import CountingPrior, gradient, latents, method, schedule_of

from scoredist3d.config.loader import load
from scoredist3d.config.validation import parse_component
from scoredist3d.guidance.core.context import item_noise
from scoredist3d.priors import predict_each
from scoredist3d.seeding import Rng

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def pds(kind: str = "vp-epsilon", **options):
    return method("pds", CountingPrior(kind), **options)


def timestep_grid(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.float64) / 1000


def guided(prior, x_t, t, text: str, scale: float):
    e_y, e_u = (p.eps for p in predict_each(prior, x_t, t, [prior.embed([text]), prior.embed(["blue"])]))
    return e_u + scale * (e_y - e_u)


@pytest.mark.parametrize("values", [{}, load([CONFIGS / "guidance" / "pds.yaml"])["system"]["guidance"]])
def test_class_and_fragment_hold_the_released_settings(values: dict) -> None:
    """500 steps on 1000 timesteps are a stride of 2; the fragment only sets the scale."""
    config = parse_component("guidance", {"type": "pds"} | values)
    for step in (0, 29999):
        assert (config.t_min(step), config.t_max(step), config.guidance_scale(step)) == (0.02, 0.98, 100.0)
        assert (config.weight(step), config.identity_weight(step)) == (1.0, 1.0)
    assert (config.form, config.stride, config.weighting, config.grad_clip) == ("posterior", 2, "uniform", None)


@pytest.mark.parametrize("stride", [1, 2, 5])
def test_it_is_the_difference_of_the_stochastic_latents(stride: int) -> None:
    """Both latents as defined, with independent noises at t and t' shared by edited and source latents."""
    guidance = pds(stride=stride)
    prior = guidance.prior
    z, z_source = latents(3), latents(3, seed=6)
    timesteps = guidance.sample_timesteps(3, 2, Rng())
    k = torch.tensor([round(1000 * timestep) for timestep in timesteps])
    abar = prior.schedule.alpha(timestep_grid(*range(1000))) ** 2
    alpha_step = abar[k] / abar[k - 1]
    beta = 1 - alpha_step
    at, below = abar[k], abar[k - stride]
    deviation = (beta * (1 - below) / (1 - at)).sqrt()
    c0, c1 = below.sqrt() * beta / (1 - at), alpha_step.sqrt() * (1 - below) / (1 - at)
    eps, other = item_noise(Rng(), "noise", 2, z), item_noise(Rng(), "another", 2, z)

    def shaped(c):
        return c[:, None, None, None]

    def zeta(clean, text):
        x_t = shaped(at.sqrt()) * clean + shaped((1 - at).sqrt()) * eps
        x_below = shaped(below.sqrt()) * clean + shaped((1 - below).sqrt()) * other
        e = guided(prior, x_t, torch.tensor(timesteps, dtype=torch.float64), text, 100.0)
        x0 = (x_t - shaped((1 - at).sqrt()) * e) / shaped(at.sqrt())
        return (x_below - shaped(c0) * x0 - shaped(c1) * x_t) / shaped(deviation)

    expected = zeta(z, "red") - zeta(z_source, "green")
    found = gradient(guidance, z, 2, source=z_source)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10 * expected.abs().max().item())


def test_one_step_down_it_is_weighted_dds() -> None:
    z, z_source = latents(3), latents(3, seed=6)
    options = {"guidance_scale": 7.5, "t_min": 0.02, "t_max": 0.98}
    one, dds = pds(stride=1, **options), method("dds", CountingPrior(), **options)
    timesteps = torch.tensor(one.sample_timesteps(3, 0, Rng()), dtype=torch.float64)
    psi, chi = one.coefficients(timesteps)
    assert psi.abs().max() < 1e-11
    expected = chi[:, None, None, None] * gradient(dds, z, source=z_source)
    torch.testing.assert_close(gradient(one, z, source=z_source), expected, rtol=0, atol=1e-10)


def test_chi_on_stable_diffusions_schedule() -> None:
    """chi = sqrt(beta_t / (alpha_t (1 - abar_{t-1}))) is 0.226 at the lowest timestep and at least 0.081."""
    ts = timestep_grid(*range(21, 980))
    _, chi = pds(stride=1).coefficients(ts)
    abar = schedule_of("vp-epsilon").alpha(timestep_grid(*range(1000))) ** 2
    k = torch.arange(21, 980)
    alpha_step = abar[k] / abar[k - 1]
    expected = ((1 - alpha_step) / (alpha_step * (1 - abar[k - 1]))).sqrt()
    torch.testing.assert_close(chi, expected, rtol=1e-10, atol=0)
    assert round(chi.min().item(), 3) == 0.081 and round(chi.max().item(), 3) == 0.226


def test_psi_of_the_authors_code_on_stable_diffusions_schedule() -> None:
    numbers = (21, 101, 401, 961)
    psi, _ = pds().coefficients(timestep_grid(*numbers))
    for found, (figure, digits) in zip(psi.tolist(), ((1.61, 2), (0.314, 3), (0.049, 3), (0.005, 3)), strict=True):
        assert round(found, digits) == figure
    abar = schedule_of("vp-epsilon").alpha(timestep_grid(*range(1000))) ** 2
    k = torch.tensor(numbers)
    a, last = abar[k - 1] / abar[k - 2], abar[k] / abar[k - 1]
    deviation = ((1 - last) * (1 - abar[k - 2]) / (1 - abar[k])).sqrt()
    expected = (1 - a.sqrt()) * (1 + a.sqrt() * abar[k - 2]) * abar[k - 2].sqrt() * last / ((1 - abar[k]) * deviation)
    torch.testing.assert_close(psi, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", ["vp-epsilon", "rf-v_prediction"])
def test_psi_is_zero_for_the_true_posterior_and_positive_for_the_shorter_variance(kind: str) -> None:
    ts = timestep_grid(*range(5, 980, 13))
    assert pds(kind, stride=1).coefficients(ts)[0].abs().max() < 1e-9
    assert pds(kind, stride=2).coefficients(ts)[0].min() > 0
    assert (pds(kind, stride=4).coefficients(ts)[0] > pds(kind, stride=2).coefficients(ts)[0]).all()


def test_the_pull_to_the_source_vanishes_there_and_has_a_factor() -> None:
    z = latents(2)
    same = {"source_prompt": "red", "t_min": 0.1, "t_max": 0.1, "guidance_scale": 1.0}
    plain, none, double = (pds(**same, identity_weight=weight) for weight in (1.0, 0.0, 2.0))
    at_source = [gradient(guidance, z, source=z) for guidance in (plain, none, double)]
    assert all(found.abs().max() < 1e-12 for found in at_source)
    away = z + 0.2
    once, never, twice = (gradient(guidance, away, source=z) for guidance in (plain, none, double))
    torch.testing.assert_close(twice - never, 2.0 * (once - never), rtol=0, atol=1e-12)
    psi, _ = plain.coefficients(timestep_grid(100))
    torch.testing.assert_close(once - never, torch.full_like(z, 0.2 * psi.item()), rtol=0, atol=1e-12)


def test_dreamcatalysts_weights() -> None:
    z, z_source = latents(3), latents(3, seed=6)
    guidance = pds(form="dreamcatalyst", guidance_scale=7.5)
    dds = method("dds", CountingPrior(), guidance_scale=7.5, t_min=0.02, t_max=0.98)
    difference = gradient(dds, z, source=z_source)
    expected = []
    for item, tau in enumerate(guidance.sample_timesteps(3, 0, Rng())):
        edit = 0.2 + 0.8 * tau ** (1 / math.e)
        expected.append(edit * difference[item] + 0.075 * math.exp(tau) * (z - z_source)[item])
    torch.testing.assert_close(gradient(guidance, z, source=z_source), torch.stack(expected), rtol=0, atol=1e-11)


@pytest.mark.parametrize("kind", ["vp-epsilon", "rf-v_prediction"])
@pytest.mark.parametrize("stride", [1, 2])
def test_the_lowest_timesteps_have_finite_weights(kind: str, stride: int) -> None:
    ends = timestep_grid(0, 1, 2, 3, 999) if kind == "vp-epsilon" else timestep_grid(1, 2, 3, 999, 1000)
    psi, factor = pds(kind, stride=stride)._posterior(ends)
    assert psi.isfinite().all() and factor.isfinite().all() and (factor > 0).all()
    lowest = pds(kind, stride=stride).coefficients(timestep_grid(0, stride + 1))
    assert lowest[0][0] == lowest[0][1]


def test_the_other_weightings_scale_the_whole() -> None:
    z = latents(2)
    plain, weighted = pds(t_min=0.5, t_max=0.5), pds(t_min=0.5, t_max=0.5, weighting="sds")
    w = plain.schedule.sigma(timestep_grid(500)).item() ** 2
    torch.testing.assert_close(gradient(weighted, z), w * gradient(plain, z), rtol=1e-11, atol=0)

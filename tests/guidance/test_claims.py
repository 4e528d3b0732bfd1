"""Claims of the papers about where an optimization converges: SDS, guidance, and methods equivalent to samplers."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from shared.gaussian_data import (
    ERROR,
    SAMPLES,
    M,
    S,
    anneal,
    between,
    coefficients,
    descend,
    falling,
    gaussian,
    linear_end,
    mixture,
    normal,
)
from shared.method_cases import gradient, method

from scoredist3d.priors.analytic import GaussianMixturePrior

# Score distillation seeks modes.


def test_sds_loses_its_initialization() -> None:
    """E[G] = lambda sigma alpha (z - m) / D contracts every particle to m; decreasing rates average out the noise."""
    prior = gaussian()
    guidance = method("sds", prior, guidance_scale=1.0, weighting="lambda", t_min=0.02, t_max=0.98)
    end = descend(guidance, 2.0 * normal(), 200, lambda p: 0.3 * (1 - p) + 0.01, between(prior, "thing"))
    assert abs(end.mean().item() - M) < 0.02
    assert end.std().item() < 0.1 * S


def test_annealing_does_not_keep_the_spread_where_the_noise_is_drawn_anew() -> None:
    """With the same timesteps and steps, flow score distillation keeps s (below); only the noise differs."""
    prior = gaussian()
    timesteps, options = falling(100)
    end = anneal(
        method("sds", prior, weighting="uniform", **options), 0.0 * normal(), timesteps, between(prior, "thing")
    )
    mean, _, fresh = linear_end(prior, timesteps, [(1.0, M, S)])
    assert fresh < 0.3 * S and abs(mean - M) < 0.05
    assert end.mean().item() == pytest.approx(mean, abs=4 * fresh / math.sqrt(SAMPLES))
    assert end.std().item() == pytest.approx(fresh, abs=4 * fresh / math.sqrt(2 * SAMPLES))
    # Finer steps give a smaller spread.
    fine = linear_end(prior, falling(400)[0], [(1.0, M, S)])[2]
    assert fine < 0.6 * fresh


def test_sds_picks_modes() -> None:
    """Every particle converges to one of the two modes, both are found, and there is almost no spread around a mode."""
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
    """With s_c < s_u the precision is 1 / D_u + gamma (1 / D_c - 1 / D_u) > 1 / D_c: samples at scale 3 have a smaller
    spread than the conditional data, as the recursion predicts."""
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
    """With fixed noise per particle the same loop is DDIM, a map of slope s from noise to data (proposition 1)."""
    prior = gaussian()
    timesteps, options = falling(60)
    guidance = method("fsd", prior, weighting="uniform", noise_field="constant", **options)
    end = anneal(guidance, 0.0 * normal(), timesteps, between(prior, "thing"))
    mean, kept, _ = linear_end(prior, timesteps, [(1.0, M, S)])
    assert kept == pytest.approx(S, abs=0.03) and mean == pytest.approx(M, abs=0.03)
    assert end.std().item() == pytest.approx(kept, abs=4 * ERROR)
    assert end.mean().item() == pytest.approx(mean, abs=4 * kept / math.sqrt(SAMPLES))


def test_flow_score_distillation_fills_both_modes() -> None:
    """Half of the particles find each mode (standard error 0.0625 for 64), with the spread of the data around it."""
    prior = mixture(low=(-1.0, 0.2), high=(1.0, 0.2))
    timesteps, options = falling(60)
    guidance = method("fsd", prior, weighting="uniform", noise_field="constant", **options)
    end = anneal(guidance, 0.0 * normal(), timesteps, between(prior, ""))
    mode = end.mean((1, 2, 3)).sign()
    assert abs((mode > 0).double().mean().item() - 0.5) < 4 * 0.0625
    offset = end - mode[:, None, None, None]
    assert offset.std().item() == pytest.approx(0.2, abs=0.02 + 4 * 0.2 / math.sqrt(2 * SAMPLES))


def ddim_end(prior: GaussianMixturePrior, timesteps: list[float]) -> tuple[float, float]:
    """Mean and spread of x0_hat at the last timestep of DDIM from N(0, I).

    With r = x - alpha m, a step is r <- r (alpha_p alpha s^2 + sigma_p sigma) / D.
    """
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
    """With its own grid and window the ODE is coarser than DDIM, so the spread is only close to s; SDS would give 0."""
    prior = gaussian()
    span = {"from": 0.98, "to": 0.02, "end": 60}
    guidance = method(
        "dsd", prior, guidance_scale=1.0, weighting="lambda", t_min=span, t_max=span, ode_steps=20, interval=0.1
    )
    end = descend(guidance, normal(), 80, lambda p: 1.0, between(prior, "thing"))
    assert 0.7 * S < end.std().item() < 1.3 * S
    assert abs(end.mean().item() - M) < 0.1


def test_repeated_inversion_loses_the_seed() -> None:
    """Exact inversion finds kappa = (z - m) (sqrt(D) / s - alpha) / sigma, whose target is m + (alpha s / sqrt(D)) (z -
    m). Every update contracts, so SDI loses diversity (the limit of fine steps is reached up to 3 % here)."""
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

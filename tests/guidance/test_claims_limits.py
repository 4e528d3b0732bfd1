"""Limits in which one method equals another."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from shared.gaussian_data import (
    default_conditions,
    variational,
)
from shared.method_cases import FLOW_KINDS, CountingPrior, gradient, latents, method

TIMESTEP = {"t_min": 0.4, "t_max": 0.4}
LIMITS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "fsd": ({"sqrt_beta": 0.0, "weighting": "sds"}, {}),
    # One timestep for the whole batch.
    "sdi": ({"kappa": "random", "weighting": "lambda", **TIMESTEP}, {"weighting": "lambda", **TIMESTEP}),
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
"""For each method the options that make it SDS, and the options of that SDS."""


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
        g = gradient(guidance, latents(3), step, conditions=default_conditions(guidance))
        expected = gradient(same, latents(3), step, conditions=default_conditions(same))
        torch.testing.assert_close(g, expected, rtol=0, atol=1e-11 * expected.abs().max().item())


def test_collaborative_distillation_of_one_item_is_sds() -> None:
    prior = CountingPrior()
    alone, sds = (method(name, prior, guidance_scale=3.0) for name in ("collaborative-sd", "sds"))
    g = [gradient(each, latents(1), 2, conditions=default_conditions(each)) for each in (alone, sds)]
    torch.testing.assert_close(g[0], g[1], rtol=0, atol=1e-12)


@pytest.mark.parametrize(("name", "options"), [("asd", {"gamma": 0.0}), ("esd", {"entropy": 0.0})])
def test_relatives_of_variational_distillation_reduce_to_it(name: str, options: dict[str, Any]) -> None:
    prior = CountingPrior()
    gradients = []
    for each, own in ((name, options), ("vsd", {})):
        guidance, phi = variational(each, prior, guidance_scale=3.0, **own)
        phi.z = latents(3)
        gradients.append(gradient(guidance, latents(3), 1, conditions=default_conditions(guidance)))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=1e-12)


def test_noise_free_distillation_without_a_negative_prompt_is_a_classifier() -> None:
    """Above the threshold timestep e_0 - e_n vanishes, and G is gamma (e_y - e_0)."""
    prior = CountingPrior()
    nfsd = method("nfsd", prior, guidance_scale=3.0, negative_prompt="", t_min=0.3)
    classifier = method("csd", prior, c_y=3.0, c_0=-3.0, t_min=0.3)
    g = [gradient(each, latents(2), 1, conditions=default_conditions(each)) for each in (nfsd, classifier)]
    torch.testing.assert_close(g[0], g[1], rtol=0, atol=1e-11)


def test_the_gradient_of_dsd_in_an_empty_window() -> None:
    """At u = t both predictions coincide: G is 0 with equal scales, and w (gamma - gamma_sub) (e_y - e_0) otherwise."""
    prior = CountingPrior()
    options = {"guidance_scale": 3.0, "t_min": 0.5, "t_max": 0.5}
    g = {
        sub: gradient(guidance, latents(2), conditions=default_conditions(guidance))
        for sub in (3.0, 2.0, 1.0)
        for guidance in [method("dsd", prior, sub_guidance_scale=sub, **options)]
    }
    assert g[3.0].abs().max() < 1e-12 < 1e-3 < g[1.0].abs().max()
    torch.testing.assert_close(g[1.0], 2.0 * g[2.0], rtol=0, atol=1e-12)


def test_trajectory_matching_at_its_end_is_a_classifier() -> None:
    """TSM with gamma 0 compares two predictions at the same point: lambda g (e_y - e_0), linear in g."""
    prior = CountingPrior()
    g = {
        scale: gradient(guidance, latents(2), conditions=default_conditions(guidance))
        for scale in (0.0, 1.0, 3.0)
        for guidance in [method("ism", prior, guidance_scale=scale, tsm_gamma=0.0, t_min=0.5, t_max=0.5)]
    }
    assert g[0.0].abs().max() < 1e-11 < 1e-3 < g[1.0].abs().max()
    torch.testing.assert_close(g[3.0], 3.0 * g[1.0], rtol=0, atol=1e-10)

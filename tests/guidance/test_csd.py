"""Classifier score distillation: coefficients that give SDS, the pure form and the form of the paper."""

from __future__ import annotations

import pytest
import torch
from shared.method_cases import CountingPrior, gradient, latents, method, prompted, views

from scoredist3d.guidance.core.context import item_noise
from scoredist3d.priors import CFGConditions, predict_each
from scoredist3d.seeding import Rng


def conditions(prior) -> CFGConditions:
    """CFG conditions with different prompt, negative prompt and empty prompt."""
    return CFGConditions(prior.embed(["red"]), prior.embed(["blue"]), empty=prior.embed([""]))


def parts(guidance, z, step=0):
    """w, the predictions under the prompt, the negative and the empty prompt, and the noise."""
    t = torch.tensor(guidance.sample_timesteps(len(z), step, Rng()), dtype=torch.float64)
    eps = item_noise(Rng(), "noise", step, z)
    x_t = guidance.schedule.add_noise(z, eps, t)
    b = conditions(guidance.prior)
    predictions = predict_each(guidance.prior, x_t, t, [b.positive, b.unconditional, b.empty])
    return guidance.schedule.sigma(t)[:, None, None, None] ** 2, *(p.eps for p in predictions), eps


def test_the_default_is_the_pure_classifier_score() -> None:
    guidance = method("csd", CountingPrior())
    z = latents(3)
    w, e_y, _, e_0, _ = parts(guidance, z)
    found = gradient(guidance, z, conditions=conditions(guidance.prior))
    torch.testing.assert_close(found, w * (e_y - e_0), rtol=0, atol=1e-13)


def test_every_coefficient_belongs_to_its_prediction_and_follows_its_schedule() -> None:
    options = {"c_y": [0, 0.0, 4.0, 10], "c_n": -0.7, "c_0": [0, -1.0, 0.0, 10], "c_eps": 0.3}
    guidance = method("csd", CountingPrior(), **options)
    z = latents(2)
    for step, (c_y, c_0) in ((0, (0.0, -1.0)), (5, (2.0, -0.5)), (20, (4.0, 0.0))):
        w, e_y, e_n, e_0, eps = parts(guidance, z, step)
        expected = w * (c_y * e_y - 0.7 * e_n + c_0 * e_0 + 0.3 * eps)
        found = gradient(guidance, z, step, conditions=conditions(guidance.prior))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_the_papers_form_in_terms_of_two_weights() -> None:
    w1, w2 = 1.0, 0.5
    guidance = method("csd", CountingPrior(), c_y=w1, c_n=-w2, c_0=w2 - w1)
    z = latents(2)
    w, e_y, e_n, e_0, _ = parts(guidance, z)
    expected = w * (w1 * (e_y - e_0) + w2 * (e_0 - e_n))
    torch.testing.assert_close(
        gradient(guidance, z, conditions=conditions(guidance.prior)), expected, rtol=0, atol=1e-13
    )


@pytest.mark.parametrize("perp_neg", [False, True], ids=["plain", "perp-neg"])
@pytest.mark.parametrize("gamma", [7.5, 100.0])
def test_sds_is_a_setting_of_the_coefficients(gamma: float, perp_neg: bool) -> None:
    guidance = method("csd", CountingPrior(), c_y=gamma, c_0=1.0 - gamma, c_eps=-1.0, perp_neg_weight=gamma)
    sds = method("sds", guidance.prior, guidance_scale=gamma)
    seen = prompted(guidance, cameras=views(3), perp_neg=perp_neg)
    # The unconditional branch of SDS is the negative prompt; here both are the empty prompt.
    seen = CFGConditions(seen.positive, seen.empty, seen.negatives, empty=seen.empty)
    found = gradient(guidance, latents(3), conditions=seen)
    torch.testing.assert_close(found, gradient(sds, latents(3), conditions=seen), rtol=0, atol=1e-13 * gamma * 10)


def test_only_branches_with_a_coefficient_are_evaluated_in_one_pass() -> None:
    for options, rows in (({}, 2), ({"c_n": -0.5}, 3), ({"c_0": 0.0}, 1), ({"c_y": 0.0, "c_0": 0.0, "c_eps": 1.0}, 0)):
        prior = CountingPrior()
        guidance = method("csd", prior, **options)
        gradient(guidance, latents(2), conditions=conditions(prior))
        assert prior.rows == ([2 * rows] if rows else [])
        assert guidance.nfe(conditions(prior), guidance.begin(latents(2), 0, Rng())).prior == rows


def test_perp_neg_is_added_to_the_sum_and_can_be_switched_off() -> None:
    prior = CountingPrior()
    seen = prompted(method("csd", prior), cameras=views(2), perp_neg=True)
    off, one, three = (
        gradient(method("csd", prior, perp_neg_weight=weight), latents(2), conditions=seen)
        for weight in (0.0, 1.0, 3.0)
    )
    torch.testing.assert_close(three - off, 3.0 * (one - off), rtol=0, atol=1e-12)
    plain = CFGConditions(seen.positive, seen.unconditional, empty=seen.empty)
    torch.testing.assert_close(off, gradient(method("csd", prior), latents(2), conditions=plain))
    # The Perp-Neg term of each item is orthogonal to the direction from the negative prompt to the prompt.
    pure = gradient(method("csd", prior, c_n=-1.0, c_0=0.0, perp_neg_weight=0.0), latents(2), conditions=seen)
    along = ((one - off) * pure).sum((1, 2, 3)) / (one - off).flatten(1).norm(dim=1) / pure.flatten(1).norm(dim=1)
    assert (one - off).abs().max() > 1e-3 and along.abs().max() < 1e-9


@pytest.mark.parametrize("coefficients", [(1.0, 0.0, -1.0), (1.0, -0.5, -0.5), (1.0, -1.0, 0.0), (0.0, 0.0, 0.0)])
def test_perp_neg_is_relative_to_the_negative_prompt(coefficients: tuple[float, float, float]) -> None:
    prior = CountingPrior()
    c_y, c_n, c_0 = coefficients
    guidance = method("csd", prior, c_y=c_y, c_n=c_n, c_0=c_0, perp_neg_weight=3.0)
    z, b = latents(2), conditions(prior)
    weights = [torch.tensor([-0.9, -0.3], dtype=torch.float64), torch.tensor([-1.4, 0.0], dtype=torch.float64)]
    texts = [prior.embed(["green"]), prior.embed(["yellow left"])]
    seen = CFGConditions(b.positive, b.unconditional, tuple(zip(texts, weights, strict=True)), empty=b.empty)
    w, e_y, e_n, e_0, eps = parts(guidance, z)
    t = torch.tensor(guidance.sample_timesteps(2, 0, Rng()), dtype=torch.float64)
    others = predict_each(prior, guidance.schedule.add_noise(z, eps, t), t, texts)
    expected = c_y * e_y + c_n * e_n + c_0 * e_0
    for other, weight in zip(others, weights, strict=True):
        for item in range(2):
            a, d = (other.eps - e_n)[item], (e_y - e_n)[item]
            expected[item] += 3.0 * weight[item] * (a - (a * d).sum() / (d * d).sum() * d)
    prior.rows.clear()
    found = gradient(guidance, z, conditions=seen)
    torch.testing.assert_close(found, w * expected, rtol=0, atol=1e-12)
    rows = 4 + (c_0 != 0.0)  # prompt, negative prompt and Perp-Neg's two, whatever their coefficients
    assert prior.rows == [2 * rows] and guidance.nfe(seen, guidance.begin(z, 0, Rng())).prior == rows


def test_without_a_negative_prompt_the_negative_branch_is_the_empty_one() -> None:
    prior = CountingPrior()
    bare = CFGConditions(prior.embed(["red"]), prior.embed([""]))
    both = gradient(method("csd", prior, c_n=-0.5, c_0=-0.5), latents(2), conditions=bare)
    torch.testing.assert_close(both, gradient(method("csd", prior), latents(2), conditions=bare), rtol=0, atol=1e-13)

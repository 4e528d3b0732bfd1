"""Classifier-free guidance, Perp-Neg and rescaling with exact denoisers in float64."""

import pytest
import torch

from scoredist3d.diffusion.cfg import perpendicular
from scoredist3d.diffusion.schedule import FlowSchedule, VPSchedule
from scoredist3d.priors import CFGConditions, guided_prediction, predict_each
from scoredist3d.priors.analytic import GaussianMixturePrior

KINDS = ["epsilon", "sample", "v_prediction", "flow"]


def blobs(parametrization: str = "epsilon", **options) -> GaussianMixturePrior:
    config = GaussianMixturePrior.Config(image_size=8, std=0.5, parametrization=parametrization, **options)
    return GaussianMixturePrior(config)


def state(batch: int = 3, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 3, 8, 8, generator=generator, dtype=torch.float64)
    return x, torch.tensor([0.3, 0.6, 0.9], dtype=torch.float64)[:batch]


def conditions(prior: GaussianMixturePrior, negatives: bool = False) -> CFGConditions:
    others = ()
    if negatives:
        weights = torch.tensor([-0.5, -1.0, 0.0], dtype=torch.float64)
        others = ((prior.embed(["blue"]), weights), (prior.embed(["left"]), 0.3 * weights))
    return CFGConditions(prior.embed(["red"]), prior.embed([""]), others)


def test_scales_zero_and_one_are_the_single_conditions():
    prior = blobs()
    x, t = state()
    b = conditions(prior)
    positive, unconditional = predict_each(prior, x, t, [b.positive, b.unconditional])
    # Evaluated alone and in a batch of both: equal up to rounding.
    for scale, branch in ((1.0, positive), (0.0, unconditional)):
        torch.testing.assert_close(guided_prediction(prior, x, t, b, scale).output, branch.output, rtol=0, atol=1e-12)
    assert not torch.allclose(positive.output, unconditional.output)


def test_guidance_is_affine_in_the_scale_by_the_diffusers_formula():
    prior = blobs()
    x, t = state()
    b = conditions(prior)
    eps_c, eps_u = (p.eps for p in predict_each(prior, x, t, [b.positive, b.unconditional]))
    for scale in (-7.5, 2.0, 7.5, 100.0):
        expected = eps_u + scale * (eps_c - eps_u)
        torch.testing.assert_close(
            guided_prediction(prior, x, t, b, scale).eps, expected, rtol=0, atol=1e-12 * abs(scale)
        )


@pytest.mark.parametrize("kind", ["sample", "v_prediction"])
@pytest.mark.parametrize("negatives", [False, True])
@pytest.mark.parametrize("rescale", [0.0, 0.5])
def test_every_parametrisation_gives_the_same_guided_noise(kind, negatives, rescale):
    x, t = state()
    results = []
    for parametrization in ("epsilon", kind):
        prior = blobs(parametrization)
        results.append(guided_prediction(prior, x, t, conditions(prior, negatives), 7.5, rescale=rescale))
    torch.testing.assert_close(results[0].eps, results[1].eps, rtol=0, atol=1e-10)
    torch.testing.assert_close(results[0].x0, results[1].x0, rtol=0, atol=1e-10)
    torch.testing.assert_close(results[0].v, results[1].v, rtol=0, atol=1e-10)


def test_flow_and_variance_preserving_predictions_agree_at_equal_noise_to_signal():
    # At equal lambda the two x_t differ by a factor only, so both models have the same prediction of x_0 and eps.
    vp = GaussianMixturePrior(GaussianMixturePrior.Config(image_size=8), schedule=VPSchedule.stable_diffusion())
    flow = GaussianMixturePrior(
        GaussianMixturePrior.Config(image_size=8, parametrization="flow"), schedule=FlowSchedule()
    )
    t = torch.tensor([0.3, 0.6, 0.9], dtype=torch.float64)
    ratio = vp.schedule.lambda_(t)
    s = ratio / (1 + ratio)
    clean, noise = state()[0], state(seed=1)[0]
    ours = vp.predict(vp.schedule.add_noise(clean, noise, t), t, vp.embed(["red"] * 3))
    theirs = flow.predict(flow.schedule.add_noise(clean, noise, s), s, flow.embed(["red"] * 3))
    torch.testing.assert_close(ours.x0, theirs.x0, rtol=0, atol=1e-11)
    torch.testing.assert_close(ours.eps, theirs.eps, rtol=0, atol=1e-11)
    torch.testing.assert_close(theirs.v, theirs.eps - theirs.x0, rtol=0, atol=1e-11)


def test_perp_neg_matches_the_formula():
    prior = blobs()
    x, t = state()
    b = conditions(prior, negatives=True)
    conditionings = [b.positive, b.unconditional, *(c for c, _ in b.negatives)]
    e_pos, e_u, e_1, e_2 = (p.eps for p in predict_each(prior, x, t, conditionings))
    direction = e_pos - e_u
    expected = direction.clone()
    for item in range(3):
        for e_neg, (_, weights) in zip((e_1, e_2), b.negatives, strict=True):
            a, d = (e_neg - e_u)[item], direction[item]
            expected[item] += weights[item] * (a - (a * d).sum() / (d * d).sum() * d)
    torch.testing.assert_close(guided_prediction(prior, x, t, b, 7.5).eps, e_u + 7.5 * expected, rtol=0, atol=1e-11)


def test_perp_neg_with_zero_weights_is_plain_guidance_and_acts_at_scale_one():
    prior = blobs()
    x, t = state()
    plain, full = conditions(prior), conditions(prior, negatives=True)
    silent = CFGConditions(plain.positive, plain.unconditional, tuple((c, 0.0 * w) for c, w in full.negatives))
    for scale in (1.0, 7.5):
        expected = guided_prediction(prior, x, t, plain, scale).eps
        torch.testing.assert_close(guided_prediction(prior, x, t, silent, scale).eps, expected, rtol=0, atol=1e-12)
        assert not torch.allclose(guided_prediction(prior, x, t, full, scale).eps[:2], expected[:2])


def test_perpendicular_is_orthogonal_and_safe_for_zero():
    a, b = state()[0], state(seed=1)[0]
    away = perpendicular(a, b)
    assert (away * b).sum((1, 2, 3)).abs().max() < 1e-11
    torch.testing.assert_close(perpendicular(away, b), away, rtol=0, atol=1e-12)
    assert torch.equal(perpendicular(a, torch.zeros_like(b)), a)


def test_rescale_restores_the_conditional_contrast():
    prior = blobs()
    x, t = state()
    b = conditions(prior)
    conditional = guided_prediction(prior, x, t, b, 1.0).x0.flatten(1).std(1)
    raw = guided_prediction(prior, x, t, b, 50.0).x0
    full = guided_prediction(prior, x, t, b, 50.0, rescale=1.0).x0
    half = guided_prediction(prior, x, t, b, 50.0, rescale=0.5).x0
    torch.testing.assert_close(full.flatten(1).std(1), conditional, rtol=1e-10, atol=0)
    torch.testing.assert_close(half, 0.5 * (raw + full), rtol=0, atol=1e-10)
    # Views that are denoised jointly share one factor.
    prior.views = 3
    joint = guided_prediction(prior, x, t, b, 50.0, rescale=1.0).x0
    torch.testing.assert_close(joint.std(), guided_prediction(prior, x, t, b, 1.0).x0.std(), rtol=1e-10, atol=0)

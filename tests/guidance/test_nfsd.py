"""NFSD on both sides of its threshold, and its relations to the classifier score and to SDS."""

from __future__ import annotations

import logging

import torch
from shared.method_cases import CountingPrior, gradient, latents, method, prompted, views

from scoredist3d.guidance.core.context import item_noise
from scoredist3d.priors import CFGConditions, predict_each
from scoredist3d.seeding import Rng


def at(timestep: float, **options):
    options = {"negative_prompt": "yellow"} | options
    return method("nfsd", CountingPrior(), t_min=timestep, t_max=timestep, **options)


def parts(guidance, z):
    """w, the predictions under the prompt, the empty and the method's negative prompt, and the noise."""
    t = torch.tensor(guidance.sample_timesteps(len(z), 0, Rng()), dtype=torch.float64)
    eps = item_noise(Rng(), "noise", 0, z)
    texts = [guidance.prior.embed([text]) for text in ("red", "", "yellow")]
    predictions = predict_each(guidance.prior, guidance.schedule.add_noise(z, eps, t), t, texts)
    return guidance.schedule.sigma(t)[:, None, None, None] ** 2, *(p.eps for p in predictions), eps


def test_the_two_sides_of_the_threshold() -> None:
    z = latents(3)
    for timestep in (0.05, 0.199):
        guidance = at(timestep)
        w, e_y, e_0, _, _ = parts(guidance, z)
        torch.testing.assert_close(gradient(guidance, z), w * (e_0 + 7.5 * (e_y - e_0)), rtol=0, atol=1e-12)
    for timestep in (0.2, 0.7):
        guidance = at(timestep)
        w, e_y, e_0, e_n, _ = parts(guidance, z)
        torch.testing.assert_close(gradient(guidance, z), w * (e_0 - e_n + 7.5 * (e_y - e_0)), rtol=0, atol=1e-12)


def test_the_gradient_jumps_at_the_threshold_by_the_negative_prediction() -> None:
    z = latents(2)
    above, below = at(0.2), at(0.2, threshold=0.201)
    w, _, _, e_n, _ = parts(above, z)
    torch.testing.assert_close(gradient(below, z) - gradient(above, z), w * e_n, rtol=0, atol=1e-12)
    assert (w * e_n).abs().max() > 0.01


def test_a_batch_may_straddle_the_threshold() -> None:
    guidance = method("nfsd", CountingPrior(), negative_prompt="yellow", t_min=0.1, t_max=0.3)
    step = next(
        s for s in range(99) if len({timestep >= 0.2 for timestep in guidance.sample_timesteps(2, s, Rng())}) == 2
    )
    z = latents(2)
    together = gradient(guidance, z, step)
    for item, timestep in enumerate(guidance.sample_timesteps(2, step, Rng())):
        alone = at(timestep)
        alone_step = alone.begin(z, step, Rng())
        conditions = prompted(alone)
        torch.testing.assert_close(
            together[item], alone.score_gradient(z, conditions, alone_step).gradient[item], rtol=0, atol=1e-12
        )


def test_an_empty_negative_prompt_makes_the_classifier_score_above_the_threshold() -> None:
    z = latents(2)
    for timestep, equal in ((0.2, True), (0.6, True), (0.1, False)):
        guidance = at(timestep, negative_prompt="")
        classifier = method("csd", CountingPrior(), t_min=timestep, t_max=timestep)
        wanted = 7.5 * gradient(classifier, z, conditions=prompted(classifier))
        close = torch.allclose(gradient(guidance, z), wanted, rtol=0, atol=1e-12)
        assert close == equal


def test_below_the_threshold_it_is_sds_without_the_injected_noise() -> None:
    z = latents(2)
    guidance = at(0.1)
    w, *_, eps = parts(guidance, z)
    sds = method("sds", CountingPrior(), guidance_scale=7.5, t_min=0.1, t_max=0.1)
    empty = CFGConditions(sds.prior.embed(["red"]), sds.prior.embed([""]))
    torch.testing.assert_close(gradient(guidance, z), gradient(sds, z, conditions=empty) + w * eps, rtol=0, atol=1e-11)


def test_whose_negative_prompt() -> None:
    z = latents(2)
    own, run = at(0.5), at(0.5, negative_prompt=None)
    assert (
        own.extra_prompts("red")["undesired"].text == "yellow" and not own.extra_prompts("red")["undesired"].view_words
    )
    assert run.extra_prompts("red") == {}
    blue = at(0.5, negative_prompt="blue")  # the negative prompt of the run in these tests
    torch.testing.assert_close(gradient(run, z), gradient(blue, z), rtol=0, atol=1e-13)
    assert not torch.allclose(gradient(own, z), gradient(run, z))


def test_the_papers_words_are_the_default_and_a_prior_that_does_not_know_them_is_named(caplog) -> None:
    caplog.set_level(logging.WARNING)
    words = "unrealistic, blurry, low quality, out of focus, ugly, low contrast, dull, dark, low-resolution, gloomy"
    guidance = at(0.5, negative_prompt=words)
    assert guidance.extra_prompts("red")["undesired"].text == words == type(guidance).Config().negative_prompt
    (message,) = {record.getMessage() for record in caplog.records}
    assert message.startswith("guidance.negative_prompt: the prior was not trained on 'unrealistic', 'blurry', 'low'")


def test_nfe_depends_on_the_timesteps_and_the_scale() -> None:
    for timestep, scale, perp_neg, rows in (
        (0.1, 7.5, False, 2),
        (0.1, 0.0, False, 1),
        (0.5, 7.5, False, 3),
        (0.5, 0.0, True, 2),
        (0.5, 7.5, True, 5),
    ):
        guidance = at(timestep, guidance_scale=scale)
        conditions = prompted(guidance, cameras=views(2), perp_neg=perp_neg)
        gradient(guidance, latents(2), conditions=conditions)
        assert guidance.prior.rows == [2 * rows]
        assert guidance.nfe(conditions, guidance.begin(latents(2), 0, Rng())).prior == rows


def test_perp_neg_is_that_of_guided_prediction() -> None:
    guidance = at(0.1)
    seen = prompted(guidance, cameras=views(2), perp_neg=True)
    empty = CFGConditions(seen.positive, seen.empty, seen.negatives, empty=seen.empty)
    sds = method("sds", CountingPrior(), guidance_scale=7.5, t_min=0.1, t_max=0.1)
    w, *_, eps = parts(guidance, latents(2))
    wanted = gradient(sds, latents(2), conditions=empty) + w * eps
    torch.testing.assert_close(gradient(guidance, latents(2), conditions=seen), wanted, rtol=0, atol=1e-11)

"""Both stages of SDS-Bridge and its full path against SDS, the classifier score and Gaussian closed forms."""

from __future__ import annotations

import logging
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from shared.method_cases import CountingPrior, NoiseKnowingPrior, gradient, latents, method, prompted, views

from scoredist3d import registry
from scoredist3d.config import ConfigError
from scoredist3d.config.loader import load
from scoredist3d.config.validation import parse_component
from scoredist3d.guidance.core.context import item_noise
from scoredist3d.priors import CFGConditions
from scoredist3d.priors.analytic import GaussianMixturePrior, Mixture
from scoredist3d.prompts.processor import ExtraPrompt
from scoredist3d.seeding import Rng

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
STAGE_TWO = {"stage_two_start_step": 0, "target_modifier": "", "stage_two_weight": 3.0}
M_SOURCE, M_TARGET, STD = 0.4, -0.3, 0.6


def two_gaussians(std_source: float = STD, std_target: float = STD) -> GaussianMixturePrior:
    """Prior with one N(m, s^2) per element under "source" and another one under "target"."""
    mixture = Mixture(
        torch.tensor([M_SOURCE, M_TARGET], dtype=torch.float64).view(2, 1, 1, 1).expand(2, 1, 2, 2),
        torch.tensor([std_source, std_target], dtype=torch.float64).view(2, 1, 1, 1),
        torch.ones(2),
        (frozenset({"source"}), frozenset({"target"})),
    )
    return GaussianMixturePrior(GaussianMixturePrior.Config(), mixture=mixture)


def between(prior: GaussianMixturePrior, source: str = "source", target: str = "target") -> CFGConditions:
    extra = {"source": prior.embed([source])}
    return CFGConditions(prior.embed([target]), prior.embed([""]), extra=extra)


def small(seed: int = 1) -> torch.Tensor:
    return torch.randn(3, 1, 2, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def coefficients(guidance, like, step=0, rng=None):
    """alpha and sigma of the step, in a shape that broadcasts, and its noise."""
    rng = rng or Rng()
    t = torch.tensor(guidance.sample_timesteps(len(like), step, rng), dtype=torch.float64)
    alpha, sigma = (c[:, None, None, None] for c in guidance.schedule.coefficients(t))
    return alpha, sigma, item_noise(rng, "noise", step, like)


def test_equal_texts_give_exactly_zero() -> None:
    guidance = method("bridge", CountingPrior(), **STAGE_TWO, source_prompt="red")
    # Both predictions are items of one batch, so their difference is zero up to rounding.
    assert gradient(guidance, latents(3)).abs().max() < 1e-11


def test_an_empty_source_is_the_classifier_score_and_the_missing_part_of_sds() -> None:
    z = latents(3)
    options = {"stage_two_weighting": "sds", "source_prompt": ""}
    bridge = gradient(method("bridge", CountingPrior(), **STAGE_TWO | options), z)
    plain = method("sds", CountingPrior(), guidance_scale=3.0)
    empty = CFGConditions(plain.prior.embed(["red"]), plain.prior.embed([""]))
    classifier = gradient(method("csd", CountingPrior()), z, conditions=empty)
    torch.testing.assert_close(bridge, 3.0 * classifier, rtol=0, atol=1e-12)
    unconditional = gradient(method("sds", CountingPrior(), guidance_scale=0.0), z, conditions=empty)
    torch.testing.assert_close(gradient(plain, z, conditions=empty), bridge + unconditional, rtol=0, atol=1e-11)


def test_swapping_the_texts_flips_the_sign_and_the_weight_is_linear() -> None:
    z = latents(2)
    prior = CountingPrior()
    there = method("bridge", prior, **STAGE_TWO)
    ahead = gradient(there, z, conditions=between(prior, "green", "red"))
    back = gradient(there, z, conditions=between(prior, "red", "green"))
    torch.testing.assert_close(ahead, -back, rtol=0, atol=1e-13)
    half = method("bridge", prior, **STAGE_TWO | {"stage_two_weight": 1.5})
    torch.testing.assert_close(
        gradient(half, z, conditions=between(prior, "green", "red")), ahead / 2, rtol=1e-12, atol=0
    )
    assert ahead.abs().max() > 0.01


def test_stage_one_is_sds_and_the_stage_depends_on_the_step_alone() -> None:
    options = {"guidance_scale": 7.5, "source_prompt": "green", "target_modifier": "", "stage_two_weight": 2.0}
    bridge = method("bridge", CountingPrior(), stage_two_start_step=5, **options)
    sds = method("sds", CountingPrior(), guidance_scale=7.5)
    z = latents(2)
    run = [gradient(bridge, z, step) for step in range(8)]
    for step in range(5):
        torch.testing.assert_close(run[step], gradient(sds, z, step), rtol=0, atol=1e-11)
    resumed = method("bridge", CountingPrior(), stage_two_start_step=5, **options)
    always = method("bridge", CountingPrior(), stage_two_start_step=0, **options)
    for step in (7, 5, 6):
        assert torch.equal(gradient(resumed, z, step), run[step])
        assert torch.equal(gradient(always, z, step), run[step])
        assert not torch.allclose(gradient(sds, z, step), run[step])


def test_equal_spreads_drift_at_a_constant_rate_whatever_the_image_and_the_noise() -> None:
    guidance = method("bridge", two_gaussians(), **STAGE_TWO, t_min=0.4, t_max=0.4)
    alpha, sigma, _ = coefficients(guidance, small())
    drift = 3.0 * alpha * sigma * (M_SOURCE - M_TARGET) / (alpha**2 * STD**2 + sigma**2)
    for seed, step in ((1, 0), (2, 7)):
        found = gradient(guidance, small(seed), step, conditions=between(guidance.prior))
        torch.testing.assert_close(found, drift.expand_as(found), rtol=0, atol=1e-13)


def test_unequal_spreads_attract_only_towards_a_narrower_target() -> None:
    for s_source, s_target in ((0.6, 0.2), (0.2, 0.6)):
        guidance = method("bridge", two_gaussians(s_source, s_target), **STAGE_TWO, t_min=0.3, t_max=0.3)
        z = small()
        alpha, sigma, eps = coefficients(guidance, z)
        d_source, d_target = (alpha**2 * s**2 + sigma**2 for s in (s_source, s_target))
        x_t = alpha * z + sigma * eps
        expected = 3.0 * sigma * ((x_t - alpha * M_TARGET) / d_target - (x_t - alpha * M_SOURCE) / d_source)
        found = gradient(guidance, z, conditions=between(guidance.prior))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
        further = gradient(guidance, z + 1.0, conditions=between(guidance.prior))
        assert bool((further > found).all()) == (s_target < s_source)


def test_a_source_that_answers_the_injected_noise_makes_sds_with_scale_one() -> None:
    z = latents(2)
    bridge = gradient(method("bridge", NoiseKnowingPrior(), **STAGE_TWO, source_prompt="green"), z)
    sds = gradient(method("sds", CountingPrior(), guidance_scale=1.0, weighting="uniform"), z)
    torch.testing.assert_close(bridge, 3.0 * sds, rtol=0, atol=1e-12)


def full(prior, **options):
    return method("bridge", prior, **STAGE_TWO | {"stage_two_weight": 1.0, "path": "full"} | options)


def test_the_full_path_moves_a_gaussian_onto_the_other() -> None:
    """The ODE of N(m, s^2) keeps (x - alpha m) / sqrt(alpha^2 s^2 + sigma^2), and descent converges to its end."""
    guidance = full(two_gaussians(0.6, 0.3), t_min=0.8, t_max=0.8, path_steps=400)
    z = small()
    alpha, sigma, _ = coefficients(guidance, z)
    d_source, d_target = (alpha**2 * s**2 + sigma**2 for s in (0.6, 0.3))
    noisy = alpha * M_SOURCE + (d_source.sqrt() / 0.6) * (z - M_SOURCE)
    end = M_TARGET + 0.3 * (noisy - alpha * M_TARGET) / d_target.sqrt()
    found = gradient(guidance, z, conditions=between(guidance.prior))
    # First-order steps whose error is 0.13 of the way with 50 of them: about an eighth of that with 400.
    assert (z - found - end).abs().max() < 0.03 * (z - end).abs().max()


def test_the_full_path_between_equal_texts_is_the_identity_up_to_the_solvers_order() -> None:
    errors = []
    for steps in (50, 100, 200):
        guidance = full(two_gaussians(), t_min=0.8, t_max=0.8, path_steps=steps)
        errors.append(gradient(guidance, small(), conditions=between(guidance.prior, "target")).abs().max().item())
    # First order: the error halves with the step.
    for coarse, fine in pairwise(errors):
        assert 1.6 < coarse / fine < 2.4
    assert errors[-1] < 0.05


def test_one_jump_each_way_from_a_shared_point_is_the_one_step_form() -> None:
    prior = two_gaussians(0.6, 0.3)
    t = torch.full((3,), 0.4, dtype=torch.float64)
    x_t = small()
    source, target = (prior.predict(x_t, t, prior.embed([text]).expand(3)) for text in ("source", "target"))
    ratio = prior.schedule.lambda_(t)[:, None, None, None]
    torch.testing.assert_close(source.x0 - target.x0, ratio * (target.eps - source.eps), rtol=0, atol=1e-12)
    guidance = full(prior, t_min=0.4, t_max=0.4, path_steps=1)
    z = small(2)
    alpha, sigma, _ = coefficients(guidance, z)
    up = alpha * z + sigma * prior.predict(alpha * z, t, prior.embed(["source"]).expand(3)).eps
    end = prior.predict(up, t, prior.embed(["target"]).expand(3)).x0
    torch.testing.assert_close(gradient(guidance, z, conditions=between(prior)), z - end, rtol=0, atol=1e-13)


def test_items_at_several_timesteps_follow_the_full_path_independently() -> None:
    guidance = full(CountingPrior(), source_prompt="green", path_steps=4)
    z = latents(3)
    together = gradient(guidance, z, conditions=prompted(guidance, cameras=views(3)))
    alone = gradient(guidance, z[:1], conditions=prompted(guidance, cameras=views(1)))
    torch.testing.assert_close(together[:1], alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "rows"),
    [({"stage_two_start_step": 1}, [2, 2]), ({}, [2, 2]), ({"path": "full", "path_steps": 4}, [8] * 8)],
    ids=["stage one", "one step", "full path"],
)
def test_nfe(options, rows) -> None:
    prior = CountingPrior()
    options = {"guidance_scale": 7.5, "source_prompt": "green"} | options
    guidance = method("bridge", prior, **STAGE_TWO | options, t_min=0.5, t_max=0.5)
    conditions = prompted(guidance)
    gradient(guidance, latents(1), conditions=conditions)
    assert sum(prior.rows) == guidance.nfe(conditions, guidance.begin(latents(1), 0, Rng())).prior == rows[0]
    if rows[0] == 8:
        assert prior.rows == [1] * 8


def test_texts() -> None:
    def texts(**options) -> dict[str, ExtraPrompt]:
        config = parse_component("guidance", {"type": "bridge"} | options)
        return registry.build(config, prior=CountingPrior()).extra_prompts("a red blob")

    assert texts()["target"].text == "a red blob, ."
    assert texts()["source"].text.startswith("a red blob, oversaturated, smooth, pixelated")
    assert texts(source_modifier=", red", source_modifier_only=True)["source"] == ExtraPrompt("red")
    assert texts(target_modifier="", source_prompt="green") == {"source": ExtraPrompt("green")}
    with pytest.raises(ConfigError, match="source_modifier_only: has no effect with source_prompt"):
        parse_component("guidance", {"type": "bridge", "source_prompt": "green", "source_modifier_only": True})


RELEASED_SOURCE = (
    "oversaturated, smooth, pixelated, cartoon, foggy, hazy, blurry, bad structure, noisy, malformed"  # src_modifier
)


@pytest.mark.parametrize(("step", "t_max"), [(0, 0.98), (4999, 0.98), (5001, 0.5), (24999, 0.5)])
def test_the_fragment_holds_the_settings_released_for_radiance_fields(step, t_max) -> None:
    config = parse_component("guidance", load([CONFIGS / "guidance" / "bridge.yaml"])["system"]["guidance"])
    assert (config.t_min(step), config.t_max(step)) == (0.02, t_max)
    assert (config.guidance_scale(step), config.weighting, config.stage_two_start_step) == (100.0, "sds", 20000)
    assert (config.stage_two_weight(step), config.stage_two_weighting, config.path) == (1.0, "uniform", "one-step")
    assert (config.weight(step), config.guidance_rescale, config.grad_clip) == (1.0, 0.0, None)
    texts = registry.build(config, prior=CountingPrior()).extra_prompts("a hamburger")
    # The released prompt processor joins the prompt and either modifier by ", ".
    assert texts["source"].text == ", ".join(["a hamburger", RELEASED_SOURCE])
    assert texts["target"].text == ", ".join(["a hamburger", "."])


def test_the_recipe_of_the_embedded_prior_keeps_its_decreasing_timesteps() -> None:
    recipe = load([CONFIGS / "text-to-3d" / "bridge.yaml"], ["prompt=a mug"])
    t_max = parse_component("guidance", recipe["system"]["guidance"]).t_max
    assert [t_max(step) for step in (0, 160, 320)] == pytest.approx([0.98, 0.665, 0.35])


def test_the_target_modifier_joins_both_stages_and_view_words_follow_it() -> None:
    for start in (0, 5):
        guidance = method(
            "bridge", CountingPrior(), stage_two_start_step=start, target_modifier=" left", source_prompt="green"
        )
        conditions = prompted(guidance)
        left = CFGConditions(guidance.prior.embed(["red left"]), conditions.unconditional, extra=conditions.extra)
        plain = method("bridge", CountingPrior(), stage_two_start_step=start, target_modifier="", source_prompt="green")
        z = latents(2)
        expected = gradient(plain, z, conditions=left)
        torch.testing.assert_close(gradient(guidance, z, conditions=conditions), expected, rtol=0, atol=1e-13)
        assert not torch.allclose(gradient(plain, z, conditions=prompted(plain)), expected)


def test_words_that_the_prior_does_not_know_are_named_once_with_what_to_do(caplog) -> None:
    caplog.set_level(logging.WARNING)
    guidance = method("bridge", CountingPrior(), target_modifier="", source_prompt=None)
    guidance.extra_prompts("a red blob")
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith("guidance.source_modifier: the prior was not trained on 'oversaturated', 'smooth'")
    assert message.endswith("set source_prompt or source_modifier to words that the prior was trained on.")
    caplog.clear()
    method("bridge", CountingPrior(), target_modifier="", source_prompt="green blob").extra_prompts("a red blob")
    assert not caplog.records


def test_schedules_of_stage_two_are_in_steps_of_the_run() -> None:
    guidance = method(
        "bridge", CountingPrior(), **STAGE_TWO | {"stage_two_weight": [0, 1.0, 3.0, 10]}, source_prompt="green"
    )
    same = method("bridge", CountingPrior(), **STAGE_TWO | {"stage_two_weight": 2.0}, source_prompt="green")
    assert torch.equal(gradient(guidance, latents(1), 5), gradient(same, latents(1), 5))

"""DDS against its definition and Gaussian closed forms, and for editing images."""

from __future__ import annotations

import pytest
import torch
from shared.method_cases import CountingPrior, NoiseKnowingPrior, PairPrior, gradient, latents, method, prompted, views

from scoredist3d import registry
from scoredist3d.config import Schedule
from scoredist3d.config.optimizer import OptimizerConfig
from scoredist3d.config.validation import parse_component
from scoredist3d.guidance.core.context import item_noise
from scoredist3d.priors import CFGConditions, predict_each
from scoredist3d.priors.analytic import GaussianMixturePrior, Mixture
from scoredist3d.seeding import Rng
from scoredist3d.training.optimizer import build_optimizer, set_learning_rates


def two_gaussians(m_source: float = 0.4, m_target: float = -0.3, std: float = 0.6) -> GaussianMixturePrior:
    mixture = Mixture(
        torch.tensor([m_source, m_target], dtype=torch.float64).view(2, 1, 1, 1).expand(2, 1, 2, 2),
        torch.full((2, 1, 1, 1), std, dtype=torch.float64),
        torch.ones(2),
        (frozenset({"source"}), frozenset({"target"})),
    )
    return GaussianMixturePrior(GaussianMixturePrior.Config(), mixture=mixture)


def between(prior, source: str = "source", target: str = "target") -> CFGConditions:
    return CFGConditions(prior.embed([target]), prior.embed([""]), extra={"source": prior.embed([source])})


def texts(guidance, prompt: str) -> CFGConditions:
    return CFGConditions(guidance.prior.embed([prompt]), guidance.prior.embed([""]))


def test_gradient_is_the_difference_of_guided_predictions_at_equal_noise_and_timestep() -> None:
    prior = CountingPrior()
    guidance = method("dds", prior)
    z, z_source = latents(3), latents(3, seed=6)
    t = torch.tensor(guidance.sample_timesteps(3, 4, Rng()), dtype=torch.float64)
    assert t.min() >= 0.05 and t.max() <= 0.949
    eps = item_noise(Rng(), "noise", 4, z)
    guided = []
    for clean, text in ((z, "red"), (z_source, "green")):
        x_t = prior.schedule.add_noise(clean, eps, t)
        e_y, e_u = (p.eps for p in predict_each(prior, x_t, t, [prior.embed([text]), prior.embed(["blue"])]))
        guided.append(e_u + 7.5 * (e_y - e_u))
    found = gradient(guidance, z, 4, source=z_source)
    torch.testing.assert_close(found, guided[0] - guided[1], rtol=0, atol=1e-11)


@pytest.mark.parametrize("perp_neg", [False, True], ids=["plain", "perp-neg"])
def test_the_source_under_its_own_text_is_at_rest(perp_neg: bool) -> None:
    guidance = method("dds", CountingPrior(), source_prompt="red")
    z = latents(3)
    seen = prompted(guidance, cameras=views(3), perp_neg=perp_neg)
    same = CFGConditions(seen.positive, seen.unconditional, seen.negatives, extra={"source": seen.positive})
    assert gradient(guidance, z, conditions=same, source=z).abs().max() < 1e-13
    assert gradient(guidance, z + 0.1, conditions=same, source=z).abs().max() > 1e-3


def test_it_is_sds_less_the_sds_of_the_source_and_sds_where_the_source_is_perfectly_denoised() -> None:
    z, z_source = latents(2), latents(2, seed=6)
    options = {"guidance_scale": 1.0, "weighting": "sds", "t_min": 0.3, "t_max": 0.6}
    sds = method("sds", CountingPrior(), **options)
    of_edited, of_source = (gradient(sds, x, conditions=texts(sds, y)) for x, y in ((z, "red"), (z_source, "green")))
    dds = method("dds", CountingPrior(), **options)
    torch.testing.assert_close(gradient(dds, z, source=z_source), of_edited - of_source, rtol=0, atol=1e-12)
    perfect = method("dds", NoiseKnowingPrior(), **options)
    torch.testing.assert_close(gradient(perfect, z, source=z_source), of_edited, rtol=0, atol=1e-12)


def test_gaussians_of_one_spread_move_the_source_rigidly_without_any_noise_in_the_gradient() -> None:
    guidance = method("dds", two_gaussians(), guidance_scale=1.0)
    generator = torch.Generator().manual_seed(0)
    z, z_source = (torch.randn(2, 1, 2, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    for step in (0, 5):
        t = torch.tensor(guidance.sample_timesteps(2, step, Rng()), dtype=torch.float64)
        alpha, sigma = (c[:, None, None, None] for c in guidance.schedule.coefficients(t))
        expected = sigma * alpha * ((z - z_source) - (-0.3 - 0.4)) / (alpha**2 * 0.36 + sigma**2)
        found = gradient(guidance, z, step, conditions=between(guidance.prior), source=z_source)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
        arrived = z_source + (-0.3 - 0.4)
        at_rest = gradient(guidance, arrived, step, conditions=between(guidance.prior), source=z_source)
        assert at_rest.abs().max() < 1e-12


def test_one_forward_pass_for_both_sides() -> None:
    for scale, perp_neg, rows in ((7.5, False, 4), (1.0, False, 2), (7.5, True, 8)):
        prior = CountingPrior()
        guidance = method("dds", prior, guidance_scale=scale)
        seen = prompted(guidance, cameras=views(3), perp_neg=perp_neg)
        gradient(guidance, latents(3), conditions=seen)
        assert prior.rows == [3 * rows]
        assert guidance.nfe(seen, guidance.begin(latents(3), 0, Rng())).prior == rows


def test_jointly_denoised_views_stay_pairs_on_both_sides() -> None:
    """The prior rejects a batch that splits a pair of jointly denoised views."""
    guidance = method("dds", PairPrior(), source_prompt="red")
    seen = prompted(guidance, cameras=views(4))
    assert gradient(guidance, latents(4), conditions=seen, source=latents(4)).abs().max() < 1e-13


def test_the_source_is_required() -> None:
    guidance = method("dds", CountingPrior())
    with pytest.raises(ValueError, match="guidance dds edits a source: pass the latents of the source"):
        gradient(guidance, latents(1), source=None)


@pytest.mark.parametrize("name", ["dds", "pds"])
def test_an_edit_changes_the_colour_and_keeps_the_place_and_the_grain(name: str) -> None:
    """Every red disc becomes blue in its place, and the noise of the source around it does not change."""
    scale = {"dds": 2.0, "pds": 5.0}[name]
    source_prompt, prompt = "red left blob", "blue left blob"
    block = {
        "type": "text-to-2d",
        "guidance": {"type": name, "source_prompt": source_prompt, "guidance_scale": scale},
        "geometry": {"particles": 8, "init_prompt": source_prompt, "init_scale": 1.0},
    }
    prior = registry.build(parse_component("prior", {"type": "gaussian-mixture", "image_size": 8}))
    system = registry.build(parse_component("system", block), prior=prior, prompt=prompt, rng=Rng(3))
    before = system.images()
    rates = OptimizerConfig(lr=Schedule.parse({"from": 0.05, "to": 0.005, "end": 120}), eps=1e-8)
    optimizer = build_optimizer(rates, system.parameter_groups())
    for step in range(120):
        set_learning_rates(optimizer, rates, step)
        optimizer.zero_grad()
        system.training_step(step, Rng(3)).loss.backward()
        optimizer.step()
    after = system.images()
    names = list(prior._labels)
    modes = prior.decode(prior._means.float())
    was, became = (
        [names[i] for i in (images[:, None] - modes).square().mean((2, 3, 4)).argmin(1).tolist()]
        for images in (before, after)
    )
    assert set(was) == {frozenset({"red", "left", "blob"})} and set(became) == {frozenset({"blue", "left", "blob"})}
    # The edit reaches the mode, whose standard deviation is 0.05 in RGB. The noise of 0.05 beside the disc is kept.
    assert (after - modes[[names.index(words) for words in became]]).square().mean().sqrt() < 0.1
    still = (modes[:, :, :, 0] - 0.5).abs().amax(0) < 0.01  # pixels that are gray in every mode
    kept = torch.stack([before[:, still].flatten() - 0.5, after[:, still].flatten() - 0.5])
    assert torch.corrcoef(kept)[0, 1] > 0.8

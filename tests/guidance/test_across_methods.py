"""Properties of every registered distillation method, tested with an exact denoiser; new methods are included."""

from __future__ import annotations

import io
import random
from typing import Any

import numpy as np
import pytest
import torch
from shared.method_cases import (
    CASES,
    FLOW_KINDS,
    METHODS,
    VARIANTS,
    VP_KINDS,
    CountingPrior,
    PairPrior,
    case,
    gradient,
    latents,
    method,
    one_timestep,
    prompted,
    views,
)
from torch import Tensor

from scoredist3d import registry
from scoredist3d.config.validation import parse_component
from scoredist3d.guidance import Guidance
from scoredist3d.seeding import Rng

every_method = pytest.mark.parametrize("name", VARIANTS)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("classifier-sd", "csd"),
        ("collaborative-csd", "collaborative-sd"),
        ("delta-denoising", "dds"),
        ("posterior-distillation", "pds"),
    ],
)
def test_earlier_names_select_the_same_method(old: str, new: str) -> None:
    assert registry.lookup("guidance", old) is registry.lookup("guidance", new)
    assert parse_component("guidance", {"type": old}).type == new
    assert old not in METHODS


def test_the_table_names_registered_methods() -> None:
    assert {name.partition("/")[0] for name in CASES} <= set(METHODS)


@every_method
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("kinds", [VP_KINDS, FLOW_KINDS], ids=["vp", "rf"])
def test_the_gradient_does_not_depend_on_what_the_network_predicts(
    name: str, kinds: tuple[str, ...], batch: int, dtype: torch.dtype
) -> None:
    """Conversions between outputs divide by alpha and sigma, both at least 0.02 at t, and by a flow's sigma of 0.001 at
    the start of an inversion. With the scale of 7.5 the rounding error of one prediction is therefore about
    7.5 / 0.001 = 1e4 times 1e-16 or 6e-8; a trajectory has several predictions."""
    tolerance = {torch.float64: 1e-10, torch.float32: 2e-2}[dtype]
    at_step = []
    for kind in kinds:
        guidance = method(name, CountingPrior(kind), guidance_scale=7.5)
        conditions = prompted(guidance, cameras=views(batch))
        z = latents(batch, dtype)
        at_step.append(
            [
                gradient(
                    guidance,
                    z,
                    step,
                    conditions=conditions,
                    opacity=opaque(batch, dtype),
                    depth=3.0 * opaque(batch, dtype),
                )
                for step in (0, 7)
            ]
        )
    for first, *others in zip(*at_step, strict=True):
        assert first.dtype == dtype and first.abs().max() > 0
        for other in others:
            torch.testing.assert_close(other, first, rtol=0, atol=tolerance * first.abs().max().item())


@every_method
@pytest.mark.parametrize("scale", [0.0, 1.0, 7.5])
@pytest.mark.parametrize(
    ("perp_neg", "batch"), [(False, 1), (False, 3), (True, 2)], ids=["plain-1", "plain-3", "perp-neg-2"]
)
def test_network_evaluations_are_the_declared_ones(name: str, scale: float, perp_neg: bool, batch: int) -> None:
    prior = CountingPrior()
    guidance = method(name, prior, guidance_scale=scale, **one_timestep(name))
    conditions = prompted(guidance, cameras=views(batch), perp_neg=perp_neg)
    z, rng = latents(batch), Rng(3)
    for step in (0, 3, 10):
        declared = guidance.nfe(conditions, guidance.begin(z, step, rng, particles=range(batch)))
        prior.rows.clear()
        gradient(guidance, z, step, conditions=conditions, rng=rng)
        spent = sum(prior.rows)
        assert spent == declared.prior * batch, f"step {step}: {spent} rows, declared {declared} for {batch} images"


@every_method
def test_an_item_does_not_depend_on_its_company(name: str) -> None:
    cameras, coupled = views(3), case(name).coupled

    def of_company(count: int) -> list[Tensor]:
        guidance = method(name, CountingPrior())
        conditions = prompted(guidance, cameras=cameras[:count])
        # A trained network depends on the images of earlier steps, so only the first step is compared.
        steps = range(1 if owns(guidance) else 2)
        return [gradient(guidance, latents(count), step, conditions=conditions) for step in steps]

    for three, two, one in zip(of_company(3), of_company(2), of_company(1), strict=True):
        limit = 1e-11 * one.abs().max().item()
        assert torch.allclose(three[:2], two, rtol=0, atol=limit) != coupled
        assert torch.allclose(three[:1], one, rtol=0, atol=limit) != coupled


@every_method
def test_runs_repeat_and_leave_global_randomness_alone(name: str) -> None:
    before = (torch.random.get_rng_state(), random.getstate(), np.random.get_state()[1].copy())
    runs = []
    for _ in range(2):
        guidance = method(name, CountingPrior(), rng=Rng(4))
        runs.append([gradient(guidance, latents(2), step, rng=Rng(4)) for step in (0, 1)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    after = (torch.random.get_rng_state(), random.getstate(), np.random.get_state()[1])
    assert torch.equal(before[0], after[0]) and before[1] == after[1] and (before[2] == after[2]).all()


@every_method
def test_steps_and_seeds_draw_their_own_noise(name: str) -> None:
    """At one timestep, gradients are equal at different steps exactly for the methods marked with ``repeats``."""
    guidance = method(name, CountingPrior(), t_min=0.5, t_max=0.5)
    here, there = (gradient(guidance, latents(2), step) for step in (3, 4))
    if not owns(guidance):
        assert torch.equal(here, there) == case(name).repeats


@every_method
def test_the_prior_is_only_read(name: str) -> None:
    class Scaled(CountingPrior):
        """Denoiser with one trainable weight."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones((), dtype=torch.float64))

        def predict(self, x_t: Tensor, t: Tensor, conditioning: Any) -> Any:
            prediction = super().predict(x_t, t, conditioning)
            return prediction.with_output(self.weight * prediction.output)

    prior = Scaled()
    guidance = method(name, prior)
    assert gradient(guidance, latents(2)).abs().sum() > 0
    assert prior.weight.grad is None and prior.weight.item() == 1.0
    assert not any(key == "weight" or "_means" in key for key in guidance.state_dict())
    assert prior not in list(guidance.modules())


@every_method
@pytest.mark.parametrize("kind", ["vp-epsilon", "vp-zero", "rf-v_prediction"])
@pytest.mark.parametrize("timestep", [0.0, 1.0, None], ids=["clean", "noise", "whole range"])
def test_the_ends_of_the_schedule_stay_finite_or_are_refused(name: str, kind: str, timestep: float | None) -> None:
    """At the last timestep of a flow or of a zero-SNR chain the noisy input has no signal (alpha is 0)."""
    low, high = (0.0, 1.0) if timestep is None else (timestep, timestep)
    guidance = method(name, CountingPrior(kind), t_min=low, t_max=high)
    try:
        gradients = [gradient(guidance, latents(2), step) for step in range(2)]
    except ValueError as refusal:
        assert kind != "vp-epsilon" and timestep != 0.0, f"refused where alpha is above 0: {refusal}"
        assert_one_sentence(str(refusal))
    else:
        assert all(bool(g.isfinite().all()) for g in gradients)


@every_method
def test_weight_and_clipping_are_honoured(name: str) -> None:
    plain = gradient(method(name, CountingPrior(), grad_clip=None, weight=1.0), latents(2), 2)
    limit = 0.3 * plain.abs().max().item()
    clipped = gradient(method(name, CountingPrior(), grad_clip=limit, weight=0.25), latents(2), 2)
    torch.testing.assert_close(clipped, 0.25 * plain.clamp(-limit, limit), rtol=1e-12, atol=0)


@every_method
def test_a_resumed_run_goes_on_as_if_nothing_had_happened(name: str) -> None:
    particles = (4, 1, 0) if case(name).free_images else (0, 1, 1)

    def steps(guidance: Guidance, numbers: range) -> list[Tensor]:
        conditions = prompted(guidance, cameras=views(3))
        return [gradient(guidance, latents(3), step, conditions=conditions, particles=particles) for step in numbers]

    def fresh() -> Guidance:
        return method(name, CountingPrior(), rng=Rng(2), **one_timestep(name))

    straight = fresh()
    expected = steps(straight, range(6))[4:]
    stopped = fresh()
    steps(stopped, range(4))
    file = io.BytesIO()
    torch.save(stopped.state_dict(), file)
    file.seek(0)
    resumed = fresh()
    resumed.load_state_dict(torch.load(file, weights_only=True), strict=True)
    for got, wanted in zip(steps(resumed, range(4, 6)), expected, strict=True):
        assert torch.equal(got, wanted)
    a, b = flat(straight.state_dict()), flat(resumed.state_dict())
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@every_method
def test_jointly_denoised_views_stay_together(name: str) -> None:
    """Different pairs are independent; the two items of a pair are not."""
    four, two = (method(name, PairPrior()) for _ in range(2))
    cameras = views(4)
    z = latents(4)
    if case(name).free_images:
        with pytest.raises(ValueError) as refusal:
            gradient(four, z, conditions=prompted(four, cameras=cameras), particles=(0, 0, 1, 1))
        assert_one_sentence(str(refusal.value))
        return
    together = gradient(four, z, conditions=prompted(four, cameras=cameras), particles=(0, 0, 1, 1))
    pair = gradient(two, z[:2], conditions=prompted(two, cameras=cameras[:2]), particles=(0, 0))
    if not case(name).coupled:
        torch.testing.assert_close(together[:2], pair, rtol=0, atol=1e-11 * pair.abs().max().item())
    moved = z[:2].clone()
    moved[1] += 0.1
    other = method(name, PairPrior())
    changed = gradient(other, moved, conditions=prompted(other, cameras=cameras[:2]), particles=(0, 0))
    assert not torch.allclose(changed[0], pair[0], rtol=0, atol=1e-6 * pair.abs().max().item())


@every_method
@pytest.mark.parametrize("given", ["nothing", "particles", "cameras", "opacity", "depth", "rgb", "everything"])
def test_what_the_caller_knows_helps_but_is_not_needed(name: str, given: str) -> None:
    guidance = method(name, CountingPrior())
    z = latents(2)
    known: dict[str, Any] = {
        "particles": (3, 0),
        "opacity": opaque(2, z.dtype),
        "depth": 3.0 * opaque(2, z.dtype),
        "rgb": guidance.prior.decode(z).requires_grad_(),
    }
    chosen = {key: value for key, value in known.items() if given in (key, "everything")}
    chosen.setdefault("particles", None)
    cameras = views(2) if given in ("cameras", "everything") else None
    try:
        result = gradient(guidance, z, conditions=prompted(guidance, cameras=cameras), **chosen)
    except ValueError as refusal:
        assert given != "everything"
        assert_one_sentence(str(refusal))
    else:
        assert bool(result.isfinite().all()) and result.abs().max() > 0


@every_method
def test_diagnostics_are_numbers_on_the_device(name: str) -> None:
    guidance = method(name, CountingPrior())
    source = latents(2, seed=6) if guidance.needs_source else None
    output = guidance(latents(2).requires_grad_(), prompted(guidance), 0, Rng(), source=source, particles=(0, 1))
    assert {"t", "gradient_rms", "latent_rms"} <= set(output.diagnostics)
    for value in output.diagnostics.values():
        assert value.numel() == 1 and not value.requires_grad and bool(value.isfinite().all())
    assert output.loss.requires_grad and output.loss.ndim == 0


@every_method
def test_an_editing_method_says_that_it_needs_a_source(name: str) -> None:
    guidance = method(name, CountingPrior())
    if not guidance.needs_source:
        assert gradient(guidance, latents(1), source=latents(1, seed=6)).isfinite().all()
        return
    with pytest.raises(ValueError) as refusal:
        guidance(latents(1).requires_grad_(), prompted(guidance), 0, Rng())
    assert_one_sentence(str(refusal.value))


def opaque(batch: int, dtype: torch.dtype) -> Tensor:
    """Opacity (B, 8, 8, 1): 1 in the left half, 0 in the right half."""
    half = torch.cat([torch.ones(8, 4), torch.zeros(8, 4)], dim=1).to(dtype)
    return half[None, :, :, None].expand(batch, -1, -1, -1)


def owns(guidance: Guidance) -> bool:
    """Whether the method trains a network."""
    return bool(list(guidance.parameters()))


def flat(state: Any, prefix: str = "") -> dict[str, Tensor]:
    """Tensors and numbers of a nested state by their paths."""
    if isinstance(state, dict):
        return {k: v for key, value in state.items() for k, v in flat(value, f"{prefix}/{key}").items()}
    if isinstance(state, (list, tuple)):
        return {k: v for index, value in enumerate(state) for k, v in flat(value, f"{prefix}/{index}").items()}
    if isinstance(state, (Tensor, int, float, bool)):
        return {prefix: torch.as_tensor(state)}
    return {}


def assert_one_sentence(message: str) -> None:
    """Require a one-line message for the user, without a traceback."""
    assert message and "\n" not in message and len(message) < 300, message

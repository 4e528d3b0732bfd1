"""What the tests that run over every registered method share: exact priors, conditions, and each method's needs.

A method that is not in :data:`CASES` is tested with its own defaults, so a new file under ``scoredist3d/guidance`` is
covered without a word here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from scoredist3d import registry
from scoredist3d.cameras import Cameras, orbit
from scoredist3d.config.validation import parse_component
from scoredist3d.diffusion.schedule import FlowSchedule, NoiseSchedule, VPSchedule
from scoredist3d.guidance import Guidance
from scoredist3d.guidance.core.context import item_noise
from scoredist3d.priors import CFGConditions, Prediction
from scoredist3d.priors.analytic import GaussianMixturePrior
from scoredist3d.prompts.processor import PromptProcessor
from scoredist3d.seeding import Rng

PROMPT = "red"
SIZE = 8
NETWORK = {"phi": {"channels": [4]}}


@dataclass(frozen=True)
class Case:
    """How one method is tested.

    Attributes:
        options: Its block's keys on tiny inputs.
        coupled: The items of a batch act on each other by design.
        repeats: Nothing is drawn per step: at one timestep, every step has the same gradient.
        free_images: Several views of one particle in a batch are refused.
    """

    options: dict[str, Any] = field(default_factory=dict)
    coupled: bool = False
    repeats: bool = False
    free_images: bool = False


CASES: dict[str, Case] = {
    "asd": Case(NETWORK),
    "async-sd/largest": Case({"random_shift": False, "shift": 0.3}),
    # Two steps of stage one, then stage two.
    "bridge": Case({"stage_two_start_step": 2, "source_prompt": "green", "target_modifier": ""}),
    "bridge/full": Case(
        {"stage_two_start_step": 0, "source_prompt": "green", "target_modifier": "", "path": "full", "path_steps": 3},
        repeats=True,
    ),
    "csd/mixed": Case({"c_n": -0.5, "c_0": -0.25, "c_eps": -0.25}),
    "cfd": Case(repeats=True),
    "cfd/stochastic": Case({"sde_rate": 0.1, "background_noise": "random"}),
    "collaborative-sd": Case(coupled=True),
    "collaborative-sd/clean": Case({"kernel_space": "z", "noise_sharing": "shared"}, coupled=True),
    # At one timestep the window that u is drawn from is empty.
    "dsd": Case({"ode_steps": 4}, repeats=True),
    "dsd/uncached": Case({"ode_steps": 4, "cache_trajectory": "never", "random_interval": False}, repeats=True),
    "consistent3d/fresh": Case({"fixed_noise": False}),
    "dds": Case({"source_prompt": "green"}),
    "esd": Case(NETWORK),
    "fsd": Case(repeats=True),
    "fsd/blended": Case({"sqrt_beta": 0.5, "sde_rate": 0.1}),
    "fsd/random": Case({"noise_field": "random"}),
    "hifa": Case({"denoise_steps": 2}),
    "ism": Case({"inversion_steps": 2}),
    "ism/trajectory": Case({"inversion_steps": 2, "tsm_gamma": 0.7, "fixed_noise": True}, repeats=True),
    # The trained networks belong to other priors.
    "lmc": Case({"corrective": "identity"}),
    "lmc/fixed": Case({"corrective": "identity", "noise": "fixed", "jacobian": "full"}, repeats=True),
    "nfsd": Case({"negative_prompt": "yellow"}),
    "pds": Case({"source_prompt": "green"}),
    "pds/dreamcatalyst": Case({"source_prompt": "green", "form": "dreamcatalyst"}),
    # Nothing is random at one timestep, because the inversion adds no noise.
    "pfd": Case({"inversion_steps": 4, "ode_steps": 3}, repeats=True),
    "pfd/noisy": Case({"inversion_steps": 4, "ode_steps": 1, "inversion_eta": 0.3, "tau_max": 0.1}),
    "rfds/reverse": Case({"coupling": "reverse"}),
    "rfds/trajectory": Case({"coupling": "trajectory", "coupling_start": 2}, repeats=True),
    "sdi": Case({"inversion_steps": 4}),
    "sdi/cached": Case({"kappa": "cached"}, free_images=True),
    "sdi/limited": Case({"inversion_steps": 4, "kappa_rms": "limited"}),
    "sdi/unit": Case({"inversion_steps": 4, "inversion_start": 0.1, "kappa_rms": "unit"}),
    "sdi/once": Case({"inversion_steps": 4, "inversion_noise": "once"}),
    "sdi/random": Case({"kappa": "random"}),
    "sds/dreamtime": Case({"dreamtime": {"steps": 11}}),
    "sjc/plain": Case({"variance_reduction": False}),
    "vsd": Case(NETWORK),
}
"""By registered name; ``name/variant`` tests the method with further options."""

METHODS = registry.names("guidance")
VARIANTS = sorted({*METHODS, *(key for key in CASES if "/" in key)})


def case(name: str) -> Case:
    """The method's needs; its defaults where nothing is known."""
    return CASES.get(name, Case())


class StraightVP(VPSchedule):
    """Stable Diffusion's alphas and sigmas under a network that predicts the flow (eps - x_0) / (alpha + sigma)."""

    def velocity_coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Equal shares that sum to one on x_t."""
        share = 1.0 / sum(self.coefficients(t))
        return share, share


def schedule_of(kind: str) -> NoiseSchedule:
    """``vp-epsilon``, ``vp-sample``, ``vp-v_prediction``, ``vp-flow``; ``rf-`` for a rectified flow; ``vp-zero`` for a
    chain whose last timestep holds no image."""
    family, output = kind.split("-")
    if family == "rf":
        return FlowSchedule(prediction_type=output)  # type: ignore[arg-type]
    if output == "zero":
        betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
        zero_snr = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
        return VPSchedule.from_scheduler_config(betas | zero_snr)
    usual = VPSchedule.stable_diffusion(output if output != "flow" else "v_prediction")  # type: ignore[arg-type]
    return usual if output != "flow" else StraightVP(usual._table[0, 1:] ** 2, "v_prediction")


VP_KINDS = ("vp-epsilon", "vp-sample", "vp-v_prediction", "vp-flow")
FLOW_KINDS = ("rf-v_prediction", "rf-epsilon", "rf-sample")


class CountingPrior(GaussianMixturePrior):
    """Eight overlapping Gaussians that note the rows of every call."""

    def __init__(self, kind: str = "vp-epsilon", *, std: float = 0.5) -> None:
        super().__init__(GaussianMixturePrior.Config(image_size=SIZE, std=std), schedule=schedule_of(kind))
        self.rows: list[int] = []

    def predict(self, x_t: Tensor, t: Tensor, conditioning: Any) -> Prediction:
        """As its base."""
        assert len(x_t) == len(t) == len(conditioning)
        self.rows.append(len(x_t))
        return super().predict(x_t, t, conditioning)


class NoiseKnowingPrior(CountingPrior):
    """Answers the second half of a batch of two pairs, the source's rows, with the noise that was added."""

    def predict(self, x_t: Tensor, t: Tensor, conditioning: Any) -> Prediction:
        """The base's prediction for the first half."""
        output = super().predict(x_t, t, conditioning).eps.clone()
        if len(x_t) == 4:
            output[2:] = item_noise(Rng(), "noise", 0, output[2:])
        return Prediction(output, "epsilon", x_t, t, self.schedule)


class PairPrior(CountingPrior):
    """Denoises pairs of views jointly: half of each prediction comes from the other view."""

    views = 2

    def predict(self, x_t: Tensor, t: Tensor, conditioning: Any) -> Prediction:
        """As its base, mixed within pairs."""
        assert len(x_t) % 2 == 0 and torch.equal(t[::2], t[1::2]), "a pair was split or shares no timestep"
        prediction = super().predict(x_t, t, conditioning)
        pairs = prediction.output.unflatten(0, (-1, 2))
        return prediction.with_output((0.7 * pairs + 0.3 * pairs.flip(1)).flatten(0, 1))


def one_timestep(name: str) -> dict[str, Any]:
    """Options for one timestep for all items of a step, falling over the range in about ten steps."""
    if "dreamtime" in case(name).options:
        return {}
    falling = {"from": 0.98, "to": 0.02, "end": 10}
    return {"t_min": falling, "t_max": falling}


def method(name: str, prior: GaussianMixturePrior, *, rng: Rng | None = None, **options: Any) -> Guidance:
    """A registered method from a config block, as a run builds it."""
    config = parse_component("guidance", {"type": name.partition("/")[0], **case(name).options, **options})
    built: Guidance = registry.build(config, prior=prior, rng=rng or Rng())
    return built


def views(batch: int) -> Cameras:
    """Cameras all around, the first in front, no two alike."""
    azimuth = torch.arange(batch) * 75.0
    elevation = 10.0 + 5.0 * torch.arange(batch)
    return orbit(azimuth, elevation, torch.full((batch,), 3.0), torch.full((batch,), 40.0), SIZE, SIZE)


def prompted(guidance: Guidance, *, cameras: Cameras | None = None, perp_neg: bool = False) -> CFGConditions:
    """What a system would hand over; the view words choose modes of the mixture, so that they matter."""
    config = PromptProcessor.Config(
        front_suffix=" left", side_suffix=" right", back_suffix=" blob", perp_neg=perp_neg, view_dependent="always"
    )
    extra = guidance.extra_prompts(PROMPT)
    return PromptProcessor(config, prior=guidance.prior, prompt=PROMPT, negative_prompt="blue", extra=extra)(cameras)


def latents(batch: int, dtype: torch.dtype = torch.float64, seed: int = 5) -> Tensor:
    """Item i is the same in every batch."""
    return 0.5 * torch.stack(
        [
            torch.randn(3, SIZE, SIZE, generator=torch.Generator().manual_seed(100 * seed + item), dtype=torch.float64)
            for item in range(batch)
        ]
    ).to(dtype)


def gradient(
    guidance: Guidance, z: Tensor, step: int = 0, *, conditions: CFGConditions | None = None, **extras: Any
) -> Tensor:
    """B dL/dz, which is G; every item is a particle of its own where nothing else is said."""
    extras.setdefault("rng", Rng())
    extras.setdefault("particles", tuple(range(len(z))))
    if guidance.needs_source:
        extras.setdefault("source", latents(len(z), z.dtype, seed=6))
    z = z.detach().clone().requires_grad_()
    loss = guidance(z, conditions or prompted(guidance), step, **extras).loss
    return torch.autograd.grad(loss, z)[0] * len(z)

"""Score distillation via DDIM inversion."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from scoredist3d.config import FieldError, option
from scoredist3d.diffusion.schedule import VPSchedule
from scoredist3d.guidance.core.context import StepContext, select
from scoredist3d.guidance.core.inversion import InversionGuidance
from scoredist3d.guidance.core.outputs import NFE, Score
from scoredist3d.guidance.core.trajectory import conditioning_tensors, same_conditioning
from scoredist3d.priors.base import Prior
from scoredist3d.priors.conditioning import CFGConditions
from scoredist3d.registry import register
from scoredist3d.seeding import Rng


@dataclass
class CachedNoise:
    """State of a particle for ``kappa: cached``.

    Attributes:
        target: (C, h, w), predicted clean latents towards which the particle moves.
        kappa: (C, h, w), noise predicted together with the target.
        block: Index of the block of ``cached_inner_steps`` optimizer steps that use the target.
        step: Optimizer step in which the target was computed.
    """

    target: Tensor
    kappa: Tensor
    block: int
    step: int


@register(
    "guidance",
    "sdi",
    summary="SDS with noise from the DDIM inversion of the render; DDIM sampling as distillation.",
    arxiv="2405.15891",
)
class ScoreDistillationViaInversion(InversionGuidance):
    """SDI: G = lambda_t (eps_gamma(alpha_t z + sigma_t kappa, t, y) - kappa) (algorithm 2), which equals z - x0_hat.

    In terms of the predicted image x0(t), a DDIM step is

        x0(t - tau) = x0(t) - lambda_{t-tau} [eps(alpha_{t-tau} x0(t) + sigma_{t-tau} kappa, t - tau, y) - kappa]

    with kappa = eps(x(t), t, y) (eq. 6). This is score distillation with the previous prediction in place of random
    noise. A render has no previous prediction, so ``kappa: inversion`` recovers one from z by DDIM inversion to t + tau
    with a negative guidance scale. ``cached`` stores the previous prediction of each free image, so that the run is
    exactly DDIM: a new target is computed every ``cached_inner_steps`` steps, and plain gradient descent at a learning
    rate equal to the batch size reaches it in one step. ``random`` is SDS with w = lambda; ``fixed`` uses one
    noise sample per particle.

    To anneal t, set t_min and t_max to the same linear schedule (in the paper, from 1 to 0.2 over the run).
    """

    @dataclass
    class Config(InversionGuidance.Config):
        """Options of SDI."""

        kappa: Literal["inversion", "cached", "random", "fixed"] = option(
            "inversion",
            "Noise kappa. inversion: from DDIM inversion of the latents; cached: the previous prediction (free images "
            "only); random: fresh at every step; fixed: one per particle.",
        )
        cached_inner_steps: int = option(1, "Number of optimizer steps per target for kappa=cached.", ge=1)
        reference_quirk: bool = option(
            False,
            "Follow the released code instead of the paper: the latent inverted to t + tau is denoised as if it were "
            "at t, and the inversion starts at a negative timestep, with the noise level of the clean image or, if the "
            "prior's scheduler has set_alpha_to_one: false, of timestep 0.",
        )

        def validate(self) -> list[str]:
            """Reject combinations that ``cached`` and ``reference_quirk`` do not support."""
            problems = super().validate()
            if self.kappa == "cached" and self.weighting != "lambda":
                problems.append("weighting: must be lambda with kappa: cached, which moves to the predicted image")
            if self.reference_quirk:
                if self.kappa != "inversion" or self.weighting != "lambda":
                    problems.append("reference_quirk: needs kappa: inversion and weighting: lambda")
                if self.inversion_noise != "per-step":
                    problems.append("reference_quirk: needs inversion_noise: per-step")
                if self.kappa_rms != "free" or self.inversion_start > 0.0:
                    problems.append("reference_quirk: needs kappa_rms: free and inversion_start: 0")
            return problems

    config: Config

    def __init__(self, config: Config, *, prior: Prior, rng: Rng | None = None) -> None:
        """Create the method with an empty cache; for the arguments see :class:`Guidance`.

        Raises:
            ValueError: ``reference_quirk`` is set for a flow or for a prior that predicts the clean image.
        """
        super().__init__(config, prior=prior, rng=rng)
        schedule = prior.schedule
        if config.reference_quirk and (not isinstance(schedule, VPSchedule) or schedule.prediction_type == "sample"):
            kind = "predicts the image" if isinstance(schedule, VPSchedule) else "is a flow"
            raise FieldError(
                "needs a variance-preserving prior that predicts noise or velocity, and this "
                f"prior {kind}; set it to false",
                "reference_quirk",
            )
        self._cached: dict[int, CachedNoise] = {}
        self._conditionings: dict[int, list[Tensor]] = {}

    def score_gradient(self, z: Tensor, conditions: CFGConditions, ctx: StepContext) -> Score:
        """Gradient w(t) (eps_hat - kappa), which is z - x0_hat for weighting lambda."""
        if self.config.kappa == "cached":
            return Score(z - self._targets(z, conditions, ctx))
        x_t, kappa = self.noised(z, ctx) if self.config.kappa != "inversion" else self.inverted(z, conditions, ctx)
        prediction = self.guided(x_t, conditions, ctx)
        return Score(self.weighted(prediction, z, kappa), diagnostics={"kappa_rms": kappa.square().mean().sqrt()})

    def noised(self, z: Tensor, ctx: StepContext) -> tuple[Tensor, Tensor]:
        """Noisy latents x_t and their noise, which is fixed for the particle or fresh."""
        if self.config.kappa != "fixed":
            return super().noised(z, ctx)
        kappa = ctx.particle_noise(z, "kappa")
        return self.schedule.add_noise(z, kappa, ctx.t), kappa

    def nfe(self, conditions: CFGConditions, ctx: StepContext) -> NFE:
        """One guided prediction, plus one per inversion step; for ``cached``, one per new target."""
        forward = self.guided_nfe(conditions, self._value("guidance_scale", ctx.step))
        if self.config.kappa == "cached":
            new = [self._needs_target(particle, ctx) or self._made_now(particle, ctx) for particle in ctx.particles]
            return NFE(forward * sum(new) / len(new))
        if self.config.kappa != "inversion":
            return NFE(forward)
        return NFE(forward + self.inversion_nfe(conditions, ctx))

    def default_inversion_scale(self, guidance_scale: float) -> float:
        """Negative of the guidance scale, as in the paper."""
        return -guidance_scale

    def inversion_timesteps(self, ctx: StepContext) -> list[float]:
        """Timesteps of the base class; with ``reference_quirk`` the first one is one stride below timestep 1."""
        start, *others = super().inversion_timesteps(ctx)
        if self.config.reference_quirk:
            start = (1 - self.inversion_stride()) / self.grid.count
        return [start, *others]

    def noise_timestep(self, timestep: float) -> float:
        """The timestep; with ``reference_quirk``, negative timesteps have the noise level of the released code."""
        return self.schedule.final_timestep if timestep < 0 and self.config.reference_quirk else timestep

    def inverted(self, z: Tensor, conditions: CFGConditions, ctx: StepContext) -> tuple[Tensor, Tensor]:
        """Noisy latents and kappa as in the base class; with ``reference_quirk`` the latents stay at t + tau."""
        return (self.inversion if self.config.reference_quirk else super().inverted)(z, conditions, ctx)

    def get_extra_state(self) -> dict[str, Any]:
        """Cached target and noise of every particle."""
        return {str(particle): vars(cached).copy() for particle, cached in self._cached.items()}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restore the state returned by :meth:`get_extra_state`."""
        self._cached = {int(particle): CachedNoise(**values) for particle, values in state.items()}

    def _targets(self, z: Tensor, conditions: CFGConditions, ctx: StepContext) -> Tensor:
        """Target (B, C, h, w) of each particle, computed at the first step of a block.

        Raises:
            ValueError: Two items show the same particle, or the conditioning of a particle has changed.
        """
        if len(set(ctx.particles)) < len(ctx.particles):
            raise FieldError(
                "cached supports one image per particle, and this batch has several views of one "
                "object; use kappa: inversion",
                "kappa",
            )
        new = [item for item, particle in enumerate(ctx.particles) if self._needs_target(particle, ctx)]
        if new:
            self._advance(z, conditions, ctx, new)
        return torch.stack([self._cached[particle].target for particle in ctx.particles]).to(z)

    def _advance(self, z: Tensor, conditions: CFGConditions, ctx: StepContext, items: list[int]) -> None:
        """DDIM step of some items, predicted from z noised with the previous kappa, or at the start from pure noise."""
        start, noisy = ctx.particle_noise(z, "kappa"), []
        for item in items:
            one, cached = slice(item, item + 1), self._cached.get(ctx.particles[item])
            known = None if cached is None else cached.kappa[None].to(z)
            noisy.append(start[one] if known is None else self.schedule.add_noise(z[one], known, ctx.t[one]))
        index = torch.tensor(items)
        prediction = self.guided(torch.cat(noisy), select(conditions, index, len(z)), ctx, t=ctx.t[index])
        for i, item in enumerate(items):
            particle = ctx.particles[item]
            now = conditioning_tensors(select(conditions, slice(item, item + 1), len(z)))
            if not same_conditioning(self._conditionings.setdefault(particle, now), now):
                raise FieldError(
                    "cached needs the same prompt and camera at every step, and they have changed; use "
                    "kappa: inversion",
                    "kappa",
                )
            self._cached[particle] = CachedNoise(prediction.x0[i], prediction.eps[i], self._block(ctx.step), ctx.step)

    def _block(self, step: int) -> int:
        return step // self.config.cached_inner_steps

    def _needs_target(self, particle: int, ctx: StepContext) -> bool:
        return particle not in self._cached or self._cached[particle].block != self._block(ctx.step)

    def _made_now(self, particle: int, ctx: StepContext) -> bool:
        return self._cached[particle].step == ctx.step

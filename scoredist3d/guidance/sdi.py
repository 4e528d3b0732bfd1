"""Score Distillation via Inversion."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from scoredist3d.config import FieldError, Schedule, option
from scoredist3d.diffusion.schedule import CLEAN, VPSchedule, per_item
from scoredist3d.guidance.core.base import NFE, Score, StepContext, Weighting
from scoredist3d.guidance.core.context import select, timestep_tensor
from scoredist3d.guidance.core.trajectory import TrajectoryGuidance, told, told_the_same
from scoredist3d.priors.base import CFGConditions, Prior
from scoredist3d.registry import register
from scoredist3d.seeding import Rng


@dataclass
class CachedNoise:
    """What the cached form keeps of a particle.

    Attributes:
        target: (C, h, w), the image it moves to.
        kappa: (C, h, w), the noise predicted with that target.
        block: Number of the target.
        step: Optimiser step that made it.
    """

    target: Tensor
    kappa: Tensor
    block: int
    step: int


@register(
    "guidance",
    "sdi",
    summary="Noise the render with what DDIM inversion finds in it; DDIM sampling seen as distillation.",
    arxiv="2405.15891",
)
class ScoreDistillationViaInversion(TrajectoryGuidance):
    """G = lambda_t (eps_gamma(alpha_t z + sigma_t kappa, t, y) - kappa) (algorithm 2), which is z - x0_hat.

    Written for the predicted image x0(t), a DDIM step is

        x0(t - tau) = x0(t) - lambda_{t-tau} [eps(alpha_{t-tau} x0(t) + sigma_{t-tau} kappa, t - tau, y) - kappa],

    kappa = eps(x(t), t, y) (eq. 6): score distillation whose noise is the last prediction instead of a random draw. A
    render has no last prediction, so ``kappa: inversion`` recovers one from z by DDIM inversion to t + tau under
    negative guidance. ``cached`` keeps the last prediction of each free image, which makes the run DDIM itself: every
    ``cached_inner_steps`` steps give a new target, which plain gradient descent at a rate equal to the batch size
    reaches in one. ``random`` is SDS with w = lambda, ``fixed`` has one noise per particle.

    Anneal t by giving t_min and t_max the same linear schedule (the paper: from 1 to 0.2 over the run).
    """

    @dataclass
    class Config(TrajectoryGuidance.Config):
        """Options of SDI."""

        weighting: Weighting = option("lambda", "w(t); the derivation fixes it to lambda = sigma/alpha.")
        kappa: Literal["inversion", "cached", "random", "fixed"] = option(
            "inversion",
            "Where the noise comes from: inversion of the latents; cached: the last prediction, for free images; "
            "random: drawn anew; fixed: one per particle.",
        )
        inversion_guidance_scale: Schedule | None = option(
            None, "gamma of the inversion; minus guidance_scale where not given, as in the paper."
        )
        inversion_steps: int = option(10, "Steps that an inversion over the whole range would take.", ge=1)
        tau_max: float = option(
            1.0 / 30.0,
            "Inversion goes to t + tau, tau uniform below this; the released code has 1 / inversion_steps.",
            ge=0,
            lt=1,
        )
        inversion_eta: float = option(0.3, "Strength of the noise added to the inversion.", ge=0)
        inversion_noise: Literal["per-step", "once"] = option(
            "per-step",
            "Where it is added: per-step: inversion_eta sqrt(var) after every step, var as in DDIM (the released "
            "code); once: inversion_eta sigma_t to kappa (the paper's H).",
        )
        cached_inner_steps: int = option(1, "Optimiser steps on each target of the cached form.", ge=1)
        reference_quirk: bool = option(
            False,
            "Do what the released code does in place of the paper: the latent inverted to t + tau is denoised as if it "
            "were at t, and the inversion starts at a negative timestep, whose timestep is the clean image or, where the "
            "prior's scheduler has set_alpha_to_one: false, that of timestep 0.",
        )

        def validate(self) -> list[str]:
            """Some forms leave no choice."""
            problems = super().validate()
            if self.kappa == "cached" and self.weighting != "lambda":
                problems.append("weighting: kappa: cached moves to the predicted image, which is lambda")
            if self.reference_quirk:
                if self.kappa != "inversion" or self.weighting != "lambda":
                    problems.append("reference_quirk: needs kappa: inversion and weighting: lambda")
                if self.inversion_noise != "per-step":
                    problems.append("reference_quirk: needs inversion_noise: per-step")
            return problems

    config: Config

    def __init__(self, config: Config, *, prior: Prior, rng: Rng | None = None) -> None:
        """See :class:`Guidance`.

        Raises:
            ValueError: ``reference_quirk`` on a flow or on a prior whose network predicts the image.
        """
        super().__init__(config, prior=prior, rng=rng)
        schedule = prior.schedule
        if config.reference_quirk and (not isinstance(schedule, VPSchedule) or schedule.prediction_type == "sample"):
            kind = "predicts the image" if isinstance(schedule, VPSchedule) else "is a flow"
            raise FieldError(
                "the released code is for variance-preserving models that predict noise or "
                f"velocity, and this prior {kind}; set it to false",
                "reference_quirk",
            )
        self._cached: dict[int, CachedNoise] = {}
        self._told: dict[int, list[Tensor]] = {}

    def score_gradient(self, z: Tensor, conditions: CFGConditions, ctx: StepContext) -> Score:
        """w(t) (eps_hat - kappa); z - x0_hat for the weighting lambda."""
        if self.config.kappa == "cached":
            return Score(z - self._targets(z, conditions, ctx))
        x_t, kappa = self.noised(z, ctx) if self.config.kappa != "inversion" else self.inverted(z, conditions, ctx)
        prediction = self.guided(x_t, conditions, ctx)
        return Score(self.weighted(prediction, z, kappa), diagnostics={"kappa_rms": kappa.square().mean().sqrt()})

    def noised(self, z: Tensor, ctx: StepContext) -> tuple[Tensor, Tensor]:
        """(x_t, eps) with the particle's noise where it is fixed, with the step's otherwise."""
        if self.config.kappa != "fixed":
            return super().noised(z, ctx)
        kappa = ctx.particle_noise(z, "kappa")
        return self.schedule.add_noise(z, kappa, ctx.t), kappa

    def nfe(self, conditions: CFGConditions, ctx: StepContext) -> NFE:
        """One guided prediction, and one per inversion step; of the cached form, only where it needs a new target."""
        forward = self.guided_nfe(conditions, self._value("guidance_scale", ctx.step))
        if self.config.kappa == "cached":
            new = [self._needs_target(particle, ctx) or self._made_now(particle, ctx) for particle in ctx.particles]
            return NFE(forward * sum(new) / len(new))
        if self.config.kappa != "inversion":
            return NFE(forward)
        steps = len(self.inversion_timesteps(ctx)) - 1
        return NFE(forward + steps * self.guided_nfe(conditions, self._inversion_scale(ctx)))

    def inversion_timesteps(self, ctx: StepContext) -> list[float]:
        """The timesteps an inversion visits: clean, 1 and every N / inversion_steps above while below t, then t + tau."""
        grid, config = self.grid, self.config
        spacing = max(1, grid.count // config.inversion_steps)
        t = grid.index(ctx.timesteps[0])
        tau = torch.rand((), generator=ctx.rng("tau", ctx.step), dtype=torch.float64).item() * config.tau_max
        last = min(t + int(tau * grid.count), grid.highest)
        start = (1 - spacing) / grid.count if config.reference_quirk else CLEAN
        return [start, *(index / grid.count for index in range(1, min(t, last), spacing)), last / grid.count]

    def inverted(self, z: Tensor, conditions: CFGConditions, ctx: StepContext) -> tuple[Tensor, Tensor]:
        """(x_t, kappa): DDIM inversion of z to t + tau, the noise found there, and z noised with it to t."""
        eta, scale = self.config.inversion_eta, self._inversion_scale(ctx)
        timesteps = self.inversion_timesteps(ctx)
        per_step = eta > 0.0 and self.config.inversion_noise == "per-step"
        x = z
        for index, (start, stop) in enumerate(pairwise(timesteps)):
            prediction = self.predict_at(x, start, conditions, scale)
            if start < 0 and self.config.reference_quirk:
                start = self.schedule.final_timestep
                prediction = replace(prediction, t=timestep_tensor([start] * len(x), x))
            x = self.move(prediction, start, stop)
            if per_step:
                x = x + eta * self._deviation(start, stop) * ctx.noise(z, f"inversion/{index}")
        alpha, sigma = (per_item(c, z) for c in self.schedule.coefficients(timestep_tensor(timesteps[-1:], z)))
        kappa = (x - alpha * z) / sigma
        if self.config.reference_quirk:
            return x, kappa
        if eta > 0.0 and not per_step:
            kappa = kappa + eta * per_item(self.schedule.sigma(ctx.t), z) * ctx.noise(z, "inversion")
        return self.schedule.add_noise(z, kappa, ctx.t), kappa

    def get_extra_state(self) -> dict[str, Any]:
        """Target and noise of every particle of the cached form."""
        return {str(particle): vars(cached).copy() for particle, cached in self._cached.items()}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Go on with saved targets."""
        self._cached = {int(particle): CachedNoise(**values) for particle, values in state.items()}

    def _inversion_scale(self, ctx: StepContext) -> float:
        scale = self.config.inversion_guidance_scale
        return -self._value("guidance_scale", ctx.step) if scale is None else scale(ctx.step)

    def _deviation(self, start: float, stop: float) -> float:
        """sqrt of DDIM's variance between two timesteps; 0 where the lower one is the clean image."""
        ends = (torch.tensor([timestep], dtype=torch.float64) for timestep in (stop, start))
        return self.schedule.ddim_variance(*ends).sqrt().item()

    def _targets(self, z: Tensor, conditions: CFGConditions, ctx: StepContext) -> Tensor:
        """(B, C, h, w), the image that each particle moves to, made anew at the first step of a block.

        Raises:
            ValueError: Two items show one particle, or a particle's conditioning has changed.
        """
        if len(set(ctx.particles)) < len(ctx.particles):
            raise FieldError(
                "cached keeps one noise per image, and several views of one object share this batch; "
                "use kappa: inversion",
                "kappa",
            )
        new = [item for item, particle in enumerate(ctx.particles) if self._needs_target(particle, ctx)]
        if new:
            self._advance(z, conditions, ctx, new)
        return torch.stack([self._cached[particle].target for particle in ctx.particles]).to(z)

    def _advance(self, z: Tensor, conditions: CFGConditions, ctx: StepContext, items: list[int]) -> None:
        """One DDIM step of some items: noise z with the last prediction and predict anew; pure noise at the start."""
        start, noisy = ctx.particle_noise(z, "kappa"), []
        for item in items:
            one, cached = slice(item, item + 1), self._cached.get(ctx.particles[item])
            known = None if cached is None else cached.kappa[None].to(z)
            noisy.append(start[one] if known is None else self.schedule.add_noise(z[one], known, ctx.t[one]))
        index = torch.tensor(items)
        prediction = self.guided(torch.cat(noisy), select(conditions, index, len(z)), ctx, t=ctx.t[index])
        for i, item in enumerate(items):
            particle = ctx.particles[item]
            now = told(select(conditions, slice(item, item + 1), len(z)))
            if not told_the_same(self._told.setdefault(particle, now), now):
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

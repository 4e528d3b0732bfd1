"""Score distillation via DDIM inversion."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from scoredist3d.config import FieldError, Schedule, option
from scoredist3d.diffusion.schedule import CLEAN, VPSchedule, per_item
from scoredist3d.guidance.core.context import StepContext, select
from scoredist3d.guidance.core.outputs import NFE, Score
from scoredist3d.guidance.core.timesteps import timestep_tensor
from scoredist3d.guidance.core.trajectory import TrajectoryGuidance, conditioning_tensors, same_conditioning
from scoredist3d.guidance.core.weighting import Weighting
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
class ScoreDistillationViaInversion(TrajectoryGuidance):
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
    class Config(TrajectoryGuidance.Config):
        """Options of SDI."""

        weighting: Weighting = option(
            "lambda", "Weight w(t), with the same choices as for sds; the derivation requires lambda."
        )
        kappa: Literal["inversion", "cached", "random", "fixed"] = option(
            "inversion",
            "Noise kappa. inversion: from DDIM inversion of the latents; cached: the previous prediction (free images "
            "only); random: fresh at every step; fixed: one per particle.",
        )
        inversion_guidance_scale: Schedule | None = option(
            None, "Guidance scale of the inversion; null uses -guidance_scale, as in the paper."
        )
        inversion_steps: int = option(10, "Number of steps for an inversion over the whole range of timesteps.", ge=1)
        tau_max: float = option(
            1.0 / 30.0,
            "Upper bound of the uniformly drawn tau in the inversion to t + tau; the released code uses "
            "1 / inversion_steps.",
            ge=0,
            lt=1,
        )
        inversion_eta: float = option(0.3, "Strength of the noise that is added to the inversion.", ge=0)
        inversion_noise: Literal["per-step", "once"] = option(
            "per-step",
            "How the noise of inversion_eta is added. per-step: inversion_eta sqrt(var) after every step, with the "
            "variance of DDIM (the released code); once: inversion_eta sigma_t to kappa (H in the paper).",
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
        steps = len(self.inversion_timesteps(ctx)) - 1
        return NFE(forward + steps * self.guided_nfe(conditions, self._inversion_scale(ctx)))

    def inversion_timesteps(self, ctx: StepContext) -> list[float]:
        """Increasing timesteps of an inversion from the clean image to t + tau.

        The intermediate timesteps are those below t with the indices 1, 1 + s, 1 + 2 s, ..., where the stride s is
        N / inversion_steps, rounded down but at least 1.
        """
        grid, config = self.grid, self.config
        spacing = max(1, grid.count // config.inversion_steps)
        t = grid.index(ctx.timesteps[0])
        tau = torch.rand((), generator=ctx.rng("tau", ctx.step), dtype=torch.float64).item() * config.tau_max
        last = min(t + int(tau * grid.count), grid.highest)
        start = (1 - spacing) / grid.count if config.reference_quirk else CLEAN
        return [start, *(index / grid.count for index in range(1, min(t, last), spacing)), last / grid.count]

    def inverted(self, z: Tensor, conditions: CFGConditions, ctx: StepContext) -> tuple[Tensor, Tensor]:
        """Noisy latents x_t and the noise kappa, recovered from z by DDIM inversion to t + tau."""
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
                x = x + eta * self._std(start, stop) * ctx.noise(z, f"inversion/{index}")
        alpha, sigma = (per_item(c, z) for c in self.schedule.coefficients(timestep_tensor(timesteps[-1:], z)))
        kappa = (x - alpha * z) / sigma
        if self.config.reference_quirk:
            return x, kappa
        if eta > 0.0 and not per_step:
            kappa = kappa + eta * per_item(self.schedule.sigma(ctx.t), z) * ctx.noise(z, "inversion")
        return self.schedule.add_noise(z, kappa, ctx.t), kappa

    def get_extra_state(self) -> dict[str, Any]:
        """Cached target and noise of every particle."""
        return {str(particle): vars(cached).copy() for particle, cached in self._cached.items()}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restore the state returned by :meth:`get_extra_state`."""
        self._cached = {int(particle): CachedNoise(**values) for particle, values in state.items()}

    def _inversion_scale(self, ctx: StepContext) -> float:
        scale = self.config.inversion_guidance_scale
        return -self._value("guidance_scale", ctx.step) if scale is None else scale(ctx.step)

    def _std(self, start: float, stop: float) -> float:
        """Standard deviation of a DDIM step between two timesteps; 0 if the lower one is the clean image."""
        ends = (torch.tensor([timestep], dtype=torch.float64) for timestep in (stop, start))
        return self.schedule.ddim_variance(*ends).sqrt().item()

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

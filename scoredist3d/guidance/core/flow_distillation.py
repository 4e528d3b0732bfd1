"""Base class of FSD and CFD: the probability-flow ODE as distillation, with noise that stays fixed over the steps."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from scoredist3d.config import Schedule, option
from scoredist3d.diffusion.prediction import Prediction
from scoredist3d.diffusion.schedule import per_item
from scoredist3d.guidance.core.base import Guidance
from scoredist3d.guidance.core.context import StepContext
from scoredist3d.guidance.core.noise_fields import PersistentNoise
from scoredist3d.guidance.core.outputs import Score
from scoredist3d.guidance.core.timesteps import timestep_tensor
from scoredist3d.guidance.core.weighting import ode_step_weight
from scoredist3d.priors.base import Prior
from scoredist3d.priors.conditioning import CFGConditions
from scoredist3d.seeding import Rng


class FlowDistillation(Guidance):
    """G = w(t) (eps_hat(alpha_t z + sigma_t n, t, y) - n), with noise n that :meth:`fixed_noise` defines.

    With x_t = alpha_t z + sigma_t n and fixed n, the probability-flow ODE is dz / d lambda = eps_hat - n, where
    lambda = sigma / alpha (FSD, arXiv 2405.10988, proposition 1). With one decreasing timestep (the same schedule for
    t_min and t_max, or ``dreamtime``), plain SGD at learning rate 1 and ``weighting: lambda-step``, the run is
    therefore DDIM (for flow models: Euler) on z. Fresh noise instead gives annealed SDS, which has less variety.
    """

    @dataclass
    class Config(Guidance.Config):
        """Options of flow distillation."""

        weighting: Literal["lambda", "lambda-step", "sds", "uniform", "fantasia3d", "flow"] = option(  # type: ignore[assignment]
            "lambda",
            "Weight w(t). lambda: sigma/alpha; lambda-step: the decrease of sigma/alpha to the timestep of the next "
            "step, which is DDIM; sds: sigma^2; uniform: 1; fantasia3d: alpha sigma^2; flow: 1/alpha.",
        )
        sqrt_beta: Schedule = option(
            1.0,
            "Weight of the fixed noise: n = sqrt_beta n(c) + sqrt(1 - sqrt_beta^2) fresh noise; 0 is SDS.",
            ge=0,
            le=1,
        )
        sde_rate: Schedule = option(
            0.0,
            "Rate g: after every step n(c) becomes sqrt(1 - g) n(c) + sqrt(g) fresh noise. The authors of CFD use "
            "1e-4; a constant 1 is SDS.",
            ge=0,
            le=1,
        )

        def validate(self) -> list[str]:
            """Require one timestep per step for ``lambda-step``, and a rate below 1 or a constant 1."""
            problems = super().validate()
            if self.weighting == "lambda-step" and self.dreamtime.steps == 0 and self.t_min != self.t_max:
                problems.append(
                    "weighting: lambda-step needs one timestep per step; set t_min and t_max to the same schedule"
                )
            if max(self.sde_rate.values) == 1.0 and not self.renews_fully:
                problems.append("sde_rate: a rate that changes must stay below 1; use 0.999, or the constant 1")
            return problems

        @property
        def renews_fully(self) -> bool:
            """Whether all noise is fresh at every step."""
            return min(self.sde_rate.values) == 1.0

    config: Config

    def __init__(self, config: Config, *, prior: Prior, rng: Rng | None = None) -> None:
        """Create the method; for the arguments see :class:`Guidance`."""
        super().__init__(config, prior=prior, rng=rng)
        self._persistent = PersistentNoise(config.sde_rate)

    @abstractmethod
    def fixed_noise(self, z: Tensor, conditions: CFGConditions, ctx: StepContext) -> Tensor:
        """Noise n(c) (B, C, h, w) of the views at this step, N(0, 1) in every element."""

    def constant_noise(self, z: Tensor, ctx: StepContext) -> Tensor:
        """One noise image (B, C, h, w) per particle for all views; equal for all subclasses."""
        return self._persistent(ctx, z, "fsd/constant")

    def score_gradient(self, z: Tensor, conditions: CFGConditions, ctx: StepContext) -> Score:
        """w(t) times the difference of the predicted noise and n."""
        n = self.noise(z, conditions, ctx)
        prediction = self.guided(self.schedule.add_noise(z, n, ctx.t), conditions, ctx)
        if self.config.weighting == "lambda-step":
            return Score(self._lambda_step(prediction, z, ctx))
        return Score(self.weighted(prediction, z, n))

    def noisy_input(self, z: Tensor, conditions: CFGConditions, ctx: StepContext) -> Tensor:
        """Noisy latents x_t with the noise of their views."""
        return self.schedule.add_noise(z, self.noise(z, conditions, ctx), ctx.t)

    def noise(self, z: Tensor, conditions: CFGConditions, ctx: StepContext) -> Tensor:
        """Blend n (B, C, h, w) of fixed and fresh noise; every element is N(0, 1)."""
        share = self._value("sqrt_beta", ctx.step)
        if share == 0.0 or self.config.renews_fully:
            return ctx.noise(z)
        n = self.fixed_noise(z, conditions, ctx)
        return n if share == 1.0 else share * n + (1.0 - share**2) ** 0.5 * ctx.noise(z)

    def _lambda_step(self, prediction: Prediction, z: Tensor, ctx: StepContext) -> Tensor:
        """Gradient (lambda_t - lambda_s) (eps_hat - n), where s is the timestep of the next step."""
        timestep, following = ctx.timesteps[0], self.sample_timesteps(1, ctx.step + 1, ctx.rng)[0]
        if following == timestep:
            return torch.zeros_like(z)
        weight = ode_step_weight(self.schedule, ctx.t, timestep_tensor([following], z))
        return per_item(weight, z) * (z - prediction.x0)

"""Score distillation for rectified flows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from scoredist3d.config import Schedule, option
from scoredist3d.diffusion.cfg import predict_each
from scoredist3d.diffusion.samplers import solve_ode
from scoredist3d.diffusion.schedule import per_item
from scoredist3d.guidance.core.base import Guidance
from scoredist3d.guidance.core.context import StepContext
from scoredist3d.guidance.core.outputs import NFE, Score
from scoredist3d.guidance.core.weighting import Weighting
from scoredist3d.priors.conditioning import CFGConditions
from scoredist3d.registry import register


@register(
    "guidance",
    "rfds",
    summary="Velocity regression on a rectified flow, with noise that may be coupled to the image.",
    arxiv="2406.03293",
)
class RectifiedFlowDistillation(Guidance):
    """RFDS: G = v_hat(x_t, t, y) - v, the guided velocity minus the velocity of the straight path from z to its noise.

    For x_s = (1 - s) z + s eps and v = eps - z this is (eps_hat - eps) / (1 - s), i.e. SDS with w = 1 / alpha. In this
    form it applies to every prior, after conversion of the prediction to a velocity; on variance-preserving chains
    v = alpha eps - sigma z. The authors' loss is a mean over the elements; ours is a sum.

    The noise eps is fresh (RFDS) or coupled to the image. ``reverse`` moves it once towards the noise that the prior
    predicts from x_t (RFDS-Rev): eps + eta (v_hat(x_t, t, y) - v). ``trajectory`` uses the end of the probability-flow
    ODE from z to the noisiest timestep (UCM of FlowDreamer, arXiv 2408.05008). The predictions of both are
    conditioned on the prompt and use no classifier-free guidance.
    """

    @dataclass
    class Config(Guidance.Config):
        """Options of RFDS."""

        guidance_scale: Schedule = option(
            50.0,
            "Guidance scale gamma in eps_u + gamma (eps_c - eps_u); the authors use 50 for InstaFlow, 100 for SD 3.",
        )
        weighting: Weighting = option(
            "flow",
            "Weight w(t) of the noise difference. flow: 1/alpha, which is velocity regression; sds: sigma^2; uniform: "
            "1; fantasia3d: alpha sigma^2; lambda: sigma/alpha.",
        )
        coupling: Literal["none", "reverse", "trajectory"] = option(
            "none", "Coupling of noise and image. none: fresh noise; reverse: RFDS-Rev; trajectory: UCM of FlowDreamer."
        )
        eta: Schedule | None = option(
            None,
            "Step size eta of coupling=reverse; null uses alpha_t, as the authors do for SD 3 (1 for InstaFlow).",
            ge=0,
        )
        coupling_start: int = option(
            1800, "First step that uses coupling=trajectory; earlier steps use fresh noise.", ge=0
        )
        coupling_steps: int = option(3, "Number of ODE steps for coupling=trajectory.", ge=1)
        random_weight: bool = option(
            False, "Multiply the gradient of each step by sigmoid(u), u ~ N(0, 1), as in the authors' code for SD 3."
        )

    config: Config

    def score_gradient(self, z: Tensor, conditions: CFGConditions, ctx: StepContext) -> Score:
        """Weighted difference v_hat - v with fresh or coupled noise."""
        eps = self._coupled_noise(z, conditions, ctx)
        prediction = self.guided(self.schedule.add_noise(z, eps, ctx.t), conditions, ctx)
        gradient = self.weighted(prediction, z, eps)
        if self.config.random_weight:
            gradient = gradient * torch.randn((), generator=ctx.rng("rfds/weight", ctx.step)).sigmoid().item()
        return Score(gradient)

    def nfe(self, conditions: CFGConditions, ctx: StepContext) -> NFE:
        """One guided prediction, plus the unguided predictions needed to compute coupled noise."""
        coupling = {"none": 0, "reverse": 1, "trajectory": self.config.coupling_steps if self._couples(ctx) else 0}
        return NFE(super().nfe(conditions, ctx).prior + coupling[self.config.coupling])

    def _couples(self, ctx: StepContext) -> bool:
        return self.config.coupling == "trajectory" and ctx.step >= self.config.coupling_start

    def _coupled_noise(self, z: Tensor, conditions: CFGConditions, ctx: StepContext) -> Tensor:
        if self.config.coupling == "reverse":
            return self._reversed(z, ctx.noise(z), conditions, ctx)
        return self._transported(z, conditions) if self._couples(ctx) else ctx.noise(z)

    def _reversed(self, z: Tensor, eps: Tensor, conditions: CFGConditions, ctx: StepContext) -> Tensor:
        """Coupled noise eps + eta (v_hat - v); with eta = alpha it is eps_hat."""
        x_t = self.schedule.add_noise(z, eps, ctx.t)
        prediction = predict_each(self.prior, x_t, ctx.t, [conditions.positive])[0]
        if self.config.eta is None:
            return prediction.eps
        return eps + self.config.eta(ctx.step) * (prediction.v - self.schedule.velocity(z, eps, ctx.t))

    def _transported(self, z: Tensor, conditions: CFGConditions) -> Tensor:
        """Noise whose straight path from z passes through the end point of the ODE."""

        def predict(x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
            prediction = predict_each(self.prior, x_t, t, [conditions.positive])[0]
            return prediction.eps, prediction.x0

        # The ODE starts at the prior's lowest timestep; only velocity predictions are defined at the clean image.
        lowest = float(self.schedule.quantize(torch.zeros((), dtype=torch.float64)))
        timesteps = self.schedule.timesteps(self.config.coupling_steps, end=lowest)[::-1]
        start, end = z.new_full((len(z),), timesteps[0]), z.new_full((len(z),), timesteps[-1])
        x = solve_ode(self.schedule, predict, per_item(self.schedule.alpha(start), z) * z, timesteps)
        alpha, sigma = (per_item(c, z) for c in self.schedule.coefficients(end))
        return (x - alpha * z) / sigma

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
from scoredist3d.guidance.core.base import NFE, Guidance, Score, Weighting
from scoredist3d.guidance.core.context import StepContext
from scoredist3d.priors.conditioning import CFGConditions
from scoredist3d.registry import register


@register(
    "guidance",
    "rfds",
    summary="Regress a flow's velocity on noise that may be coupled to the image.",
    arxiv="2406.03293",
)
class RectifiedFlowDistillation(Guidance):
    """G = v_hat(x_t, t, y) - v, the gap between the guided velocity and that of the straight path from z to its noise.

    For x_s = (1 - s) z + s eps and v = eps - z this is (eps_hat - eps) / (1 - s): SDS with w = 1 / alpha. Written so,
    it runs on every prior through conversion; on variance-preserving chains v = alpha eps - sigma z. The authors' loss
    is a mean over the elements, ours a sum.

    The noise eps is drawn afresh (RFDS), or coupled to the image so that one path belongs to both: ``reverse`` moves
    it once towards the noise that the model sees in x_t (RFDS-Rev), eps + eta (v_hat(x_t, t, y) - v); ``trajectory``
    takes the end of the probability-flow ODE from z to the noisiest timestep (UCM of FlowDreamer, arXiv 2408.05008). Both
    use the prompt without classifier-free guidance.
    """

    @dataclass
    class Config(Guidance.Config):
        """Options of RFDS."""

        guidance_scale: Schedule = option(
            50.0, "gamma of eps_u + gamma (eps_c - eps_u); the authors use 50 on InstaFlow and 100 on SD 3."
        )
        weighting: Weighting = option(
            "flow",
            "w(t) before the noise difference: flow 1/alpha, which is velocity regression; sds sigma^2, uniform 1, "
            "fantasia3d alpha sigma^2, lambda sigma/alpha.",
        )
        coupling: Literal["none", "reverse", "trajectory"] = option(
            "none", "Where the noise comes from: none drawn afresh; reverse RFDS-Rev; trajectory FlowDreamer's UCM."
        )
        eta: Schedule | None = option(
            None, "Rate of reverse; alpha_t (the authors' choice for SD 3) where not given, 1 for InstaFlow.", ge=0
        )
        coupling_start: int = option(1800, "First step whose noise is that of trajectory; drawn afresh before.", ge=0)
        coupling_steps: int = option(3, "Steps of trajectory from the image to the noise.", ge=1)
        random_weight: bool = option(
            False, "Multiply each step's gradient with sigmoid(u), u ~ N(0, 1), as the authors' code for SD 3 does."
        )

    config: Config

    def score_gradient(self, z: Tensor, conditions: CFGConditions, ctx: StepContext) -> Score:
        """v_hat - v on fresh or coupled noise."""
        eps = self._coupled_noise(z, conditions, ctx)
        prediction = self.guided(self.schedule.add_noise(z, eps, ctx.t), conditions, ctx)
        gradient = self.weighted(prediction, z, eps)
        if self.config.random_weight:
            gradient = gradient * torch.randn((), generator=ctx.rng("rfds/weight", ctx.step)).sigmoid().item()
        return Score(gradient)

    def nfe(self, conditions: CFGConditions, ctx: StepContext) -> NFE:
        """One guided prediction, and the unguided ones of the coupling."""
        coupling = {"none": 0, "reverse": 1, "trajectory": self.config.coupling_steps if self._couples(ctx) else 0}
        return NFE(super().nfe(conditions, ctx).prior + coupling[self.config.coupling])

    def _couples(self, ctx: StepContext) -> bool:
        return self.config.coupling == "trajectory" and ctx.step >= self.config.coupling_start

    def _coupled_noise(self, z: Tensor, conditions: CFGConditions, ctx: StepContext) -> Tensor:
        if self.config.coupling == "reverse":
            return self._reversed(z, ctx.noise(z), conditions, ctx)
        return self._transported(z, conditions) if self._couples(ctx) else ctx.noise(z)

    def _reversed(self, z: Tensor, eps: Tensor, conditions: CFGConditions, ctx: StepContext) -> Tensor:
        """eps + eta (v_hat - v); with eta = alpha this is eps_hat."""
        x_t = self.schedule.add_noise(z, eps, ctx.t)
        prediction = predict_each(self.prior, x_t, ctx.t, [conditions.positive])[0]
        if self.config.eta is None:
            return prediction.eps
        return eps + self.config.eta(ctx.step) * (prediction.v - self.schedule.velocity(z, eps, ctx.t))

    def _transported(self, z: Tensor, conditions: CFGConditions) -> Tensor:
        """The noise whose path from z passes the end of the ODE's; equal to that end where it holds no image."""

        def predict(x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
            prediction = predict_each(self.prior, x_t, t, [conditions.positive])[0]
            return prediction.eps, prediction.x0

        # From the lowest timestep the model knows; on the image itself only velocity networks have an answer.
        lowest = float(self.schedule.quantize(torch.zeros((), dtype=torch.float64)))
        timesteps = self.schedule.timesteps(self.config.coupling_steps, end=lowest)[::-1]
        start, end = z.new_full((len(z),), timesteps[0]), z.new_full((len(z),), timesteps[-1])
        x = solve_ode(self.schedule, predict, per_item(self.schedule.alpha(start), z) * z, timesteps)
        alpha, sigma = (per_item(c, z) for c in self.schedule.coefficients(end))
        return (x - alpha * z) / sigma

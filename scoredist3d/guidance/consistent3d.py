"""Consistency distillation sampling (Consistent3D)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from scoredist3d.config import Schedule, option
from scoredist3d.diffusion.cfg import guided_prediction
from scoredist3d.diffusion.schedule import per_item
from scoredist3d.guidance.core.context import StepContext
from scoredist3d.guidance.core.outputs import NFE, Score
from scoredist3d.guidance.core.timesteps import timestep_tensor
from scoredist3d.guidance.core.trajectory import TrajectoryGuidance
from scoredist3d.guidance.core.weighting import Weighting
from scoredist3d.priors.conditioning import CFGConditions
from scoredist3d.registry import register

_SQRT = {"from": 0.7, "to": 0.1, "end": 3000, "shape": "sqrt"}


@register(
    "guidance",
    "consistent3d",
    summary="Compare guided predictions at two nearby points of the ODE through the render with fixed noise.",
    arxiv="2401.09050",
)
class ConsistencyDistillationSampling(TrajectoryGuidance):
    """CDS: G = w(t) [eps(x_t, t, y) - eps(x_s, s, y)] with x_t = alpha_t z + sigma_t n for a fixed noise n.

    x_s is one ODE step below x_t. In predicted images x0 = (x - sigma eps) / alpha, G is
    w(t) (x0(x_s) - x0(x_t)) / lambda_s. The sign is that of the authors' code, which moves z towards the guided
    prediction at the noisier timestep, as ISM does; the paper writes a distance between the two images.

    The timestep of a step is s, and t = s + U(interval). ``guidance_rescale`` corresponds to recon_std_rescale in the
    authors' code: the step to s follows the rescaled image, and x0(x_t) is not rescaled.
    """

    @dataclass
    class Config(TrajectoryGuidance.Config):
        """Options of CDS; the defaults are those of the authors' code."""

        guidance_scale: Schedule = option(
            {"from": 101.0, "to": 51.0, "end": 3000},
            "Guidance scale gamma in eps_u + gamma (eps_c - eps_u), at both timesteps.",
        )
        weighting: Weighting = option(
            "uniform", "Weight w(t) at the noisier timestep t, with the same choices as for sds."
        )
        t_min: Schedule = option(_SQRT, "Lowest timestep s, as a fraction of the prior's range.", ge=0, le=1)
        t_max: Schedule = option(
            _SQRT, "Highest timestep s; give t_min the same schedule to anneal a single timestep.", ge=0, le=1
        )
        interval: tuple[float, float] = option(
            (0.1, 0.3), "Shortest and longest interval t - s, which is drawn uniformly between them.", gt=0, le=1
        )
        t_limit: float = option(
            0.98, "Highest timestep t; s stays below it by at least the shortest interval.", gt=0, le=1
        )
        grad_clip: Schedule | None = option(
            {"from": 2.0, "to": 8.0, "end": 3000}, "Clamp every element of the gradient to [-value, value].", gt=0
        )
        fixed_noise: bool = option(
            True, "Use the same noise sample for a particle in the whole run instead of fresh noise at every step."
        )

        def validate(self) -> list[str]:
            """Require that the bounds of the interval are ordered, and that the lower one is below ``t_limit``."""
            problems = super().validate()
            shortest, longest = self.interval
            if shortest > longest:
                problems.append(f"interval: {shortest:g} is above {longest:g}; give the shorter interval first")
            if shortest >= self.t_limit:
                problems.append(
                    f"interval: {shortest:g} must be below t_limit {self.t_limit:g}; lower it or raise t_limit"
                )
            return problems

    config: Config

    def score_gradient(self, z: Tensor, conditions: CFGConditions, ctx: StepContext) -> Score:
        """w(t) times the difference of the predictions at t and s."""
        above, below = self.interval_timesteps(ctx)
        weight = timestep_tensor([self.weight_at(timestep) for timestep in above], z)
        t, s = timestep_tensor(above, z), timestep_tensor(below, z)
        scale, share = self._value("guidance_scale", ctx.step), self.config.guidance_rescale
        x_t = self.schedule.add_noise(z, self._noise(z, ctx), t)
        upper = guided_prediction(self.prior, x_t, t, conditions, scale)
        rescaled = guided_prediction(self.prior, x_t, t, conditions, scale, rescale=share) if share > 0.0 else upper
        x_s = self.schedule.ddim_step(rescaled.eps, rescaled.x0, t, s)
        difference = rescaled.eps - guided_prediction(self.prior, x_s, s, conditions, scale).eps
        if share > 0.0:
            difference = difference + (rescaled.x0 - upper.x0) / per_item(self.schedule.lambda_(s), z)
        return Score(per_item(weight, z) * difference, diagnostics={"t_upper": t.mean()})

    def nfe(self, conditions: CFGConditions, ctx: StepContext) -> NFE:
        """Two guided predictions; three with ``guidance_rescale``, which evaluates the first one twice."""
        predictions = 3 if self.config.guidance_rescale > 0.0 else 2
        return NFE(predictions * self.guided_nfe(conditions, self._value("guidance_scale", ctx.step)))

    def interval_timesteps(self, ctx: StepContext) -> tuple[list[float], list[float]]:
        """Timesteps t and s of each item; views that the prior denoises jointly share the draw."""
        grid = self.grid
        shortest, longest, limit = (grid.index(share) for share in (*self.config.interval, self.config.t_limit))
        limit = min(limit, grid.highest)
        s = max(min(grid.index(ctx.timesteps[0]), limit - shortest), grid.lowest)
        above = []
        for item in range(len(ctx.timesteps)):
            generator = ctx.rng(f"interval/{item // self.prior.views}", ctx.step)
            draw = torch.rand((), generator=generator, dtype=torch.float64).item()
            above.append(min(s + shortest + int(draw * (longest - shortest)), limit) / grid.count)
        return above, [s / grid.count] * len(above)

    def _noise(self, z: Tensor, ctx: StepContext) -> Tensor:
        return ctx.particle_noise(z, "noise") if self.config.fixed_noise else ctx.noise(z)

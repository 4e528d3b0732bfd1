"""Interval score matching and its generalization, trajectory score matching."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from torch import Tensor

from scoredist3d.config import Schedule, option
from scoredist3d.guidance.core.context import StepContext
from scoredist3d.guidance.core.outputs import NFE, Score
from scoredist3d.guidance.core.timesteps import timestep_tensor
from scoredist3d.guidance.core.trajectory import Grid, TrajectoryGuidance
from scoredist3d.guidance.core.weighting import Weighting
from scoredist3d.priors.conditioning import CFGConditions
from scoredist3d.registry import register
from scoredist3d.seeding import Rng


@register(
    "guidance",
    "ism",
    summary="Compare two predictions that lie an interval apart on the DDIM inversion of the render.",
    arxiv="2311.11284",
)
class IntervalScoreMatching(TrajectoryGuidance):
    """ISM: G = lambda_t [eps_gamma(x_t, t, y) - eps_0(x_mu, mu)] on the unconditional DDIM inversion of z.

    The inversion starts at a low timestep, where z is noised, and reaches x_s at s = t - interval in long steps. One
    more step along eps_0(x_s, s) gives x_t and x_mu. With mu = s (LucidDreamer, eq. 17) and weighting lambda, G is the
    difference of two predicted images, x0(x_s) - x0(x_t). Trajectory score matching (arXiv 2405.11252) uses mu = s +
    (t - s) sqrt(1 - tsm_gamma^2). At tsm_gamma = 0, mu is t, and G is classifier score distillation at an inverted x_t.

    eps_0 is always conditioned on the empty prompt, even if the run has a negative prompt.

    The timesteps are those of the released code. If the prior's scheduler has a ``steps_offset``, as that of
    Stable Diffusion does, it is the lowest index of t, s and the inversion.
    """

    @dataclass
    class Config(TrajectoryGuidance.Config):
        """Options of ISM; the defaults are those of the authors' code."""

        weighting: Weighting = option(
            "lambda", "Weight w(t), with the same choices as for sds; ISM uses lambda = sigma/alpha."
        )
        t_max: Schedule = option(
            {"from": 0.98, "to": 0.5, "end": 1500},
            "Highest timestep; by default it decreases from the whole range to its lower half.",
            ge=0,
            le=1,
        )
        interval: Schedule = option(
            {"from": 0.1, "to": 0.08, "end": 1500}, "Interval t - s, as a fraction of the prior's range.", gt=0, le=1
        )
        inversion_interval: float = option(
            0.2, "Longest step of the inversion, as a fraction of the range.", gt=0, le=1
        )
        inversion_steps: int = option(
            5, "Maximum number of inversion steps; the inversion starts this many steps below s.", ge=0
        )
        inversion_guidance_scale: Schedule = option(
            0.0, "Guidance scale of the inversion and of the subtracted prediction; 0 uses only the empty prompt."
        )
        fixed_noise: bool = option(False, "Start the inversion with noise that is fixed for each particle.")
        offset_noise: float = option(
            0.1, "Standard deviation of a random per-channel offset of the noise that starts the inversion.", ge=0
        )
        tsm_gamma: float = option(1.0, "gamma of trajectory score matching; 1 is interval score matching.", ge=0, le=1)

    config: Config

    @property
    def grid(self) -> Grid:
        """Grid of the prior's timesteps from its ``steps_offset`` upwards."""
        grid = super().grid
        return replace(grid, lowest=max(grid.lowest, self.schedule.steps_offset))

    def sample_timesteps(self, batch: int, step: int, rng: Rng) -> list[float]:
        """Timesteps of the base class, clamped to the lowest timestep of the grid."""
        lowest = self.grid.timestep(0)
        return [max(timestep, lowest) for timestep in super().sample_timesteps(batch, step, rng)]

    def score_gradient(self, z: Tensor, conditions: CFGConditions, ctx: StepContext) -> Score:
        """w(t) times the difference of the guided prediction at t and the unguided prediction at mu."""
        timesteps, mu = self.inversion_timesteps(ctx)
        s, t = timesteps[-1], ctx.timesteps[0]
        inversion, scale = self._inversion(conditions), self._value("inversion_guidance_scale", ctx.step)
        start = self.schedule.add_noise(z, self._start_noise(z, ctx), timestep_tensor(timesteps[:1] * len(z), z))
        below = self.predict_at(self.walk(start, timesteps, inversion, scale), s, inversion, scale)
        guided = self.guided(self.move(below, s, t), conditions, ctx)
        baseline = below if mu == s else self.predict_at(self.move(below, s, mu), mu, inversion, scale)
        return Score(self.weight_at(t) * (guided.eps - baseline.eps), diagnostics={"s": z.new_full((), s)})

    def nfe(self, conditions: CFGConditions, ctx: StepContext) -> NFE:
        """One guided prediction; one unguided prediction per inversion step, at s, and at mu if it differs from s."""
        timesteps, mu = self.inversion_timesteps(ctx)
        unguided = len(timesteps) + (mu != timesteps[-1])
        scale = self._value("inversion_guidance_scale", ctx.step)
        guided = self.guided_nfe(conditions, self._value("guidance_scale", ctx.step))
        return NFE(guided + unguided * self.guided_nfe(self._inversion(conditions), scale))

    def inversion_timesteps(self, ctx: StepContext) -> tuple[list[float], float]:
        """Timesteps of the inversion up to s, and the timestep mu of the subtracted prediction."""
        grid, config = self.grid, self.config
        t = grid.index(ctx.timesteps[0])
        # A decreasing interval is rounded down, as in the released code.
        interval = max(1, math.floor(self._value("interval", ctx.step) * grid.count + 1e-6))
        s = max(t - interval, grid.lowest)
        stride = max(1, grid.index(config.inversion_interval))
        start = max(s - stride * config.inversion_steps, grid.lowest)
        mu = s + round((t - s) * math.sqrt(1.0 - config.tsm_gamma**2))
        return [*(index / grid.count for index in range(start, s, stride)), s / grid.count], mu / grid.count

    def _start_noise(self, z: Tensor, ctx: StepContext) -> Tensor:
        draw = ctx.particle_noise if self.config.fixed_noise else ctx.noise
        return draw(z, "noise") + self.config.offset_noise * draw(z[:, :, :1, :1], "offset")

    @staticmethod
    def _inversion(conditions: CFGConditions) -> CFGConditions:
        """Conditions of the inversion: the prompt and the empty prompt, without Perp-Neg."""
        return replace(conditions, unconditional=conditions.empty or conditions.unconditional, negatives=())

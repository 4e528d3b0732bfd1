"""Asynchronous score distillation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from scoredist3d.config import Schedule, option
from scoredist3d.diffusion.cfg import predict_each
from scoredist3d.diffusion.schedule import per_item
from scoredist3d.guidance.core.base import Guidance
from scoredist3d.guidance.core.context import StepContext
from scoredist3d.guidance.core.outputs import NFE, Score
from scoredist3d.guidance.core.timesteps import per_image, timestep_tensor, uniform_draws
from scoredist3d.guidance.core.trajectory import Grid
from scoredist3d.priors.conditioning import CFGConditions
from scoredist3d.registry import register

ROUNDING = 1e-9
"""Tolerance for rounding errors, in timesteps, when a shift is rounded down to whole timesteps."""


@register(
    "guidance",
    "async-sd",
    summary="VSD without a second network: the score of the renders is the prior's at a later timestep.",
    arxiv="2407.02040",
)
class AsynchronousScoreDistillation(Guidance):
    """Async SD: G = w(t) (eps_gamma(x_t, t, y) - eps(x_u, u, y)), u = t + delta, delta ~ U[0, eta (t - t_min)].

    x_t and x_u are z with the same noise. VSD trains a second network to reduce the error of the noise prediction on
    renders. A frozen denoiser has a smaller error at larger timesteps, so the paper evaluates the prior itself at u,
    for the prompt and without guidance. With delta = 0, G is gamma - 1 times that of classifier score distillation.

    The paper calls the method ASD; ``asd`` here is adversarial score distillation. The authors' code clamps u to
    timestep 1 of 1000 or more, which matters only if t_min is 0.
    """

    @dataclass
    class Config(Guidance.Config):
        """Options of asynchronous score distillation; the defaults are those of the authors' configurations.

        These also anneal t_min from 0.5 to 0.02 and t_max from 0.98 to 0.5, which ``configs/guidance`` contains.
        """

        shift: Schedule = option(0.1, "Largest shift eta of the second timestep, as a fraction of t - t_min.", ge=0)
        random_shift: bool = option(
            True, "Draw the shift of each image uniformly up to the largest one; false always uses the largest."
        )

    config: Config

    def score_gradient(self, z: Tensor, conditions: CFGConditions, ctx: StepContext) -> Score:
        """w(t) times the difference of the guided prediction at t and the prompt's prediction at u."""
        x_t, eps = self.noised(z, ctx)
        later = self.later_timesteps(ctx)
        u = timestep_tensor(later, z)
        guided = self.guided(x_t, conditions, ctx)
        second = predict_each(self.prior, self.schedule.add_noise(z, eps, u), u, [conditions.positive])[0]
        gradient = per_item(self.time_weight(ctx.t), z) * (guided.eps - second.eps)
        return Score(gradient, diagnostics={"u": u.mean()})

    def later_timesteps(self, ctx: StepContext) -> list[float]:
        """Timestep u of each image; the shift is rounded down to whole timesteps and ends at the highest one."""
        grid, batch, views = Grid.of(self.schedule), len(ctx.timesteps), self.prior.views
        part = torch.ones(batch)
        if self.config.random_shift:
            part = uniform_draws(ctx.rng, "shift", ctx.step, batch, views)
        later, eta, low = [], self._value("shift", ctx.step), self._value("t_min", ctx.step) * grid.count
        for timestep, fraction in zip(ctx.timesteps, per_image(part, batch, views), strict=True):
            k = grid.index(timestep)
            largest = max(min(eta * (k - low), grid.highest - k), 0.0)
            later.append((k + int(fraction * largest + ROUNDING)) / grid.count)
        return later

    def nfe(self, conditions: CFGConditions, ctx: StepContext) -> NFE:
        """One guided prediction at t and one evaluation of the prompt at u."""
        return NFE(super().nfe(conditions, ctx).prior + 1)

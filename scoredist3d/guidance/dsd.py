"""Diverse Score Distillation."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import groupby, pairwise
from typing import Literal

import torch
from torch import Tensor

from scoredist3d.config import Schedule, option
from scoredist3d.diffusion.schedule import PredictionType
from scoredist3d.guidance.core.base import NFE, Score, StepContext
from scoredist3d.guidance.core.context import select, timestep_tensor
from scoredist3d.guidance.core.trajectory import TrajectoryGuidance, told, told_the_same
from scoredist3d.priors.base import CFGConditions, Prediction, Prior
from scoredist3d.registry import register
from scoredist3d.seeding import Rng

_MIN, _LATE_MIN = 1, 10
"""Lowest timestep of u, early and late in the run."""

_SQRT = {"from": 0.98, "to": 0.32, "end": 10000, "shape": "sqrt"}


@dataclass
class Path:
    """The predictions along one particle's trajectory.

    Attributes:
        told: What the network was told.
        scale: The guidance scale.
        predictions: By timestep, the step that made it, the output (C, h, w) and its kind.
    """

    told: list[Tensor]
    scale: float
    predictions: dict[float, tuple[int, Tensor, PredictionType]] = field(default_factory=dict)


@register(
    "guidance",
    "dsd",
    summary="One starting noise per asset: renders follow the sampling trajectory that starts there.",
    arxiv="2412.06780",
)
class DiverseScoreDistillation(TrajectoryGuidance):
    """G = w(t) [eps(alpha_t z + sigma_t n, t, y) - eps(alpha_u z + sigma_u n, u, y)], n = eps(x(u), u, y), u >= t.

    x(u) is the state of the sampling ODE that starts at the particle's own noise eps*, with the prompt of the item's
    view. On its trajectory z = x0(u), and the step is then DDIM's from u to t (see SDI). Assets differ because their
    starting noises do.

    The timestep t falls by giving t_min and t_max the same schedule; u is drawn from a window above it that closes as t
    reaches the end of that schedule. Where neither prompt nor camera change between steps (2D), the trajectory is
    computed once.

    ``exact`` is DSD*: the schedule's own timesteps are the ODE's grid and u is the timestep of the step before, so that
    plain gradient descent at a rate equal to the batch size, with every particle in every step, is DDIM sampling.
    """

    @dataclass
    class Config(TrajectoryGuidance.Config):
        """Options of DSD; defaults as in the authors' code."""

        guidance_scale: Schedule = option(7.5, "gamma of the prediction at t, in the meaning of diffusers.")
        ode_guidance_scale: Schedule | None = option(None, "gamma of the ODE; guidance_scale where not given.")
        sub_guidance_scale: Schedule | None = option(
            1.0, "gamma of the subtracted prediction at u; guidance_scale where not given (null)."
        )
        t_min: Schedule = option(_SQRT, "Lowest timestep t, as a share of the model's.", ge=0, le=1)
        t_max: Schedule = option(
            _SQRT, "Highest timestep t; the same schedule as t_min anneals a single one.", ge=0, le=1
        )
        ode_steps: int = option(10, "Steps of the ODE over the whole range.", ge=1)
        interval: float = option(0.1, "Width of the window for u, as a share of t minus its final value.", ge=0)
        random_interval: bool = option(True, "Draw u from the window; its upper end otherwise.")
        view_noise: Literal["shared", "per-view"] = option(
            "shared", "Starting noise of views that the prior denoises jointly: one for all, or one for each."
        )
        cache_trajectory: Literal["auto", "never"] = option(
            "auto", "Keep the ODE's predictions while a particle's prompt and camera stay the same."
        )
        exact: bool = option(
            False, "DSD*: follow DDIM on the timesteps of the t schedule, one optimiser step per timestep."
        )

        def validate(self) -> list[str]:
            """DSD* leaves no choice."""
            problems = super().validate()
            if not self.exact:
                return problems
            if self.weighting != "lambda":
                problems.append("exact: needs weighting: lambda")
            others = (self.ode_guidance_scale, self.sub_guidance_scale)
            if any(scale is not None and scale != self.guidance_scale for scale in others):
                problems.append("exact: needs one scale; set ode_guidance_scale and sub_guidance_scale to null")
            one_timestep = self.t_min == self.t_max and self.t_min.never_rises
            if not one_timestep and not self.dreamtime.steps:
                problems.append("exact: needs t_min and t_max to be the same falling schedule")
            return problems

    config: Config

    def __init__(self, config: Config, *, prior: Prior, rng: Rng | None = None) -> None:
        """See :class:`Guidance`."""
        super().__init__(config, prior=prior, rng=rng)
        # Not saved: a resumed run computes the same trajectories again.
        self._paths: dict[int, Path] = {}
        self._views_differ = False

    def score_gradient(self, z: Tensor, conditions: CFGConditions, ctx: StepContext) -> Score:
        """w(t) times the difference of two predictions that share the ODE's noise."""
        timesteps, t = self.ode_timesteps(ctx), ctx.timesteps[0]
        readout = self._read_out(z, conditions, ctx, timesteps)
        if self.config.exact and ctx.step == 0:
            return Score(z - readout.x0)
        u = timesteps[-1]
        lead, sub = self._scales(ctx)[1:]
        upper, lower = (timestep_tensor([timestep] * len(z), z) for timestep in (u, t))
        subtracted = self.guided(self.schedule.add_noise(z, readout.eps, upper), conditions, ctx, t=upper, scale=sub)
        leading = self.guided(self.schedule.add_noise(z, readout.eps, lower), conditions, ctx, t=lower, scale=lead)
        gradient = self.weight_at(t) * (leading.eps - subtracted.eps)
        return Score(gradient, diagnostics={"u": z.new_full((), u)})

    def nfe(self, conditions: CFGConditions, ctx: StepContext) -> NFE:
        """Two predictions, and one per timestep of the ODE that is not in the cache."""
        timesteps = self.ode_timesteps(ctx)
        paths = self._current_paths(conditions, ctx)
        ode, lead, sub = (self.guided_nfe(conditions, scale) for scale in self._scales(ctx))
        evaluations = 0.0
        for timestep in timesteps:
            if paths is None or not self._keeps(timestep, timesteps):
                evaluations += 1
            else:
                known = [path.predictions.get(timestep) for path in paths]
                evaluations += sum(entry is None or entry[0] == ctx.step for entry in known) / len(known)
        first = self.config.exact and ctx.step == 0
        return NFE(evaluations * ode + (0 if first else lead + sub))

    def ode_timesteps(self, ctx: StepContext) -> list[float]:
        """The timesteps at which the ODE is evaluated: its grid above u, then u."""
        grid = self.grid
        if self.config.exact:
            past = [self.sample_timesteps(1, earlier, ctx.rng)[0] for earlier in range(max(ctx.step, 1))]
            return [timestep for timestep, _ in groupby(past)]
        u = self._upper(ctx)
        points = torch.linspace(grid.highest, grid.lowest, self.config.ode_steps + 1, dtype=torch.float64)
        return [*(index / grid.count for index in points.int().tolist() if index > u), u / grid.count]

    def start_noise(self, z: Tensor, ctx: StepContext) -> Tensor:
        """(B, C, h, w), eps* of the particle each item shows."""
        noise = ctx.particle_noise(z, "start")
        if self.config.view_noise == "per-view":
            for view in range(1, self.prior.views):
                noise[view :: self.prior.views] = ctx.particle_noise(z, f"start/{view}")[view :: self.prior.views]
        return noise

    def _upper(self, ctx: StepContext) -> int:
        """Index of u = t + U(0, 1) min(interval (t - t_end), top - t), one draw for the batch.

        u is at least timestep 1, and at least 10 in the last quarter of t's way down, as in the authors' code.
        """
        grid = self.grid
        t = grid.index(ctx.timesteps[0])
        end = grid.index(min(self.config.t_min.values))
        draw = 1.0
        if self.config.random_interval:
            draw = torch.rand((), generator=ctx.rng("u", ctx.step), dtype=torch.float64).item()
        width = min(self.config.interval * (t - end), grid.highest - t)
        lowest = _LATE_MIN if self._late(ctx.step) else _MIN
        return min(max(t + int(draw * max(width, 0.0)), lowest), grid.highest)

    def _late(self, step: int) -> bool:
        """Whether an annealed t has more than three quarters of its way behind it."""
        timestep = self.config.t_max
        start, end = timestep.start_value, timestep.end_value
        return timestep == self.config.t_min and abs(timestep(step) - start) > 0.75 * abs(end - start)

    def _scales(self, ctx: StepContext) -> tuple[float, float, float]:
        """gamma of the ODE, of the leading and of the subtracted prediction."""
        config = self.config
        lead = config.guidance_scale
        ode = lead if config.ode_guidance_scale is None else config.ode_guidance_scale
        sub = lead if config.sub_guidance_scale is None else config.sub_guidance_scale
        return ode(ctx.step), lead(ctx.step), sub(ctx.step)

    def _read_out(self, z: Tensor, conditions: CFGConditions, ctx: StepContext, timesteps: list[float]) -> Prediction:
        """The ODE's prediction at the last of its timesteps."""
        x = self.start_noise(z, ctx)
        paths = self._current_paths(conditions, ctx)
        for start, stop in pairwise(timesteps):
            x = self.move(self._on_ode(x, start, conditions, ctx, paths), start, stop)
        kept = paths if self._keeps(timesteps[-1], timesteps) else None
        return self._on_ode(x, timesteps[-1], conditions, ctx, kept)

    def _keeps(self, timestep: float, timesteps: list[float]) -> bool:
        """Whether the timestep belongs to the grid that all steps share; u does only in DSD*."""
        return self.config.exact or timestep != timesteps[-1]

    def _on_ode(
        self, x: Tensor, timestep: float, conditions: CFGConditions, ctx: StepContext, paths: list[Path] | None
    ) -> Prediction:
        """The prediction at a state of the ODE, from the cache where it is known."""
        scale, rescale = self._scales(ctx)[0], self.config.guidance_rescale
        if paths is None:
            return self.predict_at(x, timestep, conditions, scale, rescale=rescale)
        new = [item for item, path in enumerate(paths) if timestep not in path.predictions]
        if new:
            index = torch.tensor(new)
            fresh = self.predict_at(x[index], timestep, select(conditions, index, len(x)), scale, rescale=rescale)
            for i, item in enumerate(new):
                paths[item].predictions[timestep] = (ctx.step, fresh.output[i], fresh.kind)
        known = [path.predictions[timestep] for path in paths]
        output = torch.stack([entry[1] for entry in known]).to(x)
        return Prediction(output, known[0][2], x, timestep_tensor([timestep] * len(x), x), self.schedule)

    def _current_paths(self, conditions: CFGConditions, ctx: StepContext) -> list[Path] | None:
        """The cache of every item, emptied where its prompt has changed; None where views differ."""
        if self.config.cache_trajectory == "never" or self._views_differ:
            return None
        if len(set(ctx.particles)) < len(ctx.particles):
            return None
        scale = self._scales(ctx)[0]
        for item, particle in enumerate(ctx.particles):
            now = told(select(conditions, slice(item, item + 1), len(ctx.particles)))
            path = self._paths.get(particle)
            if path is not None and not told_the_same(path.told, now):
                self._views_differ, self._paths = True, {}
                return None
            if path is None or path.scale != scale:
                self._paths[particle] = Path(now, scale)
        return [self._paths[particle] for particle in ctx.particles]

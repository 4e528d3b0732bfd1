"""Diverse score distillation."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import groupby, pairwise
from typing import Literal

import torch
from torch import Tensor

from scoredist3d.config import Schedule, option
from scoredist3d.diffusion.prediction import Prediction
from scoredist3d.diffusion.schedule import PredictionType
from scoredist3d.guidance.core.context import StepContext, select
from scoredist3d.guidance.core.outputs import NFE, Score
from scoredist3d.guidance.core.timesteps import timestep_tensor
from scoredist3d.guidance.core.trajectory import TrajectoryGuidance, conditioning_tensors, same_conditioning
from scoredist3d.priors.base import Prior
from scoredist3d.priors.conditioning import CFGConditions
from scoredist3d.registry import register
from scoredist3d.seeding import Rng

_MIN, _LATE_MIN = 1, 10
"""Lowest timestep index of u, early and late in the run."""

_SQRT = {"from": 0.98, "to": 0.32, "end": 10000, "shape": "sqrt"}


@dataclass
class Path:
    """Cached predictions along the ODE trajectory of one particle.

    Attributes:
        conditioning: Conditioning tensors with which the predictions were computed.
        scale: Guidance scale with which the predictions were computed.
        predictions: For each timestep, the optimizer step of the evaluation, the network output (C, h, w) and its kind.
    """

    conditioning: list[Tensor]
    scale: float
    predictions: dict[float, tuple[int, Tensor, PredictionType]] = field(default_factory=dict)


@register(
    "guidance",
    "dsd",
    summary="One initial noise per asset: renders follow the sampling trajectory that starts from it.",
    arxiv="2412.06780",
)
class DiverseScoreDistillation(TrajectoryGuidance):
    """DSD: G = w(t) [eps(alpha_t z + sigma_t n, t, y) - eps(alpha_u z + sigma_u n, u, y)], n = eps(x(u), u, y), u >= t.

    x(u) is the state at u of the sampling ODE that starts from the particle's initial noise eps*, with the prompt of
    the item's view. If z = x0(u) lies on this trajectory, the step is the DDIM step from u to t (compare SDI).
    Different initial noises give different assets.

    To anneal the timestep t, set t_min and t_max to the same schedule. u is drawn from a window above t, which closes
    as t reaches the end of its schedule. If neither the prompt nor the camera changes between steps (2D), the
    trajectory is computed once.

    ``exact`` is DSD*: the ODE is solved on the timesteps of the schedule of t, and u is the timestep of the previous
    step. Plain gradient descent with a learning rate equal to the batch size, with every particle in every step, is
    then DDIM sampling.
    """

    @dataclass
    class Config(TrajectoryGuidance.Config):
        """Options of DSD; the defaults are those of the authors' code."""

        guidance_scale: Schedule = option(
            7.5, "Guidance scale gamma of the prediction at t, in eps_u + gamma (eps_c - eps_u)."
        )
        ode_guidance_scale: Schedule | None = option(None, "Guidance scale of the ODE; null uses guidance_scale.")
        sub_guidance_scale: Schedule | None = option(
            1.0, "Guidance scale of the subtracted prediction at u; null uses guidance_scale."
        )
        t_min: Schedule = option(_SQRT, "Lowest timestep t, as a fraction of the prior's range.", ge=0, le=1)
        t_max: Schedule = option(
            _SQRT, "Highest timestep t; give t_min the same schedule to anneal a single timestep.", ge=0, le=1
        )
        ode_steps: int = option(10, "Number of ODE steps over the whole range of timesteps.", ge=1)
        interval: float = option(
            0.1,
            "Width of the window above t that contains the timestep u, as a fraction of t minus its final value.",
            ge=0,
        )
        random_interval: bool = option(
            True, "Draw the timestep u uniformly from its window above t; false uses the upper end of the window."
        )
        view_noise: Literal["shared", "per-view"] = option(
            "shared",
            "Initial noise of views that the prior denoises jointly. shared: one for all; per-view: one for each.",
        )
        cache_trajectory: Literal["auto", "never"] = option(
            "auto",
            "auto: reuse the ODE's predictions while a particle's prompt and camera stay the same; never: recompute.",
        )
        exact: bool = option(
            False, "DSD*: follow DDIM on the timesteps of t's schedule, with one optimizer step per timestep."
        )

        def validate(self) -> list[str]:
            """Reject options with which ``exact`` is not DDIM."""
            problems = super().validate()
            if not self.exact:
                return problems
            if self.weighting != "lambda":
                problems.append("exact: needs weighting: lambda; set it, or set exact: false")
            others = (self.ode_guidance_scale, self.sub_guidance_scale)
            if any(scale is not None and scale != self.guidance_scale for scale in others):
                problems.append("exact: needs equal scales; set ode_guidance_scale and sub_guidance_scale to null")
            one_timestep = self.t_min == self.t_max and self.t_min.start_value >= self.t_min.end_value
            if not one_timestep and not self.dreamtime.steps:
                problems.append("exact: needs one decreasing schedule; set t_min and t_max to the same schedule")
            return problems

    config: Config

    def __init__(self, config: Config, *, prior: Prior, rng: Rng | None = None) -> None:
        """Create the method with an empty cache; for the arguments see :class:`Guidance`."""
        super().__init__(config, prior=prior, rng=rng)
        # Not saved in checkpoints: a resumed run computes the same trajectories again.
        self._paths: dict[int, Path] = {}
        self._views_differ = False

    def score_gradient(self, z: Tensor, conditions: CFGConditions, ctx: StepContext) -> Score:
        """w(t) times the difference of two predictions with the noise n from the ODE."""
        timesteps, t = self.ode_timesteps(ctx), ctx.timesteps[0]
        end = self._solve_ode(z, conditions, ctx, timesteps)
        if self.config.exact and ctx.step == 0:
            return Score(z - end.x0)
        u = timesteps[-1]
        lead, sub = self._scales(ctx)[1:]
        upper, lower = (timestep_tensor([timestep] * len(z), z) for timestep in (u, t))
        subtracted = self.guided(self.schedule.add_noise(z, end.eps, upper), conditions, ctx, t=upper, scale=sub)
        leading = self.guided(self.schedule.add_noise(z, end.eps, lower), conditions, ctx, t=lower, scale=lead)
        gradient = self.weight_at(t) * (leading.eps - subtracted.eps)
        return Score(gradient, diagnostics={"u": z.new_full((), u)})

    def nfe(self, conditions: CFGConditions, ctx: StepContext) -> NFE:
        """Two guided predictions, plus one per ODE timestep that is not in the cache."""
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
        """Timesteps at which the ODE is evaluated: its grid above u, then u."""
        grid = self.grid
        if self.config.exact:
            past = [self.sample_timesteps(1, earlier, ctx.rng)[0] for earlier in range(max(ctx.step, 1))]
            return [timestep for timestep, _ in groupby(past)]
        u = self._upper(ctx)
        points = torch.linspace(grid.highest, grid.lowest, self.config.ode_steps + 1, dtype=torch.float64)
        return [*(index / grid.count for index in points.int().tolist() if index > u), u / grid.count]

    def start_noise(self, z: Tensor, ctx: StepContext) -> Tensor:
        """Initial noise eps* (B, C, h, w) of the particle that each item shows."""
        noise = ctx.particle_noise(z, "start")
        if self.config.view_noise == "per-view":
            for view in range(1, self.prior.views):
                noise[view :: self.prior.views] = ctx.particle_noise(z, f"start/{view}")[view :: self.prior.views]
        return noise

    def _upper(self, ctx: StepContext) -> int:
        """Index of u = t + U(0, 1) min(interval (t - t_end), t_highest - t), with one draw for the batch.

        As in the authors' code, the index is at least 1, and at least 10 in the last quarter of the decrease of t.
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
        """Whether an annealed t has completed more than three quarters of its decrease."""
        timestep = self.config.t_max
        start, end = timestep.start_value, timestep.end_value
        return timestep == self.config.t_min and abs(timestep(step) - start) > 0.75 * abs(end - start)

    def _scales(self, ctx: StepContext) -> tuple[float, float, float]:
        """Guidance scales of the ODE, of the prediction at t, and of the subtracted prediction at u."""
        config = self.config
        lead = config.guidance_scale
        ode = lead if config.ode_guidance_scale is None else config.ode_guidance_scale
        sub = lead if config.sub_guidance_scale is None else config.sub_guidance_scale
        return ode(ctx.step), lead(ctx.step), sub(ctx.step)

    def _solve_ode(self, z: Tensor, conditions: CFGConditions, ctx: StepContext, timesteps: list[float]) -> Prediction:
        """Prediction at the last timestep of the ODE."""
        x = self.start_noise(z, ctx)
        paths = self._current_paths(conditions, ctx)
        for start, stop in pairwise(timesteps):
            x = self.move(self._on_ode(x, start, conditions, ctx, paths), start, stop)
        kept = paths if self._keeps(timesteps[-1], timesteps) else None
        return self._on_ode(x, timesteps[-1], conditions, ctx, kept)

    def _keeps(self, timestep: float, timesteps: list[float]) -> bool:
        """Whether the prediction at ``timestep`` is cached.

        That is the case for the timesteps of the grid, which all steps share. u, the last of ``timesteps``, is on the
        grid only for DSD*.
        """
        return self.config.exact or timestep != timesteps[-1]

    def _on_ode(
        self, x: Tensor, timestep: float, conditions: CFGConditions, ctx: StepContext, paths: list[Path] | None
    ) -> Prediction:
        """Prediction at a state of the ODE, taken from the cache if available."""
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
        """Cached paths of all items; None if caching is off or if a particle's views differ in conditioning."""
        if self.config.cache_trajectory == "never" or self._views_differ:
            return None
        if len(set(ctx.particles)) < len(ctx.particles):
            return None
        scale = self._scales(ctx)[0]
        for item, particle in enumerate(ctx.particles):
            now = conditioning_tensors(select(conditions, slice(item, item + 1), len(ctx.particles)))
            path = self._paths.get(particle)
            if path is not None and not same_conditioning(path.conditioning, now):
                self._views_differ, self._paths = True, {}
                return None
            if path is None or path.scale != scale:
                self._paths[particle] = Path(now, scale)
        return [self._paths[particle] for particle in ctx.particles]

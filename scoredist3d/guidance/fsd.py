"""Flow score distillation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from scoredist3d.config import Schedule, option
from scoredist3d.diffusion.prediction import Prediction
from scoredist3d.diffusion.schedule import per_item
from scoredist3d.guidance.core.base import Guidance
from scoredist3d.guidance.core.context import StepContext
from scoredist3d.guidance.core.noise_fields import PersistentNoise, covered, world_map_crop, world_map_shape
from scoredist3d.guidance.core.outputs import Score
from scoredist3d.guidance.core.timesteps import timestep_tensor
from scoredist3d.guidance.core.weighting import ode_step_weight
from scoredist3d.priors.base import Prior
from scoredist3d.priors.conditioning import CFGConditions
from scoredist3d.registry import register
from scoredist3d.seeding import Rng


@register(
    "guidance",
    "fsd",
    summary="SDS with a single decreasing timestep and noise that is fixed to the object.",
    arxiv="2405.10988",
)
class FlowScoreDistillation(Guidance):
    """FSD: G = w(t) (eps_hat(alpha_t z + sigma_t n(c), t, y) - n(c)), with noise n(c) fixed by the seed and camera c.

    With x_t = alpha_t z + sigma_t n and fixed n, the probability-flow ODE is dz / d lambda = eps_hat - n, where
    lambda = sigma / alpha (proposition 1). With one decreasing timestep (the same schedule for t_min and t_max, or
    ``dreamtime``), plain SGD at learning rate 1 and ``weighting: lambda-step``, the run is therefore DDIM (for flow
    models: Euler) on z. Fresh noise instead gives annealed SDS, which has less variety.

    In 3D, using the same noise image for all views leaves holes in the object. The foreground noise is therefore a
    window of a world map that shifts with the camera, and the background noise is fixed. The map follows the authors'
    later code (arXiv 2501.05445). We do not know the w(t) of the paper; ``lambda`` is that of the later code up to a
    factor of 2.
    """

    @dataclass
    class Config(Guidance.Config):
        """Options of FSD."""

        weighting: Literal["lambda", "lambda-step", "sds", "uniform", "fantasia3d", "flow"] = option(  # type: ignore[assignment]
            "lambda",
            "Weight w(t). lambda: sigma/alpha; lambda-step: the decrease of sigma/alpha to the timestep of the next "
            "step, which is DDIM; sds: sigma^2; uniform: 1; fantasia3d: alpha sigma^2; flow: 1/alpha.",
        )
        noise_field: Literal["world-map", "constant", "random"] = option(
            "world-map",
            "Noise n(c). world-map: windows of a map around the object; constant: one image per particle for all "
            "views; random: fresh noise at every step (annealed SDS).",
        )
        world_map_angle: float = option(
            180.0, "Range of azimuths that one window of the world map spans, in degrees.", gt=0, le=360
        )
        background_noise: Literal["fixed", "random", "none"] = option(
            "fixed",
            "For noise_field=world-map, noise where the render's opacity is below 0.5. fixed: one image per particle; "
            "random: fresh noise; none: the world map, as in the foreground.",
        )
        sqrt_beta: Schedule = option(
            1.0,
            "Weight of the fixed noise: n = sqrt_beta n(c) + sqrt(1 - sqrt_beta^2) fresh noise; 0 is SDS.",
            ge=0,
            le=1,
        )
        sde_rate: Schedule = option(
            0.0,
            "Rate g: after every step n(c) becomes sqrt(1 - g) n(c) + sqrt(g) fresh noise; the authors' later code "
            "uses 1e-4.",
            ge=0,
            lt=1,
        )

        def validate(self) -> list[str]:
            """Require one timestep per step for ``lambda-step``."""
            problems = super().validate()
            if self.weighting == "lambda-step" and self.dreamtime.steps == 0 and self.t_min != self.t_max:
                problems.append(
                    "weighting: lambda-step needs one timestep per step; set t_min and t_max to the same schedule"
                )
            return problems

    config: Config

    def __init__(self, config: Config, *, prior: Prior, rng: Rng | None = None) -> None:
        """Create the method; for the arguments see :class:`Guidance`."""
        super().__init__(config, prior=prior, rng=rng)
        self._persistent = PersistentNoise(config.sde_rate)

    def score_gradient(self, z: Tensor, conditions: CFGConditions, ctx: StepContext) -> Score:
        """w(t) times the difference of the predicted noise and n."""
        n = self.noise(z, conditions, ctx)
        prediction = self.guided(self.schedule.add_noise(z, n, ctx.t), conditions, ctx)
        if self.config.weighting == "lambda-step":
            return Score(self._lambda_step(prediction, z, ctx))
        return Score(self.weighted(prediction, z, n))

    def noisy_input(self, z: Tensor, conditions: CFGConditions, ctx: StepContext) -> Tensor:
        """Noisy latents x_t with the noise n(c) of their views."""
        return self.schedule.add_noise(z, self.noise(z, conditions, ctx), ctx.t)

    def noise(self, z: Tensor, conditions: CFGConditions, ctx: StepContext) -> Tensor:
        """Blend n (B, C, h, w) of fixed and fresh noise; every element is N(0, 1)."""
        share = self._value("sqrt_beta", ctx.step)
        field = self.config.noise_field
        if field == "random" or share == 0.0:
            return ctx.noise(z)
        n = self._persistent(ctx, z, "fsd/constant") if field == "constant" else self._world_map(z, conditions, ctx)
        if share < 1.0:
            n = share * n + (1.0 - share**2) ** 0.5 * ctx.noise(z)
        if field == "world-map" and self.config.background_noise == "random" and ctx.opacity is not None:
            n = torch.where(covered(ctx.opacity, z), n, ctx.noise(z, "fsd/fresh-background"))
        return n

    def _world_map(self, z: Tensor, conditions: CFGConditions, ctx: StepContext) -> Tensor:
        """Window of each particle's world map seen by each camera, with fixed background noise where configured."""
        height, width = z.shape[-2:]
        shape = world_map_shape(height, width, self.config.world_map_angle)
        world = self._persistent(ctx, z.new_empty(*z.shape[:2], *shape), "fsd/world")
        n = world_map_crop(world, conditions.cameras, height, width)
        if self.config.background_noise != "fixed" or ctx.opacity is None:
            return n
        return torch.where(covered(ctx.opacity, z), n, self._persistent(ctx, z, "fsd/background"))

    def _lambda_step(self, prediction: Prediction, z: Tensor, ctx: StepContext) -> Tensor:
        """Gradient (lambda_t - lambda_s) (eps_hat - n), where s is the timestep of the next step."""
        timestep, following = ctx.timesteps[0], self.sample_timesteps(1, ctx.step + 1, ctx.rng)[0]
        if following == timestep:
            return torch.zeros_like(z)
        weight = ode_step_weight(self.schedule, ctx.t, timestep_tensor([following], z))
        return per_item(weight, z) * (z - prediction.x0)

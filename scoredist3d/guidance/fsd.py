"""Flow score distillation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from scoredist3d.config import option
from scoredist3d.guidance.core.context import StepContext
from scoredist3d.guidance.core.flow_distillation import FlowDistillation
from scoredist3d.guidance.core.noise_fields import WORLD_MAP_ANGLE, world_map_noise
from scoredist3d.priors.conditioning import CFGConditions
from scoredist3d.registry import register


@register(
    "guidance",
    "fsd",
    summary="SDS with a single decreasing timestep and noise that is fixed to the object.",
    arxiv="2405.10988",
)
class FlowScoreDistillation(FlowDistillation):
    """FSD: G = w(t) (eps_hat(alpha_t z + sigma_t n(c), t, y) - n(c)), with noise n(c) fixed by the seed and camera c.

    In 3D, using the same noise image for all views leaves holes in the object. The foreground noise is therefore a
    window of a world map that shifts with the camera, and the background noise is fixed. The map follows the authors'
    later code (arXiv 2501.05445). We do not know the w(t) of the paper; ``lambda`` is that of the later code up to a
    factor of 2.
    """

    @dataclass
    class Config(FlowDistillation.Config):
        """Options of FSD."""

        noise_field: Literal["world-map", "constant", "random"] = option(
            "world-map",
            "Noise n(c). world-map: windows of a map around the object; constant: one image per particle for all "
            "views; random: fresh noise at every step (annealed SDS).",
        )
        world_map_angle: float = option(
            WORLD_MAP_ANGLE, "Range of azimuths that one window of the world map spans, in degrees.", gt=0, le=360
        )
        background_noise: Literal["fixed", "random", "none"] = option(
            "fixed",
            "For noise_field=world-map, noise where the render's opacity is below 0.5. fixed: one image per particle; "
            "random: fresh noise; none: the world map, as in the foreground.",
        )

    config: Config

    def noise(self, z: Tensor, conditions: CFGConditions, ctx: StepContext) -> Tensor:
        """Blend n (B, C, h, w) of fixed and fresh noise; every element is N(0, 1)."""
        if self.config.noise_field == "random":
            return ctx.noise(z)
        return super().noise(z, conditions, ctx)

    def fixed_noise(self, z: Tensor, conditions: CFGConditions, ctx: StepContext) -> Tensor:
        """The particle's noise image, or the window of its world map that each camera sees."""
        if self.config.noise_field == "constant":
            return self.constant_noise(z, ctx)
        where, angle = self.config.background_noise, self.config.world_map_angle

        def draw(like: Tensor, name: str) -> Tensor:
            if name == "background" and where == "random":
                return ctx.noise(like, "fsd/fresh-background")
            return self._persistent(ctx, like, f"fsd/{name}")

        return world_map_noise(draw, z, conditions.cameras, angle, None if where == "none" else ctx.opacity)

"""Consistent flow distillation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from scoredist3d.config import option
from scoredist3d.guidance.core.context import StepContext
from scoredist3d.guidance.core.flow_distillation import FlowDistillation
from scoredist3d.guidance.core.surface_noise import NoiseMaps, SurfaceNoise
from scoredist3d.priors.base import Prior
from scoredist3d.priors.conditioning import CFGConditions
from scoredist3d.registry import register
from scoredist3d.seeding import Rng


@register(
    "guidance",
    "cfd",
    summary="Follow the sampler's ODE with a single decreasing timestep and noise that is fixed on the surface.",
    arxiv="2501.05445",
)
class ConsistentFlowDistillation(FlowDistillation):
    """CFD: FSD whose noise n(c) is fixed on the surface of the object, so that a point has the same noise in all views.

    The noise of a latent is the normalized sum of the cells that it sees in maps of noise around the object; see
    :class:`SurfaceNoise`. Latents without surface have background noise. With ``sde_rate`` all noise is renewed slowly,
    which makes the ODE an SDE. Without a render (free images) there is one fixed noise image per particle, which is FSD
    with ``noise_field: constant``.
    """

    @dataclass
    class Config(FlowDistillation.Config):
        """Options of CFD."""

        noise_cells: int = option(
            16,
            "Rows and columns of the noise maps per column of the latents. The authors use 32, which is 2048 cells for "
            "latents of 64x64; the time of a step grows with the square.",
            ge=1,
            le=256,
        )
        noise_layers: int = option(4, "Layers of each of the six noise maps.", ge=1, le=64)
        noise_extent: float = option(
            1.0,
            "Half the side of the cube around the origin that the noise maps cover, in scene units. Surface outside of "
            "it has background noise.",
            gt=0,
        )
        background_noise: Literal["fixed", "random"] = option(
            "fixed",
            "Noise of latents that see no surface. fixed: one image per particle for all views; random: fresh noise.",
        )
        noise_cache: float = option(
            512.0,
            "Memory for noise that is kept between steps, in MiB. Other noise is drawn again, with the same values.",
            ge=0,
        )

    config: Config

    def __init__(self, config: Config, *, prior: Prior, rng: Rng | None = None) -> None:
        """Create the method; for the arguments see :class:`Guidance`."""
        super().__init__(config, prior=prior, rng=rng)
        self._surfaces: dict[int, SurfaceNoise] = {}

    def fixed_noise(self, z: Tensor, conditions: CFGConditions, ctx: StepContext) -> Tensor:
        """Noise of the surface that each camera sees, and background noise elsewhere."""
        if ctx.depth is None or ctx.opacity is None or conditions.cameras is None:
            return self.constant_noise(z, ctx)
        n, seen = self._surface(z.shape[-1])(z, ctx.depth, ctx.opacity, conditions.cameras, ctx)
        fresh = self.config.background_noise == "random"
        background = ctx.noise(z, "cfd/fresh-background") if fresh else self.constant_noise(z, ctx)
        return torch.where(seen, n, background)

    def _surface(self, width: int) -> SurfaceNoise:
        """Noise maps for latents with ``width`` columns."""
        if width not in self._surfaces:
            config = self.config
            maps = NoiseMaps(config.noise_extent, config.noise_cells * width, config.noise_layers)
            cache_bytes = int(config.noise_cache * 2**20)
            self._surfaces[width] = SurfaceNoise(maps, self._persistent, cache_bytes=cache_bytes)
        return self._surfaces[width]

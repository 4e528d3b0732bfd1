"""Base class of methods that take the noise of the noisy input from the DDIM inversion of the render."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from scoredist3d.config import Schedule, option
from scoredist3d.diffusion.schedule import CLEAN, per_item
from scoredist3d.guidance.core.context import StepContext
from scoredist3d.guidance.core.noise_fields import WORLD_MAP_ANGLE, world_map_noise
from scoredist3d.guidance.core.timesteps import timestep_tensor
from scoredist3d.guidance.core.trajectory import TrajectoryGuidance
from scoredist3d.guidance.core.weighting import Weighting
from scoredist3d.priors.conditioning import CFGConditions


class InversionGuidance(TrajectoryGuidance):
    """Base class of methods with x_t = alpha_t z + sigma_t kappa, where kappa is recovered from z.

    kappa is the noise of z after DDIM inversion to t + tau, with a guidance scale of its own. Subclasses define the
    default of that scale, because it depends on what the inversion stands for.
    """

    @dataclass
    class Config(TrajectoryGuidance.Config):
        """Options of the inversion."""

        weighting: Weighting = option(
            "lambda", "Weight w(t), with the same choices as for sds; the derivation requires lambda."
        )
        inversion_guidance_scale: Schedule | None = option(
            None, "Guidance scale of the inversion; null uses -guidance_scale in sdi and 1 - guidance_scale in pfd."
        )
        inversion_steps: int = option(10, "Number of steps for an inversion over the whole range of timesteps.", ge=1)
        tau_max: float = option(
            1.0 / 30.0,
            "Upper bound of the uniformly drawn tau in the inversion to t + tau; the released code uses "
            "1 / inversion_steps.",
            ge=0,
            lt=1,
        )
        inversion_eta: float = option(0.3, "Strength of the noise that is added to the inversion.", ge=0)
        inversion_noise: Literal["per-step", "once"] = option(
            "per-step",
            "How the noise of inversion_eta is added. per-step: inversion_eta sqrt(var) after every step, with the "
            "variance of DDIM (the released code); once: inversion_eta sigma_t to kappa (H in the paper).",
        )
        inversion_start: float = option(
            0.0,
            "Timestep at which the inversion starts, with the state alpha z; 0 starts at the clean image. The first "
            "step divides the error of the predicted image by the noise level of this timestep.",
            ge=0,
            lt=1,
        )
        kappa_rms: Literal["free", "limited", "unit"] = option(
            "free",
            "Root mean square of kappa in each image. free: that of the inversion; limited: at most 1, for renders "
            "that are far from the prior's images; unit: 1 on average, with fill_noise where the inversion gives less. "
            "Only free is in the papers.",
        )
        fill_noise: Literal["fresh", "world-map"] = option(
            "fresh",
            "Noise that kappa_rms: unit adds. fresh: new at every step; world-map: fixed to the object, as in fsd.",
        )

    config: Config

    @abstractmethod
    def default_inversion_scale(self, guidance_scale: float) -> float:
        """Guidance scale of the inversion if ``inversion_guidance_scale`` is null."""

    def inversion_scale(self, ctx: StepContext) -> float:
        """Guidance scale of the inversion at this step."""
        scale = self.config.inversion_guidance_scale
        own = self._value("guidance_scale", ctx.step)
        return self.default_inversion_scale(own) if scale is None else scale(ctx.step)

    def inversion_nfe(self, conditions: CFGConditions, ctx: StepContext) -> int:
        """Evaluations of the denoiser per image for the inversion."""
        return (len(self.inversion_timesteps(ctx)) - 1) * self.guided_nfe(conditions, self.inversion_scale(ctx))

    def inversion_timesteps(self, ctx: StepContext) -> list[float]:
        """Increasing timesteps of an inversion from the clean image, or from ``inversion_start``, to t + tau.

        The intermediate timesteps are those below t with the indices k, k + s, k + 2 s, ..., where the stride s is
        N / inversion_steps, rounded down but at least 1, and k is 1 or the index of ``inversion_start``. There is no
        step, and kappa is 0 before ``kappa_rms``, if t does not exceed ``inversion_start``.
        """
        grid, t = self.grid, self.grid.index(ctx.timesteps[0])
        tau = torch.rand((), generator=ctx.rng("tau", ctx.step), dtype=torch.float64).item() * self.config.tau_max
        last = min(t + int(tau * grid.count), grid.highest)
        start = self.config.inversion_start
        head, begin = ([], grid.index(start)) if start > 0.0 else ([CLEAN], 1)
        inner = range(begin, min(t, last), self.inversion_stride())
        return [*head, *(index / grid.count for index in inner), last / grid.count]

    def inversion_stride(self) -> int:
        """Number of timesteps of one inversion step."""
        return max(1, self.grid.count // self.config.inversion_steps)

    def noise_timestep(self, timestep: float) -> float:
        """Timestep whose noise level a state of the inversion has; it is the timestep itself."""
        return timestep

    def inversion(self, z: Tensor, conditions: CFGConditions, ctx: StepContext) -> tuple[Tensor, Tensor]:
        """State at the end of the inversion of z, and its noise kappa = (x - alpha z) / sigma; (B, C, h, w) each."""
        eta, scale = self.config.inversion_eta, self.inversion_scale(ctx)
        timesteps = self.inversion_timesteps(ctx)
        x = z
        if self.config.inversion_start > 0.0:
            x = per_item(self.schedule.alpha(timestep_tensor(timesteps[:1], z)), z) * z
        for index, (start, stop) in enumerate(pairwise(timesteps)):
            prediction, level = self.predict_at(x, start, conditions, scale), self.noise_timestep(start)
            if level != start:
                prediction = replace(prediction, t=timestep_tensor([level] * len(x), x))
            x = self.move(prediction, level, stop)
            if eta > 0.0 and self.config.inversion_noise == "per-step":
                x = x + eta * self._std(level, stop) * ctx.noise(z, f"inversion/{index}")
        alpha, sigma = (per_item(c, z) for c in self.schedule.coefficients(timestep_tensor(timesteps[-1:], z)))
        return x, (x - alpha * z) / sigma

    def inverted(self, z: Tensor, conditions: CFGConditions, ctx: StepContext) -> tuple[Tensor, Tensor]:
        """Noisy latents x_t and the noise kappa, recovered from z by DDIM inversion to t + tau."""
        kappa = self._with_rms(self.inversion(z, conditions, ctx)[1], conditions, ctx)
        eta = self.config.inversion_eta
        if eta > 0.0 and self.config.inversion_noise == "once":
            kappa = kappa + eta * per_item(self.schedule.sigma(ctx.t), z) * ctx.noise(z, "inversion")
        return self.schedule.add_noise(z, kappa, ctx.t), kappa

    def _with_rms(self, kappa: Tensor, conditions: CFGConditions, ctx: StepContext) -> Tensor:
        """Noise (B, C, h, w) with the root mean square that ``kappa_rms`` sets."""
        if self.config.kappa_rms == "free":
            return kappa
        square = kappa.square().mean((1, 2, 3), keepdim=True)
        kappa = kappa / square.sqrt().clamp_min(1.0)
        if self.config.kappa_rms == "limited":
            return kappa
        return kappa + (1.0 - square).clamp_min(0.0).sqrt() * self._fill(kappa, conditions, ctx)

    def _fill(self, like: Tensor, conditions: CFGConditions, ctx: StepContext) -> Tensor:
        """Noise N(0, 1) in the shape of ``like`` that ``fill_noise`` selects."""
        if self.config.fill_noise == "fresh":
            return ctx.noise(like, "inversion/fill")

        def draw(like: Tensor, name: str) -> Tensor:
            return ctx.particle_noise(like, f"inversion/{name}")

        return world_map_noise(draw, like, conditions.cameras, WORLD_MAP_ANGLE, ctx.opacity)

    def _std(self, start: float, stop: float) -> float:
        """Standard deviation of a DDIM step between two timesteps; 0 if the lower one is the clean image."""
        ends = (torch.tensor([timestep], dtype=torch.float64) for timestep in (stop, start))
        return self.schedule.ddim_variance(*ends).sqrt().item()

"""Oracles of the methods that walk the sampling ODE: diffusers' schedulers in float64, and one Gaussian."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from scoredist3d.diffusion.schedule import NoiseSchedule
from scoredist3d.guidance import Guidance
from scoredist3d.priors import CFGConditions
from scoredist3d.priors.analytic import GaussianMixturePrior, Mixture
from scoredist3d.seeding import Rng

M, S = 0.4, 0.6
BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64).square()
ABAR = torch.cumprod(1.0 - BETAS, dim=0)


def ddim(steps: int, spacing: str = "trailing", **options: Any) -> DDIMScheduler:
    """Stable Diffusion's scheduler, with float64 tables."""
    return _float64(DDIMScheduler(**_config(**options)), steps, spacing)


def ddim_inverse(steps: int, **options: Any) -> DDIMInverseScheduler:
    """Its inverse: to timestep 1, then on in equal steps; from the clean latent with ``set_alpha_to_one``."""
    return _float64(DDIMInverseScheduler(**_config(**options)), steps, "leading")


def euler(timesteps: list[float]) -> FlowMatchEulerDiscreteScheduler:
    """The sampler of flow models on given sigmas; its own arithmetic is float32."""
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=timesteps)
    return scheduler


def gaussian(schedule: NoiseSchedule | None = None, *, flow: bool = False) -> GaussianMixturePrior:
    """N(M, S^2) over latents of shape (1, 2, 2); every prompt means the same."""
    one = Mixture(
        torch.full((1, 1, 2, 2), M, dtype=torch.float64),
        torch.full((1, 1, 1, 1), S, dtype=torch.float64),
        torch.ones(1),
        (frozenset({"thing"}),),
    )
    config = GaussianMixturePrior.Config(parametrization="flow" if flow else "epsilon")
    return GaussianMixturePrior(config, mixture=one, schedule=schedule)


def empty(prior: GaussianMixturePrior) -> CFGConditions:
    """No prompt."""
    return CFGConditions(prior.embed([""]), prior.embed([""]))


def gaussian_ddim_end(start: Tensor, t: float, timestep: float) -> Tensor:
    """x(timestep) of the exact ODE through x(t) = start on N(M, S^2) data, Stable Diffusion's schedule."""
    (alpha, sigma), (alpha_end, sigma_end) = (coefficients(when) for when in (t, timestep))
    spread, end = ((a * S) ** 2 + s**2 for a, s in ((alpha, sigma), (alpha_end, sigma_end)))
    return alpha_end * M + (start - alpha * M) * (end / spread) ** 0.5


def coefficients(timestep: float) -> tuple[float, float]:
    """(alpha, sigma) of Stable Diffusion at t = k / 1000."""
    abar = ABAR[round(timestep * 1000)].item()
    return abar**0.5, (1.0 - abar) ** 0.5


def descend(
    guidance: Guidance, z: Tensor, conditions: CFGConditions, steps: range, *, rate: float = 1.0, rng: Rng | None = None
) -> list[Tensor]:
    """z after each step of plain gradient descent at ``rate`` times the batch size; item i is particle i."""
    trail = []
    for step in steps:
        z = z.detach().requires_grad_()
        loss = guidance(z, conditions, step, rng or Rng(), particles=range(len(z))).loss
        z = z.detach() - rate * len(z) * torch.autograd.grad(loss, z)[0]
        trail.append(z)
    return trail


def _config(**options: Any) -> dict[str, Any]:
    """Stable Diffusion's scheduler configuration with some options changed."""
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    return {**betas, "steps_offset": 1, "clip_sample": False, "set_alpha_to_one": False, **options}


def _float64(scheduler: Any, steps: int, spacing: str) -> Any:
    scheduler.register_to_config(timestep_spacing=spacing)
    scheduler.alphas_cumprod = ABAR.clone()
    for name in ("final_alpha_cumprod", "initial_alpha_cumprod"):
        if hasattr(scheduler, name):  # diffusers' own choice, in float64
            is_clean = getattr(scheduler, name).item() == 1.0
            setattr(scheduler, name, torch.ones_like(ABAR[0]) if is_clean else ABAR[0])
    scheduler.set_timesteps(steps)
    return scheduler

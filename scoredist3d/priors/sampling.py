"""Sampling from a prior: for previews, for evaluation, and as the reference that distillation is compared with."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from scoredist3d.diffusion.schedule import solve_ode
from scoredist3d.priors.base import CFGConditions, Prior, guided_prediction


@torch.no_grad()
def sample(
    prior: Prior,
    conditions: CFGConditions,
    *,
    steps: int = 25,
    scale: float = 5.0,
    generator: torch.Generator,
    batch: int | None = None,
    rescale: float = 0.0,
    callback: Callable[[int, float, Tensor, Tensor], None] | None = None,
) -> Tensor:
    """Draw images with deterministic DDIM (for flow models: Euler) steps from seeded noise.

    Predicted clean images are limited as in diffusers' DDIMScheduler; see :meth:`Prior.limit_x0`.

    Args:
        prior: The model.
        conditions: What to sample; each holds one item, or one per image.
        steps: Denoiser calls.
        scale: Guidance scale gamma, diffusers' meaning.
        generator: Draws the starting noise, on its own device.
        batch: Number of images; the number of prompts by default.
        rescale: See :func:`~scoredist3d.priors.base.guided_prediction`.
        callback: See :func:`~scoredist3d.diffusion.schedule.solve_ode`.

    Returns:
        (B, C, h, w) latents at the model's image size; ``prior.decode`` makes images of them.
    """
    batch = len(conditions.positive) if batch is None else batch
    shape = (batch, *prior.latent_shape(prior.image_size, prior.image_size))
    noise = torch.randn(shape, generator=generator, device=generator.device).to(conditions.positive.text.device)
    return _follow(prior, noise, prior.schedule.timesteps(steps), conditions, scale, rescale, callback)


@torch.no_grad()
def denoise(
    prior: Prior,
    x_t: Tensor,
    t: float,
    conditions: CFGConditions,
    *,
    steps: int = 15,
    scale: float = 5.0,
    rescale: float = 0.0,
) -> Tensor:
    """Continue from a noisy (B, C, h, w) latent at timestep ``t`` to a clean one."""
    return _follow(prior, x_t, prior.schedule.timesteps(steps, start=t), conditions, scale, rescale, None)


def _follow(
    prior: Prior,
    x: Tensor,
    timesteps: list[float],
    conditions: CFGConditions,
    scale: float,
    rescale: float,
    callback: Callable[[int, float, Tensor, Tensor], None] | None,
) -> Tensor:
    def predict(x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        prediction = guided_prediction(prior, x_t, t, conditions, scale, rescale=rescale)
        return prediction.eps, prior.limit_x0(prediction.x0)

    return solve_ode(prior.schedule, predict, x, timesteps, callback=callback)

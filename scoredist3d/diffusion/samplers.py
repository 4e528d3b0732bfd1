"""Deterministic samplers: DDIM steps, which for flow models are Euler steps of the probability-flow ODE."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from scoredist3d.diffusion.cfg import guided_prediction
from scoredist3d.diffusion.denoiser import C, GuidanceConditions, GuidedDenoiser
from scoredist3d.diffusion.schedule import NoiseSchedule

StepCallback = Callable[[int, float, Tensor, Tensor], None]
"""Called after each step with its index, the new timestep, the new state x and the predicted x_0."""


def solve_ode(
    schedule: NoiseSchedule,
    predict: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    x: Tensor,
    timesteps: Sequence[float],
    *,
    callback: StepCallback | None = None,
) -> Tensor:
    """Integrate the probability-flow ODE over ``timesteps`` with DDIM (for flow models: Euler) steps.

    Decreasing timesteps denoise; increasing timesteps invert the sampling process.

    Args:
        schedule: The model's noise schedule.
        predict: (x_t, t (B,)) -> (eps, x_0); called once per step, at the timestep where the step begins.
        x: (B, ...), the state at ``timesteps[0]``.
        timesteps: Timesteps to visit in order, including the initial one.
        callback: See :data:`StepCallback`.

    Returns:
        The state at ``timesteps[-1]``.
    """
    for index, (start, stop) in enumerate(pairwise(timesteps)):
        t = x.new_full((len(x),), start)
        s = x.new_full((len(x),), stop)
        eps, x0 = predict(x, t)
        x = schedule.ddim_step(eps, x0, t, s)
        if callback is not None:
            callback(index, stop, x, x0)
    return x


@torch.no_grad()
def sample(
    denoiser: GuidedDenoiser[C],
    conditions: GuidanceConditions[C],
    *,
    steps: int = 25,
    scale: float = 5.0,
    generator: torch.Generator,
    batch: int | None = None,
    rescale: float = 0.0,
    callback: StepCallback | None = None,
) -> Tensor:
    """Generate images by deterministic DDIM (for flow models: Euler) steps from seeded noise.

    Predicted clean images are thresholded as in diffusers' DDIMScheduler; see :meth:`GuidedDenoiser.limit_x0`.

    Args:
        denoiser: The model.
        conditions: Conditionings of one item, or of one item per image.
        steps: Number of denoising steps.
        scale: Guidance scale gamma, in the convention of diffusers.
        generator: Source of the initial noise, which is drawn on the generator's device.
        batch: Number of images; defaults to the number of prompts.
        rescale: See :func:`~scoredist3d.diffusion.cfg.guided_prediction`.
        callback: See :data:`StepCallback`.

    Returns:
        (B, C, h, w) latents of the model's image size; the prior's ``decode`` converts them to images.
    """
    batch = len(conditions.positive) if batch is None else batch
    shape = (batch, *denoiser.latent_shape(denoiser.image_size, denoiser.image_size))
    noise = torch.randn(shape, generator=generator, device=generator.device).to(conditions.positive.device)
    return _integrate(denoiser, noise, denoiser.schedule.timesteps(steps), conditions, scale, rescale, callback)


@torch.no_grad()
def denoise(
    denoiser: GuidedDenoiser[C],
    x_t: Tensor,
    t: float,
    conditions: GuidanceConditions[C],
    *,
    steps: int = 15,
    scale: float = 5.0,
    rescale: float = 0.0,
) -> Tensor:
    """Denoise a (B, C, h, w) latent from timestep ``t`` to a clean one; the options are those of :func:`sample`."""
    return _integrate(denoiser, x_t, denoiser.schedule.timesteps(steps, start=t), conditions, scale, rescale, None)


def _integrate(
    denoiser: GuidedDenoiser[C],
    x: Tensor,
    timesteps: list[float],
    conditions: GuidanceConditions[C],
    scale: float,
    rescale: float,
    callback: StepCallback | None,
) -> Tensor:
    """The state at the last of ``timesteps``, from guided predictions."""

    def predict(x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        prediction = guided_prediction(denoiser, x_t, t, conditions, scale, rescale=rescale)
        return prediction.eps, denoiser.limit_x0(prediction.x0)

    return solve_ode(denoiser.schedule, predict, x, timesteps, callback=callback)

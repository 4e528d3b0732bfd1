"""Functions that draw the timesteps of a batch and move them to the device of the latents."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from scoredist3d.seeding import Rng


def uniform_draws(rng: Rng, stream: str, step: int, batch: int, views: int) -> Tensor:
    """Uniform float64 draws (G,) from [0, 1), one for each group of ``views`` images that the prior denoises jointly.

    Group g depends on (seed, stream, step, g) only, not on the batch size. G is batch / views, rounded up.
    """
    groups = range(-(-batch // views))
    return torch.stack(
        [torch.rand((), generator=rng(f"{stream}/{group}", step), dtype=torch.float64) for group in groups]
    )


def per_image(timesteps: Tensor, batch: int, views: int) -> list[float]:
    """One timestep per image of the batch from the timesteps (G,) of its groups."""
    values: list[float] = timesteps.tolist()
    return [timestep for timestep in values for _ in range(views)][:batch]


def timestep_tensor(timesteps: Sequence[float], like: Tensor) -> Tensor:
    """Timesteps (B,) in the dtype and on the device of ``like``; equal timesteps need no transfer to the device."""
    if len(set(timesteps)) == 1:
        return like.new_full((len(timesteps),), timesteps[0])
    return torch.tensor(timesteps, dtype=like.dtype).to(like.device)

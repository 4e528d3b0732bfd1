"""The circumstances of one distillation step: timesteps, particles, noise, and picking items of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from scoredist3d.priors.conditioning import CFGConditions
from scoredist3d.seeding import Rng


@dataclass(frozen=True)
class StepContext:
    """One step's circumstances, the same for every method.

    Attributes:
        step: Optimiser step.
        t: (B,) timesteps, quantized to the model's.
        timesteps: The same as Python numbers, for control flow that must not wait for the device.
        rng: The run's randomness; see :meth:`noise` and :meth:`particle_noise`.
        particles: For each item the number of the particle (scene or free image) that it shows.
        rgb: (B, H, W, 3) images that were encoded, attached to the graph, where the caller has them.
        opacity: (B, H, W, 1) of the render, where there is one.
        source: (B, C, h, w) latents of what is edited, seen from the same cameras, for methods that need it.
    """

    step: int
    t: Tensor
    timesteps: tuple[float, ...]
    rng: Rng
    particles: tuple[int, ...]
    rgb: Tensor | None = None
    opacity: Tensor | None = None
    source: Tensor | None = None

    def noise(self, like: Tensor, stream: str = "noise") -> Tensor:
        """Gaussian noise in the shape of ``like``; item i depends on (seed, stream, step, i) only, not on the batch."""
        return item_noise(self.rng, stream, self.step, like)

    def particle_noise(self, like: Tensor, stream: str) -> Tensor:
        """Gaussian noise in the shape of ``like`` that belongs to the particle each item shows.

        It depends on (seed, stream, particle) only: equal at every step, in every view and on every rank.
        """
        rng = self.rng.shared()
        draws = {
            particle: torch.empty_like(like[0]).normal_(generator=rng(f"particle/{stream}/{particle}", 0, like.device))
            for particle in dict.fromkeys(self.particles)
        }
        return torch.stack([draws[particle] for particle in self.particles])

    def runs(self) -> list[tuple[slice, float]]:
        """Neighbouring items of equal timestep, as (items, timestep): what can walk one trajectory of timesteps together."""
        runs, start = [], 0
        for timestep, items in groupby(self.timesteps):
            stop = start + len(list(items))
            runs.append((slice(start, stop), timestep))
            start = stop
        return runs


def item_noise(rng: Rng, stream: str, step: int, like: Tensor) -> Tensor:
    """Gaussian noise in ``like``'s shape, dtype and device, every item from a generator of its own."""
    noise = torch.empty_like(like)
    for index, item in enumerate(noise):
        item.normal_(generator=rng(f"{stream}/{index}", step, like.device))
    return noise


def timestep_tensor(timesteps: Sequence[float], like: Tensor) -> Tensor:
    """(B,) timesteps in the dtype and on the device of ``like``; equal ones take no transfer to it."""
    if len(set(timesteps)) == 1:
        return like.new_full((len(timesteps),), timesteps[0])
    return torch.tensor(timesteps, dtype=like.dtype).to(like.device)


def select(conditions: CFGConditions, items: slice | Tensor, batch: int) -> CFGConditions:
    """The conditions of some items of a batch, given as a slice or an index tensor."""

    def pick(conditioning: Any) -> Any:
        return None if conditioning is None else conditioning.expand(batch)[items]

    return CFGConditions(
        positive=pick(conditions.positive),
        unconditional=pick(conditions.unconditional),
        negatives=tuple((pick(c), weights.expand(batch)[items]) for c, weights in conditions.negatives),
        plain=pick(conditions.plain),
        empty=pick(conditions.empty),
        extra={name: pick(conditioning) for name, conditioning in conditions.extra.items()},
        cameras=None if conditions.cameras is None else conditions.cameras[items],
    )

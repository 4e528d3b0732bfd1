"""Context of one distillation step: timesteps, particles and noise; selection of items of a batch."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from scoredist3d.priors.conditioning import CFGConditions
from scoredist3d.seeding import Rng


@dataclass(frozen=True)
class StepContext:
    """Inputs of one step besides the latents and their conditions; the same for every method.

    Attributes:
        step: Optimizer step.
        t: (B,) timesteps in [0, 1], quantized to those of the prior.
        timesteps: The same timesteps as Python numbers, for control flow that must not wait for the device.
        rng: Random generators of the run; see :meth:`noise` and :meth:`particle_noise`.
        particles: Index of the particle (scene or free image) that each item shows.
        rgb: (B, H, W, 3) images that were encoded into the latents, attached to the graph; None without a render.
        opacity: (B, H, W, 1) opacity of the render; None without a render.
        depth: (B, H, W, 1) distance of the rendered surface along the rays, scene units; None without a render.
        source: (B, C, h, w) latents of the source seen from the same cameras, for methods that edit it.
        background: (B, H, W, 3) background over which the render is composited; None without a render.
        normal: (B, H, W, 3) unit world normals of the render; None unless ``Guidance.Config.maps`` names them.
    """

    step: int
    t: Tensor
    timesteps: tuple[float, ...]
    rng: Rng
    particles: tuple[int, ...]
    rgb: Tensor | None = None
    opacity: Tensor | None = None
    depth: Tensor | None = None
    source: Tensor | None = None
    background: Tensor | None = None
    normal: Tensor | None = None

    def noise(self, like: Tensor, stream: str = "noise") -> Tensor:
        """Gaussian noise in the shape of ``like``; item i depends only on (seed, stream, step, i)."""
        return item_noise(self.rng, stream, self.step, like)

    def particle_noise(self, like: Tensor, stream: str) -> Tensor:
        """Gaussian noise in the shape of ``like`` that is fixed for the particle shown by each item.

        It depends on (seed, stream, particle) only, so it is the same at every step, in every view and on every rank.
        """
        draws = {particle: self.noise_of(particle, like[0], stream) for particle in dict.fromkeys(self.particles)}
        return torch.stack([draws[particle] for particle in self.particles])

    def noise_of(self, particle: int, like: Tensor, stream: str) -> Tensor:
        """Gaussian noise in the shape of ``like`` that is fixed for one particle; see :meth:`particle_noise`."""
        generator = self.rng.shared()(f"particle/{stream}/{particle}", 0, like.device)
        return torch.empty_like(like).normal_(generator=generator)

    def runs(self) -> list[tuple[slice, float]]:
        """Runs of consecutive items with equal timesteps, as (items, timestep); a run can share one ODE solve."""
        runs, start = [], 0
        for timestep, items in groupby(self.timesteps):
            stop = start + len(list(items))
            runs.append((slice(start, stop), timestep))
            start = stop
        return runs


def item_noise(rng: Rng, stream: str, step: int, like: Tensor) -> Tensor:
    """Gaussian noise in the shape, dtype and device of ``like``; every item has its own generator."""
    noise = torch.empty_like(like)
    for index, item in enumerate(noise):
        item.normal_(generator=rng(f"{stream}/{index}", step, like.device))
    return noise


def select(conditions: CFGConditions, items: slice | Tensor, batch: int) -> CFGConditions:
    """CFG conditions of some items of a batch, which are given as a slice or an index tensor."""

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

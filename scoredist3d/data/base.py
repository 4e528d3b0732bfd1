"""Interface of camera samplers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from scoredist3d.cameras import Cameras
from scoredist3d.config import ComponentConfig
from scoredist3d.seeding import Rng

_LATE = 10_000_000  # a step after all milestones


class CameraSampler(ABC):
    """Base class of camera samplers, for training steps and for evaluation."""

    @dataclass
    class Config(ComponentConfig):
        """Options shared by all camera samplers (none)."""

    def __init__(self, config: Config, *, world_size: int = 1) -> None:
        """Args:
        config: Options.
        world_size: Number of ranks that sample cameras for the same step, each with its own ``Rng.rank``.
        """
        self.world_size = world_size

    @abstractmethod
    def sample(self, step: int, rng: Rng) -> Cameras:
        """The cameras of rank ``rng.rank`` at an optimizer step, on the CPU."""

    def spread(self, count: int) -> Cameras:
        """``count`` cameras with the distribution of the training cameras late in a run, on the CPU.

        All have one image size, and equal calls return equal cameras.
        """
        batches: list[Cameras] = []
        rng, found = Rng(), 0
        while found < count:
            batch = self.sample(_LATE + len(batches), rng)
            batches.append(batch if not batches else batch.with_size(batches[0].height, batches[0].width))
            found += len(batch)
        # A batch may be ordered by azimuth, so the surplus is not taken from its end only.
        return Cameras.cat(batches)[torch.arange(count) * found // count]

    @abstractmethod
    def evaluation(self, azimuths: Sequence[float], elevation: float, height: int, width: int) -> Cameras:
        """Evaluation cameras at the given angles in degrees and image size in pixels, on the CPU."""

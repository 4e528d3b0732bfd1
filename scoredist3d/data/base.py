"""Interface of camera samplers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from scoredist3d.cameras import Cameras
from scoredist3d.config import ComponentConfig
from scoredist3d.seeding import Rng


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

    @abstractmethod
    def evaluation(self, azimuths: Sequence[float], elevation: float, height: int, width: int) -> Cameras:
        """Evaluation cameras at the given angles in degrees and image size in pixels, on the CPU."""

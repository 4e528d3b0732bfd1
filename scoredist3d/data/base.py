"""What every source of cameras offers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from scoredist3d.cameras import Cameras
from scoredist3d.config import ComponentConfig
from scoredist3d.seeding import Rng


class CameraSampler(ABC):
    """Chooses the views of each training step and those of evaluation."""

    @dataclass
    class Config(ComponentConfig):
        """Options of every camera source (none)."""

    def __init__(self, config: Config, *, world_size: int = 1) -> None:
        """``world_size``: number of ranks that sample for the same step, each with its own ``Rng.rank``."""
        self.world_size = world_size

    @abstractmethod
    def sample(self, step: int, rng: Rng) -> Cameras:
        """The cameras of one rank at an optimiser step; on the CPU."""

    @abstractmethod
    def evaluation(self, azimuths: Sequence[float], elevation: float, height: int, width: int) -> Cameras:
        """Cameras to look at the object with, angles in degrees; on the CPU."""

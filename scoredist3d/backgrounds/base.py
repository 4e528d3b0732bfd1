"""What every background offers to renderers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from scoredist3d.config import ComponentConfig


class Background(nn.Module, ABC):
    """Colour of the light that reaches the camera from infinitely far away."""

    @dataclass
    class Config(ComponentConfig):
        """Options of every background (none)."""

    def __init__(self, config: Config) -> None:
        super().__init__()

    @abstractmethod
    def forward(self, directions: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Colours behind ``B`` images.

        Args:
            directions: (B, H, W, 3) unit ray directions, world.
            generator: Of this step, on the device of ``directions``; ``None`` in evaluation, which must not be random.

        Returns:
            (B, H, W, 3) in [0, 1].
        """

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Optimiser groups ``{"name", "params"}``; empty for a background without parameters."""
        params = list(self.parameters())
        return [{"name": "background", "params": params}] if params else []

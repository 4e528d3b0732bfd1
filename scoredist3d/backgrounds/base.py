"""What every background offers to renderers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from scoredist3d.config import ComponentConfig, FieldError
from scoredist3d.seeding import Rng


class Background(nn.Module, ABC):
    """Colour of the light that reaches the camera from infinitely far away.

    Attributes:
        any_channels: Latents can be rendered over it, not colours alone.
        free_options: Options that may change when another run goes on with the state, see
            :class:`~scoredist3d.geometry.base.Geometry`.
    """

    @dataclass
    class Config(ComponentConfig):
        """Options of every background (none)."""

    any_channels: bool = False
    free_options: frozenset[str] = frozenset()

    def __init__(self, config: Config, *, rng: Rng | None = None, num_channels: int = 3) -> None:
        """Args:
        config: Options.
        rng: Draws initial values; equal on all ranks.
        num_channels: Channels of what is rendered over it: 3, or those of the prior's latents.

        Raises:
            ValueError: This background has colours only.
        """
        super().__init__()
        if num_channels != 3 and not self.any_channels:
            raise FieldError(
                f"{config.type or type(self).__name__} has colours, but the material renders "
                f"{num_channels} latent channels; use background.type=environment",
                "type",
            )
        self.num_channels = num_channels

    @abstractmethod
    def forward(self, directions: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Colours behind ``B`` images.

        Args:
            directions: (B, H, W, 3) unit ray directions, world.
            generator: Of this step, on the device of ``directions``; ``None`` in evaluation, which must not be random.

        Returns:
            (B, H, W, num_channels), colours in [0, 1] or latents of any size.
        """

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Optimiser groups ``{"name", "params"}``; empty for a background without parameters."""
        params = list(self.parameters())
        return [{"name": "background", "params": params}] if params else []

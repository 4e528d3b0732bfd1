"""Interface of backgrounds."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from scoredist3d.config import ComponentConfig, FieldError
from scoredist3d.seeding import Rng


class Background(nn.Module, ABC):
    """Base class of backgrounds, which give the color of rays that do not hit the object.

    Attributes:
        any_channels: Whether the background also provides latents, for materials that output latents.
        free_options: Options that may differ between a run and a later run that continues from its state (see
            :class:`~scoredist3d.geometry.base.Geometry`).
    """

    @dataclass
    class Config(ComponentConfig):
        """Options shared by all backgrounds (none)."""

    any_channels: bool = False
    free_options: frozenset[str] = frozenset()

    def __init__(self, config: Config, *, rng: Rng | None = None, num_channels: int = 3) -> None:
        """Args:
        config: Options.
        num_channels: Channels of the render: 3, or the number of the prior's latent channels.

        Raises:
            ValueError: ``num_channels`` is not 3, and this background supports only colors.
        """
        super().__init__()
        if num_channels != 3 and not self.any_channels:
            raise FieldError(
                f"{config.type or type(self).__name__} supports only colors, but the material outputs "
                f"{num_channels} latent channels; use background.type=environment",
                "type",
            )
        self.num_channels = num_channels

    @abstractmethod
    def forward(self, directions: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Colors behind ``B`` images.

        Args:
            directions: (B, H, W, 3) unit ray directions, world.
            generator: Random generator of the step, on the device of ``directions``; None in evaluation, which is
                deterministic.

        Returns:
            (B, H, W, num_channels), colors in [0, 1] or unbounded latents.
        """

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Optimizer groups ``{"name", "params"}``; empty for a background without parameters."""
        params = list(self.parameters())
        return [{"name": "background", "params": params}] if params else []

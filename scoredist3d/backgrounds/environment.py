"""A learned environment map."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from scoredist3d.backgrounds.base import Background
from scoredist3d.config import option
from scoredist3d.geometry.networks import MLP
from scoredist3d.registry import register
from scoredist3d.seeding import Rng

# Directions evaluated at once without gradients: bounds memory at high resolutions.
_CHUNK = 1 << 17


@register("background", "environment", summary="A learned colour for each direction.", arxiv="2209.14988")
class Environment(Background):
    """rgb(d) = sigmoid(MLP(d, sin(2^k pi d), cos(2^k pi d))), k < ``num_frequencies``.

    With some probability a training image gets a random uniform colour instead, so that the environment cannot take
    over what the object should show.
    """

    @dataclass
    class Config(Background.Config):
        """Options of the environment."""

        num_frequencies: int = option(3, "Octaves of the direction's encoding; more gives sharper detail.", ge=0, le=10)
        hidden_width: int = option(16, "Units per hidden layer.", ge=1)
        hidden_layers: int = option(2, "Hidden layers.", ge=1, le=8)
        random_probability: float = option(0.5, "How often a training image gets a random colour instead.", ge=0, le=1)
        evaluation_color: tuple[float, float, float] | None = option(
            None, "RGB in evaluation instead of the environment; null shows the environment.", ge=0, le=1
        )

    def __init__(self, config: Config, *, rng: Rng | None = None) -> None:
        super().__init__(config)
        self.config = config
        inputs = 3 + 6 * config.num_frequencies
        generator = (rng or Rng()).shared()("background")
        self.network = MLP([inputs, *[config.hidden_width] * config.hidden_layers, 3], generator)

    def forward(self, directions: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """(B, H, W, 3) colours of the environment, or in some training images one random colour."""
        if generator is None:
            if self.config.evaluation_color is not None:
                return directions.new_tensor(self.config.evaluation_color).expand_as(directions)
            return self._environment(directions)
        batch, device = directions.shape[0], directions.device
        colors = torch.rand(batch, 1, 1, 3, generator=generator, device=device)
        replaced = torch.rand(batch, 1, 1, 1, generator=generator, device=device) < self.config.random_probability
        return torch.where(replaced, colors, self._environment(directions))

    def _environment(self, directions: Tensor) -> Tensor:
        flat = directions.reshape(-1, 3)
        if torch.is_grad_enabled():
            return self._colors(flat).view_as(directions)
        return torch.cat([self._colors(chunk) for chunk in flat.split(_CHUNK)]).view_as(directions)

    def _colors(self, directions: Tensor) -> Tensor:
        """(N, 3) unit directions -> (N, 3) colours."""
        octaves = [directions * (2.0**k * math.pi) for k in range(self.config.num_frequencies)]
        waves = [wave for angle in octaves for wave in (angle.sin(), angle.cos())]
        return self.network(torch.cat([directions, *waves], dim=-1)).sigmoid()

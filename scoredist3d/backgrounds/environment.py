"""Learned environment background."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from scoredist3d.backgrounds.base import Background
from scoredist3d.config import FieldError, option
from scoredist3d.limits import MAX_WIDTH
from scoredist3d.nn.mlp import MLP
from scoredist3d.registry import register
from scoredist3d.seeding import Rng

# Directions per chunk without gradients; bounds the memory at high resolutions.
_CHUNK = 1 << 17


@register(
    "background", "environment", summary="Learned color of each direction, from a small network.", arxiv="2209.14988"
)
class Environment(Background):
    """Environment color rgb(d) = sigmoid(MLP(d, sin(2^k pi d), cos(2^k pi d))), k < ``num_frequencies``.

    With ``random_probability``, a training image gets a random constant color instead, which prevents the background
    from depicting the object. For latents, the sigmoid is omitted and random values are drawn from
    N(0, ``latent_std``^2 I).
    """

    @dataclass
    class Config(Background.Config):
        """Options of the environment background."""

        num_frequencies: int = option(3, "Octaves of the frequency encoding; more give finer detail.", ge=0, le=10)
        hidden_width: int = option(16, "Units per hidden layer.", ge=1, le=MAX_WIDTH)
        hidden_layers: int = option(2, "Number of hidden layers.", ge=1, le=8)
        random_probability: float = option(
            0.5, "Probability of a random constant color in a training image.", ge=0, le=1
        )
        latent_std: float = option(
            1.0, "Standard deviation of random latents. That of the prior's latents is a good choice.", gt=0
        )
        evaluation_color: tuple[float, float, float] | None = option(
            None, "Constant RGB color in evaluation; null uses the environment.", ge=0, le=1
        )

    any_channels = True
    free_options = frozenset({"random_probability", "latent_std", "evaluation_color"})

    def __init__(self, config: Config, *, rng: Rng | None = None, num_channels: int = 3) -> None:
        """Args:
        config: Options.
        rng: Random streams of the initial weights.
        num_channels: 3 for colors, any other number for latents.

        Raises:
            ValueError: ``evaluation_color`` is set for latents.
        """
        super().__init__(config, num_channels=num_channels)
        if num_channels != 3 and config.evaluation_color is not None:
            raise FieldError(f"a color does not fit {num_channels} latent channels; set it to null", "evaluation_color")
        self.config = config
        inputs = 3 + 6 * config.num_frequencies
        generator = (rng or Rng()).shared()("background")
        self.network = MLP([inputs, *[config.hidden_width] * config.hidden_layers, num_channels], generator)

    def forward(self, directions: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """(B, H, W, num_channels), the environment or, in some training images, a random constant color."""
        if generator is None:
            if self.config.evaluation_color is not None:
                return directions.new_tensor(self.config.evaluation_color).expand_as(directions)
            return self._environment(directions)
        colors = self._random(directions.shape[0], generator, directions.device)
        replaced = torch.rand(len(colors), 1, 1, 1, generator=generator, device=directions.device)
        return torch.where(replaced < self.config.random_probability, colors, self._environment(directions))

    def _random(self, batch: int, generator: torch.Generator, device: torch.device) -> Tensor:
        """(B, 1, 1, num_channels) random colors in [0, 1], or random latents."""
        if self._bounded:
            return torch.rand(batch, 1, 1, self.num_channels, generator=generator, device=device)
        noise = torch.randn(batch, 1, 1, self.num_channels, generator=generator, device=device)
        return self.config.latent_std * noise

    def _environment(self, directions: Tensor) -> Tensor:
        """(B, H, W, num_channels) environment, evaluated in chunks, or at once if gradients are recorded."""
        flat, shape = directions.reshape(-1, 3), (*directions.shape[:-1], self.num_channels)
        if torch.is_grad_enabled():
            return self._colors(flat).view(shape)
        return torch.cat([self._colors(chunk) for chunk in flat.split(_CHUNK)]).view(shape)

    def _colors(self, directions: Tensor) -> Tensor:
        """(N, num_channels) values at (N, 3) unit directions."""
        octaves = [directions * (2.0**k * math.pi) for k in range(self.config.num_frequencies)]
        waves = [wave for angle in octaves for wave in (angle.sin(), angle.cos())]
        values = self.network(torch.cat([directions, *waves], dim=-1))
        return values.sigmoid() if self._bounded else values

    @property
    def _bounded(self) -> bool:
        """Whether the values are colors in [0, 1], as opposed to latents."""
        return self.num_channels == 3

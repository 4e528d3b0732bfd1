"""Colour from a small network that sees the direction of view (NeRF, arXiv 2003.08934)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from scoredist3d.config import option
from scoredist3d.materials.base import Light, Material, logit
from scoredist3d.meshes.exportable import SurfaceChannels
from scoredist3d.nn.mlp import MLP
from scoredist3d.ops.shading.spherical_harmonics import MAX_DEGREE, harmonics, num_coefficients
from scoredist3d.registry import register
from scoredist3d.seeding import Rng

_AXES = torch.cat([torch.eye(3), -torch.eye(3)])
"""Directions that a colour without direction is the mean of."""


@register(
    "material", "neural-radiance", summary="A small network of features and direction of view.", arxiv="2003.08934"
)
class NeuralRadiance(Material):
    """rgb = sigmoid(f[:3] + MLP(f, Y(d))), Y the spherical harmonics of the direction d from the camera to the point.

    The network's last layer starts at zero: the colour starts without dependence on the direction, and features of a
    known colour are its logit.
    """

    @dataclass
    class Config(Material.Config):
        """Options of the network."""

        num_features: int = option(16, "Features of each point, of which three are the colour's start.", ge=3, le=256)
        degree: int = option(3, "Highest degree of the harmonics that encode the direction.", ge=0, le=MAX_DEGREE)
        hidden_width: int = option(32, "Units per hidden layer.", ge=1)
        hidden_layers: int = option(2, "Hidden layers.", ge=1, le=8)

    needs_view_dirs = True
    baked_lighting = True

    def __init__(self, config: Config, *, rng: Rng | None = None, prior: Any = None) -> None:
        super().__init__(config)
        self.num_features, self.degree = config.num_features, config.degree
        inputs = config.num_features + num_coefficients(config.degree)
        generator = (rng or Rng()).shared()("material")
        self.network = MLP([inputs, *[config.hidden_width] * config.hidden_layers, 3], generator)
        torch.nn.init.zeros_(self.network.weights[-1])

    def forward(
        self,
        features: Tensor,
        *,
        normals: Tensor | None = None,
        view_dirs: Tensor | None = None,
        points: Tensor | None = None,
        light: Light | None = None,
    ) -> Tensor:
        """(N, 3) colours.

        Raises:
            ValueError: No directions of view.
        """
        if view_dirs is None:
            raise ValueError("the neural-radiance material needs directions of view")
        return self._colors(features, view_dirs)

    def channels(
        self, features: Tensor, *, points: Tensor | None = None, normals: Tensor | None = None
    ) -> SurfaceChannels:
        """The mean colour over the six directions of the axes; with normals, over those that can see the surface."""
        axes = _AXES.to(features)
        colors = torch.stack([self._colors(features, axis.expand(len(features), 3)) for axis in axes])
        weights = torch.ones(len(axes), len(features)).to(features)
        if normals is not None:
            weights = (-axes @ normals.T).clamp_min(0.0) + 1e-6
        weights = weights / weights.sum(0)
        return SurfaceChannels((colors * weights[..., None]).sum(0).clamp(0.0, 1.0))

    def features_of(self, channels: SurfaceChannels) -> Tensor:
        """(N, F): the base colour's logit, zeros behind it; exact for an untrained network."""
        return F.pad(logit(channels.base_color), (0, self.num_features - 3))

    def _colors(self, features: Tensor, view_dirs: Tensor) -> Tensor:
        encoded = harmonics(view_dirs, self.degree).to(features.dtype)
        return (features[:, :3] + self.network(torch.cat([features, encoded], dim=-1))).sigmoid()

"""View-dependent color from a small network (NeRF, arXiv 2003.08934)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from scoredist3d.config import option
from scoredist3d.limits import MAX_WIDTH
from scoredist3d.materials.base import Material, ShadingInputs, logit
from scoredist3d.meshes.exportable import SurfaceChannels
from scoredist3d.nn.mlp import MLP
from scoredist3d.ops.shading.spherical_harmonics import MAX_DEGREE, harmonics, num_coefficients
from scoredist3d.registry import register
from scoredist3d.seeding import Rng

_AXES = torch.cat([torch.eye(3), -torch.eye(3)])
"""View directions over which the view-independent color is averaged."""


@register("material", "neural-radiance", summary="View-dependent color from a small network.", arxiv="2003.08934")
class NeuralRadiance(Material):
    """View-dependent color from a small network: rgb = sigmoid(f[:3] + MLP(f, Y(d))).

    Y are the spherical harmonics of the direction d from the camera to the point. The last layer of the network is
    initialized to zero, so the initial color is sigmoid(f[:3]) in all directions.
    """

    @dataclass
    class Config(Material.Config):
        """Options of the network."""

        num_features: int = option(
            16, "Number of features per point; the first three are the logit of the initial color.", ge=3, le=256
        )
        degree: int = option(
            3, "Highest degree of the spherical harmonics that encode the view direction.", ge=0, le=MAX_DEGREE
        )
        hidden_width: int = option(32, "Units per hidden layer.", ge=1, le=MAX_WIDTH)
        hidden_layers: int = option(2, "Number of hidden layers.", ge=1, le=8)

    needs_view_dirs = True
    baked_lighting = True

    def __init__(self, config: Config, *, rng: Rng | None = None, prior: Any = None) -> None:
        super().__init__(config)
        self.num_features, self.degree = config.num_features, config.degree
        inputs = config.num_features + num_coefficients(config.degree)
        generator = (rng or Rng()).shared()("material")
        self.network = MLP([inputs, *[config.hidden_width] * config.hidden_layers, 3], generator)
        torch.nn.init.zeros_(self.network.weights[-1])

    def forward(self, inputs: ShadingInputs) -> Tensor:
        """(N, 3) colors.

        Raises:
            ValueError: The inputs have no view directions.
        """
        if inputs.view_dirs is None:
            raise ValueError("the neural-radiance material needs view directions; set ShadingInputs.view_dirs")
        return self._colors(inputs.features, inputs.view_dirs)

    def channels(self, inputs: ShadingInputs) -> SurfaceChannels:
        """Mean color over the six axis directions; with normals, over those from which the surface is visible."""
        features = inputs.features
        axes = _AXES.to(features)
        colors = torch.stack([self._colors(features, axis.expand(len(features), 3)) for axis in axes])
        weights = torch.ones(len(axes), len(features)).to(features)
        if inputs.normals is not None:
            weights = (-axes @ inputs.normals.T).clamp_min(0.0) + 1e-6
        weights = weights / weights.sum(0)
        return SurfaceChannels((colors * weights[..., None]).sum(0).clamp(0.0, 1.0))

    def features_of(self, channels: SurfaceChannels) -> Tensor:
        """(N, F): the logit of the base color, followed by zeros; exact for an untrained network."""
        return F.pad(logit(channels.base_color), (0, self.num_features - 3))

    def _colors(self, features: Tensor, view_dirs: Tensor) -> Tensor:
        """(N, 3) colors of (N, F) features seen along (N, 3) directions."""
        encoded = harmonics(view_dirs, self.degree).to(features.dtype)
        return (features[:, :3] + self.network(torch.cat([features, encoded], dim=-1))).sigmoid()

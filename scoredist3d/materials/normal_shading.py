"""Normals as colors (the geometry stage of Fantasia3D, arXiv 2303.13873)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scoredist3d.config import option
from scoredist3d.materials.base import Material, ShadingInputs
from scoredist3d.meshes.exportable import SurfaceChannels
from scoredist3d.registry import register
from scoredist3d.seeding import Rng


@register(
    "material", "normal-shading", summary="World normals as colors, to optimize the shape alone.", arxiv="2303.13873"
)
class NormalShading(Material):
    """World normals n as colors: rgb = (n + 1) / 2, so that the image depends on the shape alone."""

    @dataclass
    class Config(Material.Config):
        """Options of normal shading."""

        num_features: int = option(
            3,
            "Number of geometry features, which are ignored; set the number that the next stage's material expects.",
            ge=1,
            le=256,
        )

    needs_normal = True

    def __init__(self, config: Config, *, rng: Rng | None = None, prior: Any = None) -> None:
        super().__init__(config)
        self.num_features = config.num_features

    def forward(self, inputs: ShadingInputs) -> Tensor:
        """(N, 3) colors.

        Raises:
            ValueError: The inputs have no normals.
        """
        if inputs.normals is None:
            raise ValueError("the normal-shading material needs normals; set ShadingInputs.normals")
        return 0.5 + 0.5 * inputs.normals

    def channels(self, inputs: ShadingInputs) -> SurfaceChannels:
        """Mid gray as the base color, since this material has no color."""
        return SurfaceChannels(torch.full_like(inputs.features[:, :1], 0.5).expand(-1, 3))

    def features_of(self, channels: SurfaceChannels) -> Tensor:
        """(N, num_features) zeros, since this material has no color."""
        return channels.base_color.new_zeros(len(channels.base_color), self.num_features)

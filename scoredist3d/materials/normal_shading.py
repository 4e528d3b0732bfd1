"""The surface's direction as its colour (the geometry stage of Fantasia3D, arXiv 2303.13873)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scoredist3d.config import option
from scoredist3d.materials.base import Light, Material
from scoredist3d.meshes.exportable import SurfaceChannels
from scoredist3d.registry import register
from scoredist3d.seeding import Rng


@register(
    "material", "normal-shading", summary="World normals as colours, to optimise shape alone.", arxiv="2303.13873"
)
class NormalShading(Material):
    """rgb = (n + 1) / 2 with the world normal n: the prior judges the shape, and nothing can be painted on it."""

    @dataclass
    class Config(Material.Config):
        """Options of normal shading."""

        num_features: int = option(
            3, "Features of the geometry, which are ignored; set those of the material that follows.", ge=1, le=256
        )

    needs_normal = True

    def __init__(self, config: Config, *, rng: Rng | None = None, prior: Any = None) -> None:
        super().__init__(config)
        self.num_features = config.num_features

    def forward(
        self,
        features: Tensor,
        *,
        normals: Tensor | None = None,
        view_dirs: Tensor | None = None,
        points: Tensor | None = None,
        light: Light | None = None,
    ) -> Tensor:
        """(N, 3) colours of the normals; the features are ignored.

        Raises:
            ValueError: No normals.
        """
        if normals is None:
            raise ValueError("the normal-shading material needs normals")
        return 0.5 + 0.5 * normals

    def channels(
        self, features: Tensor, *, points: Tensor | None = None, normals: Tensor | None = None
    ) -> SurfaceChannels:
        """Mid gray."""
        return SurfaceChannels(torch.full_like(features[:, :1], 0.5).expand(-1, 3))

    def features_of(self, channels: SurfaceChannels) -> Tensor:
        """(N, num_features) zeros: this material has no colour to keep."""
        return channels.base_color.new_zeros(len(channels.base_color), self.num_features)

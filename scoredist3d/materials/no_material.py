"""Colour without light."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from scoredist3d.materials.base import Light, Material, logit
from scoredist3d.meshes.exportable import SurfaceChannels
from scoredist3d.registry import register


@register("material", "no-material", summary="Colour is the sigmoid of the features; no light.")
class NoMaterial(Material):
    """rgb = sigmoid(features): light and shade are painted into the colour."""

    baked_lighting = True

    @dataclass
    class Config(Material.Config):
        """No options."""

    def forward(
        self,
        features: Tensor,
        *,
        normals: Tensor | None = None,
        view_dirs: Tensor | None = None,
        points: Tensor | None = None,
        light: Light | None = None,
    ) -> Tensor:
        """(N, 3) colours; everything but the features is ignored."""
        return features.sigmoid()

    def channels(
        self, features: Tensor, *, points: Tensor | None = None, normals: Tensor | None = None
    ) -> SurfaceChannels:
        """The colour alone."""
        return SurfaceChannels(features.sigmoid())

    def features_of(self, channels: SurfaceChannels) -> Tensor:
        """(N, 3): the logit of the base colour."""
        return logit(channels.base_color)

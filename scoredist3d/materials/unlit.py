"""Colors without shading."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from scoredist3d.materials.base import Material, ShadingInputs, logit
from scoredist3d.meshes.exportable import SurfaceChannels
from scoredist3d.registry import register


@register("material", "unlit", summary="Sigmoid of the features, without shading.", aliases=("no-material",))
class Unlit(Material):
    """Unshaded color: rgb = sigmoid(features). Light and shade, if any, are part of the learned color."""

    baked_lighting = True

    @dataclass
    class Config(Material.Config):
        """No options."""

    def forward(self, inputs: ShadingInputs) -> Tensor:
        """(N, 3) colors."""
        return inputs.features.sigmoid()

    def channels(self, inputs: ShadingInputs) -> SurfaceChannels:
        """The color as the base color."""
        return SurfaceChannels(inputs.features.sigmoid())

    def features_of(self, channels: SurfaceChannels) -> Tensor:
        """(N, 3): the logit of the base color."""
        return logit(channels.base_color)

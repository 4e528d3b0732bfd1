"""Colors without shading."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from scoredist3d.materials.base import AlbedoMaterial, ShadingInputs
from scoredist3d.registry import register


@register("material", "unlit", summary="Sigmoid of the features, without shading.", aliases=("no-material",))
class Unlit(AlbedoMaterial):
    """Unshaded color: rgb = sigmoid(features). Light and shade, if any, are part of the learned color."""

    baked_lighting = True

    @dataclass
    class Config(AlbedoMaterial.Config):
        """No options."""

    def forward(self, inputs: ShadingInputs) -> Tensor:
        """(N, 3) colors."""
        return self.albedo(inputs.features)

"""Lambertian shading under lights that are fixed in the world."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from scoredist3d.config import option
from scoredist3d.materials.base import AlbedoMaterial, ShadingInputs, logit
from scoredist3d.meshes.exportable import SurfaceChannels
from scoredist3d.ops.shading.directional import AMBIENT, DEFAULT_LIGHT, FILL, HEMISPHERE, KEY, directional_lighting
from scoredist3d.registry import register
from scoredist3d.seeding import Rng


@register("material", "directional-light", summary="Lambertian shading by directional lights fixed in the world.")
class DirectionalLight(AlbedoMaterial):
    """Lambertian material under a key light, a fill light and a hemisphere light, all fixed in the world.

    rgb = min(albedo * lighting(n), 1) with albedo = max_albedo * sigmoid(features); for the lighting, see
    :func:`~scoredist3d.ops.shading.directional.directional_lighting`. The defaults are the lights of the images that
    the embedded priors were trained on. With these lights, shading determines the slope of the surface, and the texture
    contains the albedo alone. A prior whose images have no common light, such as Stable Diffusion, needs another
    material.
    """

    needs_normal = True
    direction: Tensor

    @dataclass
    class Config(AlbedoMaterial.Config):
        """Options of the lights."""

        direction: tuple[float, float, float] = option(
            DEFAULT_LIGHT, "Direction towards the key light in the world (z up, x to the front); any length but 0."
        )
        ambient: float = option(AMBIENT, "Strength of the ambient light.", ge=0)
        hemisphere: float = option(HEMISPHERE, "Strength of the hemisphere light, which shines from above.", ge=0)
        key: float = option(KEY, "Strength of the key light.", ge=0)
        fill: float = option(FILL, "Strength of the fill light, which shines from the opposite side.", ge=0)
        max_albedo: float = option(
            0.98, "Largest albedo; overexposed parts of an image do not bound the albedo.", gt=0, le=1
        )

        def validate(self) -> list[str]:
            """Check that the direction has a length."""
            problems = super().validate()
            if not any(self.direction):
                problems.append("direction: the direction towards the key light must not be 0, 0, 0")
            return problems

    def __init__(self, config: Config, *, rng: Rng | None = None, prior: Any = None) -> None:
        super().__init__(config)
        self.config = config
        self.register_buffer("direction", F.normalize(torch.tensor(config.direction), dim=0), persistent=False)

    def forward(self, inputs: ShadingInputs) -> Tensor:
        """(N, 3) shaded colors.

        Raises:
            ValueError: The inputs have no normals.
        """
        if inputs.normals is None:
            raise ValueError("the directional-light material needs normals; set ShadingInputs.normals")
        config = self.config
        shading = directional_lighting(
            inputs.normals,
            self.direction,
            ambient=config.ambient,
            hemisphere=config.hemisphere,
            key=config.key,
            fill=config.fill,
        )
        return (self.albedo(inputs.features) * shading[:, None]).clamp_max(1.0)

    def albedo(self, features: Tensor) -> Tensor:
        """(N, 3) in [0, max_albedo]."""
        return self.config.max_albedo * features.sigmoid()

    def features_of(self, channels: SurfaceChannels) -> Tensor:
        """(N, 3): the features whose albedo is nearest to the base color."""
        return logit(channels.base_color / self.config.max_albedo)

"""Lambertian shading under a random point light (DreamFusion, arXiv 2209.14988, section 3.2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from scoredist3d.cameras import Cameras
from scoredist3d.config import option
from scoredist3d.materials.base import AlbedoMaterial, Light, ShadingInputs
from scoredist3d.registry import register
from scoredist3d.seeding import Rng


@register(
    "material", "diffuse", summary="Lambertian shading by a random point light and ambient light.", arxiv="2209.14988"
)
class Diffuse(AlbedoMaterial):
    """Lambertian material: rgb = albedo * (ambient + diffuse max(0, n . l)), with l the unit vector to the light.

    Shading makes the image depend on the shape, which discourages flat objects with a painted texture. The shading
    mode is drawn for each image of a step. Images are unlit during the first ``ambient_only_steps``. After that, an
    image is lit with probability ``diffuse_probability``, and a lit image has a white albedo with probability
    ``textureless_probability``. The direction of the light is drawn from N(c / |c|, light_spread^2 I), with c the
    position of the camera, and normalized. Its distance is uniform in ``light_distance_range``, in units of |c|. With
    ``soft_shading``, the strength p of the point light is uniform in [0, 1], and that of the ambient light is 1 - p.
    """

    @dataclass
    class Config(AlbedoMaterial.Config):
        """Options of the diffuse material."""

        ambient: float = option(0.1, "Strength of the ambient light in lit images.", ge=0, le=1)
        diffuse: float = option(0.9, "Strength of the point light in lit images.", ge=0, le=1)
        ambient_only_steps: int = option(1000, "Steps at the start in which all images are unlit.", ge=0)
        diffuse_probability: float = option(
            0.75, "Probability that an image is lit after ambient_only_steps.", ge=0, le=1
        )
        textureless_probability: float = option(0.5, "Probability that a lit image has a white albedo.", ge=0, le=1)
        light_spread: float = option(
            1.0, "Standard deviation of the light's direction around the camera's direction.", ge=0
        )
        light_distance_range: tuple[float, float] = option(
            (0.8, 1.5), "Distance of the light from the origin, in units of the camera distance.", gt=0
        )
        soft_shading: bool = option(
            False, "Draw the strength of the point light from U(0, 1) in lit images; the rest is ambient light."
        )
        evaluation: Literal["albedo", "diffuse", "textureless"] = option(
            "albedo",
            "Content of evaluation images: the unlit albedo (albedo), the albedo lit from the camera (diffuse), or a "
            "white surface lit from the camera (textureless).",
        )

        def validate(self) -> list[str]:
            """Check that the range is ordered and that the light does not exceed 1."""
            problems = super().validate()
            low, high = self.light_distance_range
            if low > high:
                problems.append(
                    f"light_distance_range: the first value must not exceed the second, got [{low}, {high}]"
                )
            if self.ambient + self.diffuse > 1.0 + 1e-6:
                problems.append(
                    f"ambient: ambient + diffuse must be at most 1 so that colors stay in [0, 1], "
                    f"got {self.ambient} + {self.diffuse}"
                )
            return problems

    def __init__(self, config: Config, *, rng: Rng | None = None, prior: Any = None) -> None:
        super().__init__(config)
        self.config = config

    def forward(self, inputs: ShadingInputs) -> Tensor:
        """(N, 3) shaded colors.

        Raises:
            ValueError: The inputs have a light, but no normals or no points.
        """
        albedo, light = self.albedo(inputs.features), inputs.light
        if light is None:
            return albedo
        if inputs.normals is None or inputs.points is None:
            raise ValueError(
                "the diffuse material needs normals and points to apply a light; set ShadingInputs.normals and .points"
            )
        to_light = F.normalize(light.position - inputs.points, dim=-1)
        lambert = (inputs.normals * to_light).sum(-1).clamp_min(0.0)
        shading = light.ambient + light.diffuse * lambert
        textureless = light.textureless[:, None]
        return (albedo * (1.0 - textureless) + textureless) * shading[:, None]

    def sample_light(self, cameras: Cameras, step: int, generator: torch.Generator | None) -> Light | None:
        """The random light of each image of a step; None if all images are unlit."""
        if generator is None:
            return None if self.config.evaluation == "albedo" else self._headlight(cameras)
        if step < self.config.ambient_only_steps or self.config.diffuse_probability == 0:
            return None
        origins, batch = cameras.origins, len(cameras)

        def uniform() -> Tensor:
            return torch.rand(batch, generator=generator, device=origins.device)

        distance = origins.norm(dim=-1, keepdim=True)
        noise = torch.randn(batch, 3, generator=generator, device=origins.device)
        direction = F.normalize(origins / distance + self.config.light_spread * noise, dim=-1)
        low, high = self.config.light_distance_range
        lit = (uniform() < self.config.diffuse_probability).to(origins.dtype)
        textureless = (uniform() < self.config.textureless_probability).to(origins.dtype)
        position = direction * distance * (low + (high - low) * uniform())[:, None]
        diffuse = uniform() if self.config.soft_shading else torch.full_like(lit, self.config.diffuse)
        ambient = 1.0 - diffuse if self.config.soft_shading else torch.full_like(lit, self.config.ambient)
        return Light(
            position=position,
            ambient=ambient * lit + (1.0 - lit),
            diffuse=diffuse * lit,
            textureless=textureless * lit,
        )

    def _headlight(self, cameras: Cameras) -> Light:
        """A light at each camera, for evaluation."""
        ones = torch.ones_like(cameras.distance)
        textureless = float(self.config.evaluation == "textureless") * ones
        return Light(cameras.origins, self.config.ambient * ones, self.config.diffuse * ones, textureless)

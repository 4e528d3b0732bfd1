"""Lambertian shading under a random point light (DreamFusion, arXiv 2209.14988, section 3.2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from scoredist3d.cameras import Cameras
from scoredist3d.config import option
from scoredist3d.materials.base import Light, Material, logit
from scoredist3d.meshes.exportable import SurfaceChannels
from scoredist3d.registry import register
from scoredist3d.seeding import Rng


@register("material", "diffuse", summary="Albedo under ambient and diffuse light near the camera.", arxiv="2209.14988")
class Diffuse(Material):
    """rgb = albedo * (ambient + diffuse max(0, n . l)), with l the unit vector from the point to the light.

    Light that makes the surface's look depend on its shape rules out flat, painted-on objects. Each image of a step
    draws its phase: unlit until ``ambient_only_steps``, then lit with probability ``diffuse_probability``, of which
    with white albedo (shape alone must explain the image) with ``textureless_probability``. The light's direction is
    drawn around the camera's from N(camera / |camera|, I) and its distance uniformly, in units of the camera's. With
    ``soft_shading`` each lit image draws its own share of the point light, between none and all.
    """

    @dataclass
    class Config(Material.Config):
        """Options of the diffuse material."""

        ambient: float = option(0.1, "Strength of the ambient light in lit images.", ge=0, le=1)
        diffuse: float = option(0.9, "Strength of the point light in lit images.", ge=0, le=1)
        ambient_only_steps: int = option(1000, "Steps without light at the start.", ge=0)
        diffuse_probability: float = option(0.75, "How often an image is lit afterwards.", ge=0, le=1)
        textureless_probability: float = option(0.5, "How often a lit image has white albedo.", ge=0, le=1)
        light_spread: float = option(1.0, "Deviation of the light's direction around the camera's.", ge=0)
        light_distance_range: tuple[float, float] = option(
            (0.8, 1.5), "Distance of the light from the origin, in units of the camera's.", gt=0
        )
        soft_shading: bool = option(
            False, "Lit images draw the strength of the point light from [0, 1] and have the rest as ambient light."
        )
        evaluation: Literal["albedo", "diffuse", "textureless"] = option(
            "albedo", "What evaluation images show: the colour alone, it lit from the camera, or white lit so."
        )

        def validate(self) -> list[str]:
            """The range must be ordered, and light must not exceed white."""
            problems = super().validate()
            low, high = self.light_distance_range
            if low > high:
                problems.append(
                    f"light_distance_range: the first value must not exceed the second, got [{low}, {high}]"
                )
            if self.ambient + self.diffuse > 1.0 + 1e-6:
                problems.append(
                    f"ambient: ambient + diffuse must be at most 1 so that colours stay in [0, 1], "
                    f"got {self.ambient} + {self.diffuse}"
                )
            return problems

    def __init__(self, config: Config, *, rng: Rng | None = None, prior: Any = None) -> None:
        super().__init__(config)
        self.config = config

    def forward(
        self,
        features: Tensor,
        *,
        normals: Tensor | None = None,
        view_dirs: Tensor | None = None,
        points: Tensor | None = None,
        light: Light | None = None,
    ) -> Tensor:
        """(N, 3) shaded colours.

        Raises:
            ValueError: A light without normals and points.
        """
        albedo = features.sigmoid()
        if light is None:
            return albedo
        if normals is None or points is None:
            raise ValueError("the diffuse material needs normals and points to apply a light")
        to_light = F.normalize(light.position - points, dim=-1)
        lambert = (normals * to_light).sum(-1).clamp_min(0.0)
        shading = light.ambient + light.diffuse * lambert
        textureless = light.textureless[:, None]
        return (albedo * (1.0 - textureless) + textureless) * shading[:, None]

    def channels(
        self, features: Tensor, *, points: Tensor | None = None, normals: Tensor | None = None
    ) -> SurfaceChannels:
        """The albedo alone."""
        return SurfaceChannels(features.sigmoid())

    def features_of(self, channels: SurfaceChannels) -> Tensor:
        """(N, 3): the logit of the base colour."""
        return logit(channels.base_color)

    def sample_light(self, cameras: Cameras, step: int, generator: torch.Generator | None) -> Light | None:
        """Phases and light positions of a step; ``None`` where no image of it is lit."""
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
        ones = torch.ones_like(cameras.distance)
        textureless = float(self.config.evaluation == "textureless") * ones
        return Light(cameras.origins, self.config.ambient * ones, self.config.diffuse * ones, textureless)

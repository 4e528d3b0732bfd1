"""Physically based shading with the split-sum approximation (arXiv 2111.12503, 2303.13873)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from scoredist3d.cameras import Cameras
from scoredist3d.config import option
from scoredist3d.materials.base import Light, Material, ShadingInputs, logit
from scoredist3d.materials.lighting import DIELECTRIC_F0, EnvironmentLight, to_environment_frame
from scoredist3d.meshes.exportable import SurfaceChannels
from scoredist3d.ops.shading.color import clamp_unit, linear_to_srgb, srgb_to_linear
from scoredist3d.registry import register
from scoredist3d.seeding import Rng

# Initial roughness and metallic, as fractions of their ranges, where the source object has no such channel.
_USUAL_ROUGHNESS = 0.5
_USUAL_METALLIC = 0.05
_LEAST_COSINE = 1e-3


@register("material", "pbr", summary="Metallic-roughness shading under an environment map.", arxiv="2111.12503")
class PBR(Material):
    """The metallic-roughness model of glTF under image-based lighting, with the split-sum approximation.

    With linear base color a, roughness r, metallic m, shading normal n, irradiance E, prefiltered radiance P around the
    mirrored view direction R, and A and B from the BRDF table:

        glossy(F_0) = (F_0 A + B) (1 + F_0 (1 / (A + B) - 1))
        metal = glossy(a) P(R, r),  other = a (1 - glossy(0.04)) E(n) / pi + glossy(0.04) P(R, r)
        rgb = sRGB(clamp(m metal + (1 - m) other))

    The second factor of ``glossy`` adds the energy of multiple scattering between the microfacets of a rough surface
    (Fdez-Aguera, JCGT 2019); without ``multiple_scattering`` it is 1. The diffuse term of non-metals excludes the
    reflected light. The model therefore conserves energy: under uniform light, no surface is brighter than the light,
    and a white one is equally bright.

    The features are the base color (3), the roughness, the metallic value and, if ``normal_strength`` is above 0, an
    offset o of the normal in world axes: n = normalize(normal + strength tanh(o)).
    """

    free_options = frozenset({"random_rotation", "learned"})

    @dataclass
    class Config(Material.Config):
        """Options of the physically based material."""

        albedo_range: tuple[float, float] = option(
            (0.0, 1.0), "Smallest and largest base color, in display sRGB.", ge=0, le=1
        )
        roughness_range: tuple[float, float] = option((0.08, 0.95), "Smallest and largest roughness.", ge=0, le=1)
        metallic_range: tuple[float, float] = option((0.0, 0.95), "Smallest and largest metallic value.", ge=0, le=1)
        normal_strength: float = option(
            0.0,
            "Largest learned offset of the unit normal along each axis; 0 keeps the normals of the geometry.",
            ge=0,
            le=1,
        )
        environment_map: str | None = option(
            None, "Equirectangular .hdr or 8-bit image, centered at +x; null is a built-in studio.", file=True
        )
        environment_resolution: int = option(
            64, "Rows of the environment map; 16 to 32 are suitable for a learned map.", ge=8, le=128
        )
        environment_levels: int = option(8, "Number of roughness values for which the map is prefiltered.", ge=2, le=16)
        intensity: float = option(1.0, "Factor that multiplies the radiance of the map.", gt=0)
        rotation: float = option(0.0, "Rotation of the map in degrees, counter-clockwise seen from above.")
        random_rotation: bool = option(False, "Rotate the map by a random angle in each training image.")
        learned: bool = option(False, "Optimize the map, starting from environment_map.")
        multiple_scattering: bool = option(True, "Include light that is scattered several times between microfacets.")

        def validate(self) -> list[str]:
            """Check that the ranges are ordered."""
            problems = super().validate()
            for name in ("albedo_range", "roughness_range", "metallic_range"):
                low, high = getattr(self, name)
                if low > high:
                    problems.append(f"{name}: the first value must not exceed the second, got [{low}, {high}]")
            return problems

    needs_normal = True
    needs_view_dirs = True

    def __init__(self, config: Config, *, rng: Rng | None = None, prior: Any = None) -> None:
        super().__init__(config)
        self.config = config
        self.num_features = 8 if config.normal_strength > 0 else 5
        panorama = EnvironmentLight.read(config.environment_map, config.environment_resolution, key="environment_map")
        self.environment = EnvironmentLight(panorama, levels=config.environment_levels, learned=config.learned)

    def forward(self, inputs: ShadingInputs) -> Tensor:
        """(N, 3) shaded colors. The light provides the rotation of the environment; its other values are ignored.

        Raises:
            ValueError: The inputs have no normals or no view directions.
        """
        if inputs.normals is None or inputs.view_dirs is None:
            raise ValueError(
                "the pbr material needs normals and view directions; set ShadingInputs.normals and .view_dirs"
            )
        rotation = None if inputs.light is None else inputs.light.rotation
        # Half precision causes visible banding, and the Fourier transforms do not support it.
        with torch.autocast(inputs.features.device.type, enabled=False):
            tensors = (inputs.features, inputs.normals, inputs.view_dirs)
            features, normals, view_dirs = (_at_least_float(tensor) for tensor in tensors)
            base, roughness, metallic = self._surface(features)
            shading = self._shading_normals(features, normals)
            radiance = self.reflected(srgb_to_linear(base), roughness, metallic, shading, view_dirs, rotation)
            return linear_to_srgb(clamp_unit(radiance))

    def reflected(
        self,
        albedo: Tensor,
        roughness: Tensor,
        metallic: Tensor,
        normals: Tensor,
        view_dirs: Tensor,
        rotation: Tensor | None = None,
    ) -> Tensor:
        """(N, 3) linear radiance toward the camera, not clamped to [0, 1].

        Args:
            albedo: (N, 3), linear base color.
            roughness: (N,).
            metallic: (N,).
            normals: (N, 3), unit.
            view_dirs: (N, 3), unit, from the camera to the point.
            rotation: (N,) radians by which the environment is rotated in addition to the configured angle.
        """
        toward = (normals * view_dirs).sum(-1, keepdim=True)
        reflected = view_dirs - 2.0 * toward * normals
        fixed = math.radians(self.config.rotation)
        if rotation is not None or fixed != 0.0:
            angle = fixed if rotation is None else rotation + fixed
            normals, reflected = to_environment_frame(normals, angle), to_environment_frame(reflected, angle)
        irradiance, glossy = self.environment(normals, reflected, roughness)
        # Normals in a volume may face away from the camera.
        cosine = (-toward[:, 0]).clamp(_LEAST_COSINE, 1.0)
        scale, bias = (value[:, None] for value in self.environment.reflectance(cosine, roughness))
        outside = self._glossy(torch.full_like(scale, DIELECTRIC_F0), scale, bias)
        other = albedo * (1.0 - outside) * irradiance + outside * glossy
        metal = self._glossy(albedo, scale, bias) * glossy
        return self.config.intensity * torch.lerp(other, metal, metallic[:, None])

    def channels(self, inputs: ShadingInputs) -> SurfaceChannels:
        """Base color, roughness and metallic, and shading normals if ``normal_strength`` is above 0."""
        base, roughness, metallic = self._surface(inputs.features)
        shading = None
        if inputs.normals is not None and self.config.normal_strength > 0:
            shading = self._shading_normals(inputs.features, inputs.normals)
        return SurfaceChannels(base, roughness, metallic, shading)

    def features_of(self, channels: SurfaceChannels) -> Tensor:
        """(N, num_features) without normal offsets; default roughness and metallic where ``channels`` has none."""
        config, base = self.config, channels.base_color
        parts = [logit(_fraction(base, config.albedo_range))]
        for values, limits, usual in (
            (channels.roughness, config.roughness_range, _USUAL_ROUGHNESS),
            (channels.metallic, config.metallic_range, _USUAL_METALLIC),
        ):
            fraction = torch.full_like(base[:, 0], usual) if values is None else _fraction(values, limits)
            parts.append(logit(fraction)[:, None])
        return F.pad(torch.cat(parts, dim=-1), (0, self.num_features - 5))

    def sample_light(self, cameras: Cameras, step: int, generator: torch.Generator | None) -> Light | None:
        """A random rotation of the environment per training image if ``random_rotation`` is true; otherwise None."""
        if generator is None or not self.config.random_rotation:
            return None
        origins = cameras.origins
        turns = torch.rand(len(cameras), generator=generator, device=origins.device, dtype=origins.dtype)
        none = torch.zeros_like(turns)
        return Light(origins, ambient=none, diffuse=none, textureless=none, rotation=2.0 * math.pi * turns)

    def _glossy(self, f0: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        """(N, C) specular reflectance under uniform light, for the reflectance ``f0`` at normal incidence."""
        single = f0 * scale + bias
        if not self.config.multiple_scattering:
            return single
        return single * (1.0 + f0 * (1.0 / (scale + bias).clamp(1e-3, 1.0) - 1.0))

    def _surface(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Base color (N, 3) in display sRGB, roughness (N,) and metallic (N,) within their ranges."""
        fractions, config = features[:, :5].sigmoid(), self.config
        return (
            _within(fractions[:, :3], config.albedo_range),
            _within(fractions[:, 3], config.roughness_range),
            _within(fractions[:, 4], config.metallic_range),
        )

    def _shading_normals(self, features: Tensor, normals: Tensor) -> Tensor:
        """(N, 3) unit normals with the learned offsets applied."""
        if self.config.normal_strength == 0:
            return normals
        return F.normalize(normals + self.config.normal_strength * features[:, 5:8].tanh(), dim=-1)


def _within(fraction: Tensor, limits: tuple[float, float]) -> Tensor:
    """Values at the relative position ``fraction`` in the range ``limits``."""
    low, high = limits
    return low + (high - low) * fraction


def _fraction(values: Tensor, limits: tuple[float, float]) -> Tensor:
    """Inverse of :func:`_within`, clamped to [0, 1]; 0 for an empty range."""
    low, high = limits
    return ((values - low) / max(high - low, 1e-6)).clamp(0.0, 1.0)


def _at_least_float(x: Tensor) -> Tensor:
    """``x`` in float32, or unchanged if its precision is higher."""
    return x.to(torch.promote_types(x.dtype, torch.float32))

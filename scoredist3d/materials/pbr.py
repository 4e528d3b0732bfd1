"""Physically based shading under an environment: metallic-roughness, split-sum (arXiv 2111.12503, 2303.13873)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from scoredist3d.cameras import Cameras
from scoredist3d.config import option
from scoredist3d.materials.base import Light, Material, logit
from scoredist3d.materials.lighting import DIELECTRIC_F0, EnvironmentLight, turned
from scoredist3d.meshes.exportable import SurfaceChannels
from scoredist3d.ops.shading.color import clamp_unit, linear_to_srgb, srgb_to_linear
from scoredist3d.registry import register
from scoredist3d.seeding import Rng

# Fractions of their ranges that roughness and metallic start at where the earlier object has none.
_USUAL_ROUGHNESS = 0.5
_USUAL_METALLIC = 0.05
_LEAST_COSINE = 1e-3


@register("material", "pbr", summary="Base colour, roughness and metal lit by an environment.", arxiv="2111.12503")
class PBR(Material):
    """The metallic-roughness model of glTF under image-based light, with the split-sum approximation.

    With linear base colour a, roughness r, metallic m, shading normal n, irradiance E, glossy light P from around the
    mirrored view R and the table's A, B:

        glossy(F_0) = (F_0 A + B) (1 + F_0 (1 / (A + B) - 1))
        metal = glossy(a) P(R, r),  other = a (1 - glossy(0.04)) E(n) / pi + glossy(0.04) P(R, r)
        rgb = sRGB(clamp(m metal + (1 - m) other))

    The second factor of ``glossy`` gives back the light that bounces more than once between the facets of a rough
    surface (Fdez-Aguera, JCGT 2019; without ``multiple_scattering`` it is 1), and what non-metals reflect does not
    reach their inside, so that under uniform light no surface is brighter than the light, and white ones are just as
    bright.

    Features are base colour (3), roughness, metallic and, where ``normal_strength`` is above 0, an offset o of the
    normal: n = normalize(normal + strength tanh(o)), in the world's axes.
    """

    free_options = frozenset({"random_rotation", "learned"})

    @dataclass
    class Config(Material.Config):
        """Options of the physically based material."""

        albedo_range: tuple[float, float] = option(
            (0.0, 1.0), "Least and greatest base colour, display sRGB.", ge=0, le=1
        )
        roughness_range: tuple[float, float] = option((0.08, 0.95), "Least and greatest roughness.", ge=0, le=1)
        metallic_range: tuple[float, float] = option((0.0, 0.95), "Least and greatest metallic.", ge=0, le=1)
        normal_strength: float = option(
            0.0, "Greatest offset of the unit normal along each axis; 0 keeps the geometry's normals.", ge=0, le=1
        )
        environment_map: str | None = option(
            None, "Equirectangular .hdr or 8-bit image, centre towards +x; null is a built-in studio.", file=True
        )
        environment_resolution: int = option(
            64, "Rows of the map that lights the object; 16 to 32 suit a learned one.", ge=8, le=128
        )
        environment_levels: int = option(8, "Roughnesses that the map is prefiltered for.", ge=2, le=16)
        intensity: float = option(1.0, "Factor on the light.", gt=0)
        rotation: float = option(0.0, "Degrees that the light is turned by, counter-clockwise seen from above.")
        random_rotation: bool = option(False, "Turn the light of each training image by a random angle.")
        learned: bool = option(False, "Optimise the map, starting from the given one.")
        multiple_scattering: bool = option(True, "Rough metals reflect all they receive, not the first bounce alone.")

        def validate(self) -> list[str]:
            """Ranges must be ordered."""
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

    def forward(
        self,
        features: Tensor,
        *,
        normals: Tensor | None = None,
        view_dirs: Tensor | None = None,
        points: Tensor | None = None,
        light: Light | None = None,
    ) -> Tensor:
        """(N, 3) shaded colours; of the light, only its rotation matters.

        Raises:
            ValueError: No normals or no directions of view.
        """
        if normals is None or view_dirs is None:
            raise ValueError("the pbr material needs normals and directions of view")
        rotation = None if light is None else light.rotation
        # Half precision would show as bands in smooth shades, and Fourier transforms do not take it.
        with torch.autocast(features.device.type, enabled=False):
            features, normals, view_dirs = (_at_least_float(x) for x in (features, normals, view_dirs))
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
        """(N, 3) linear radiance towards the camera, not clamped.

        Args:
            albedo: (N, 3), linear.
            roughness: (N,).
            metallic: (N,).
            normals: (N, 3), unit.
            view_dirs: (N, 3), unit, from the camera to the point.
            rotation: (N,) radians that the environment is turned by, beyond the configured angle.
        """
        toward = (normals * view_dirs).sum(-1, keepdim=True)
        reflected = view_dirs - 2.0 * toward * normals
        fixed = math.radians(self.config.rotation)
        if rotation is not None or fixed != 0.0:
            angle = fixed if rotation is None else rotation + fixed
            normals, reflected = turned(normals, angle), turned(reflected, angle)
        irradiance, glossy = self.environment(normals, reflected, roughness)
        # Normals of a volume may face away from the camera that sees them.
        cosine = (-toward[:, 0]).clamp(_LEAST_COSINE, 1.0)
        scale, bias = (value[:, None] for value in self.environment.reflectance(cosine, roughness))
        outside = self._glossy(torch.full_like(scale, DIELECTRIC_F0), scale, bias)
        other = albedo * (1.0 - outside) * irradiance + outside * glossy
        metal = self._glossy(albedo, scale, bias) * glossy
        return self.config.intensity * torch.lerp(other, metal, metallic[:, None])

    def channels(
        self, features: Tensor, *, points: Tensor | None = None, normals: Tensor | None = None
    ) -> SurfaceChannels:
        """Base colour, roughness and metallic; the shading normals where they differ from the geometry's."""
        base, roughness, metallic = self._surface(features)
        shading = None
        if normals is not None and self.config.normal_strength > 0:
            shading = self._shading_normals(features, normals)
        return SurfaceChannels(base, roughness, metallic, shading)

    def features_of(self, channels: SurfaceChannels) -> Tensor:
        """(N, num_features), normals as the geometry has them; half rough and hardly metallic where it is not told."""
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
        """A random rotation of the environment for each image, where asked for."""
        if generator is None or not self.config.random_rotation:
            return None
        origins = cameras.origins
        turns = torch.rand(len(cameras), generator=generator, device=origins.device, dtype=origins.dtype)
        none = torch.zeros_like(turns)
        return Light(origins, ambient=none, diffuse=none, textureless=none, rotation=2.0 * math.pi * turns)

    def _glossy(self, f0: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        """Share of uniform light that the surface reflects without letting it in."""
        single = f0 * scale + bias
        if not self.config.multiple_scattering:
            return single
        return single * (1.0 + f0 * (1.0 / (scale + bias).clamp(1e-3, 1.0) - 1.0))

    def _surface(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Base colour (N, 3) in display sRGB, roughness (N,) and metallic (N,) within their ranges."""
        fractions, config = features[:, :5].sigmoid(), self.config
        return (
            _within(fractions[:, :3], config.albedo_range),
            _within(fractions[:, 3], config.roughness_range),
            _within(fractions[:, 4], config.metallic_range),
        )

    def _shading_normals(self, features: Tensor, normals: Tensor) -> Tensor:
        """(N, 3), unit."""
        if self.config.normal_strength == 0:
            return normals
        return F.normalize(normals + self.config.normal_strength * features[:, 5:8].tanh(), dim=-1)


def _within(fraction: Tensor, limits: tuple[float, float]) -> Tensor:
    low, high = limits
    return low + (high - low) * fraction


def _fraction(values: Tensor, limits: tuple[float, float]) -> Tensor:
    """Where in a range values lie, in [0, 1]; 0 in a range that is one value."""
    low, high = limits
    return ((values - low) / max(high - low, 1e-6)).clamp(0.0, 1.0)


def _at_least_float(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))

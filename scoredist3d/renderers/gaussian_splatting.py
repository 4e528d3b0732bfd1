"""3D Gaussian splatting (Kerbl et al. 2023, arXiv 2308.04079)."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from scoredist3d.backgrounds.base import Background
from scoredist3d.cameras import Cameras
from scoredist3d.config import FieldError, option
from scoredist3d.geometry.base import GaussianCloud, GaussianSet, ScreenSpaceMeans
from scoredist3d.geometry.protocols import HasGaussians
from scoredist3d.materials.base import Light, Material, ShadingInputs
from scoredist3d.ops.rotations import rotation_matrices
from scoredist3d.ops.splatting.splat import MAX_CHANNELS, project, splat
from scoredist3d.ops.splatting.types import SplattedImages
from scoredist3d.registry import register
from scoredist3d.renderers.base import Render, Renderer, over
from scoredist3d.seeding import Rng

_MAX_EXTRA_CHANNELS = 5  # normal and two moments of the depth


@register(
    "renderer",
    "gaussian-splatting",
    summary="Rasterization of 3D Gaussians.",
    arxiv="2308.04079",
)
class GaussianSplatting(Renderer):
    """Renderer of 3D Gaussians: C = sum_i w_i c_i + (1 - sum_i w_i) C_bg over depth-sorted Gaussians i.

    The weights w_i are those of :mod:`scoredist3d.ops.splatting`. The material is evaluated at the mean of each
    Gaussian, once per camera. The normal of a Gaussian is its shortest axis, oriented towards the camera. Depth and
    normals are blended with the same weights as colors.
    """

    @dataclass
    class Config(Renderer.Config):
        """Options of Gaussian splatting."""

        antialiased: bool = option(
            False,
            "Reduce the opacity of Gaussians smaller than a pixel to compensate for the dilation (Mip-Splatting).",
        )
        dilation: float = option(0.3, "Variance added to each projected Gaussian, square pixels.", ge=0)
        near: float = option(0.05, "Near plane; closer Gaussians are culled, scene units.", gt=0)
        backend: Literal["auto", "torch", "native", "triton", "gsplat"] = option(
            "auto",
            "Implementation of projection and compositing. gsplat is an optional package that compiles at first use.",
        )

    supports = HasGaussians
    outputs = frozenset({"normal", "position", "depth_variance"})

    def __init__(
        self,
        config: Config,
        *,
        geometry: GaussianCloud,
        material: Material,
        background: Background,
        rng: Rng | None = None,
    ) -> None:
        super().__init__(config, geometry=geometry, material=material, background=background)
        limit = MAX_CHANNELS - _MAX_EXTRA_CHANNELS
        if material.num_channels > limit:
            raise FieldError(
                f"gaussian-splatting renders at most {limit} color channels, but the material has "
                f"{material.num_channels}; use another renderer",
                "type",
            )
        self.config = config

    @property
    def geometry(self) -> GaussianCloud:
        """The rendered Gaussians."""
        return cast(GaussianCloud, super().geometry)

    def forward(self, cameras: Cameras, *, step: int, rng: Rng | None = None, needs: Set[str] = frozenset()) -> Render:
        """Render ``B`` images."""
        rays = cameras.rays()
        device = rays.directions.device
        light = self.material.sample_light(cameras, step, None if rng is None else rng("light", step, device))
        background = self.background(
            rays.directions, generator=None if rng is None else rng("background", step, device)
        )
        # Half precision is too coarse for positions in the image.
        with torch.autocast(device.type, enabled=False):
            image, sums, projection = self._splatted(cameras, light, needs)
        shown, cosines = image.opacity.clamp_min(1e-6), rays.cosines[..., None]
        depth = image.depth / shown / cosines
        color = image.color[..., : self.material.num_channels]
        maps: dict[str, Tensor] = {}
        if "normal" in needs:
            maps["normal"] = F.normalize(sums["normal"], dim=-1)
        if "position" in needs:
            maps["position"] = (rays.origins + depth * rays.directions).detach()
        if "depth_variance" in needs:
            mean, square = (sums["moments"] / shown).split(1, dim=-1)
            maps["depth_variance"] = (square - mean.square()).clamp_min(0.0) / cosines.square()
        return Render(
            rgb=over(color, image.opacity, background),
            opacity=image.opacity,
            depth=depth,
            background=background,
            projection=projection,
            **maps,  # type: ignore[arg-type]
        )

    def _splatted(
        self, cameras: Cameras, light: Light | None, needs: Set[str]
    ) -> tuple[SplattedImages, dict[str, Tensor], ScreenSpaceMeans]:
        """The splatted Gaussians, the blended (B, H, W, C) values by name, and the projected means."""
        height, width = cameras.height, cameras.width
        gaussians = self.geometry()
        projected = project(
            gaussians.means,
            gaussians.scales,
            gaussians.quaternions,
            cameras.w2c,
            0.5 * height / torch.tan(cameras.fovy / 2),
            height,
            width,
            near=self.config.near,
            dilation=self.config.dilation,
            antialiased=self.config.antialiased,
            backend=self.config.backend,
        )
        toward = F.normalize(gaussians.means - cameras.origins[:, None], dim=-1)  # (B, N, 3)
        needs_normal = "normal" in needs or light is not None or self.material.needs_normal
        normals = facing_normals(gaussians, toward) if needs_normal else None
        values = {"color": self._colors(gaussians, toward, normals, light)}
        if "normal" in needs and normals is not None:
            values["normal"] = normals
        if "depth_variance" in needs:
            # Relative to the distance of the origin, so that squaring loses few digits.
            offset = projected.depth - cameras.origins.norm(dim=-1)[:, None]
            values["moments"] = torch.stack([offset, offset.square()], dim=-1)
        if len(values) > 1:
            values = {name: value.expand(len(cameras), -1, -1) for name, value in values.items()}
        channels = torch.cat(list(values.values()), dim=-1)
        image = splat(projected, channels, gaussians.opacities, height, width, backend=self.config.backend)
        sums = image.color.split([value.shape[-1] for value in values.values()], dim=-1)
        projection = ScreenSpaceMeans(projected.means2d, projected.visible, height, width)
        return image, dict(zip(values, sums, strict=True)), projection

    def _colors(self, gaussians: GaussianSet, toward: Tensor, normals: Tensor | None, light: Light | None) -> Tensor:
        """(N, C) colors, or (B, N, C) if they depend on the camera."""
        material, (batch, count) = self.material, toward.shape[:2]
        if normals is None and not material.needs_view_dirs:
            return material(ShadingInputs(gaussians.features, gaussians.means))

        def for_each(values: Tensor) -> Tensor:
            return values.expand(batch, *values.shape).flatten(0, 1)

        camera = torch.arange(batch, device=toward.device).repeat_interleave(count)
        inputs = ShadingInputs(
            features=for_each(gaussians.features),
            points=for_each(gaussians.means),
            normals=None if normals is None else normals.flatten(0, 1),
            view_dirs=toward.flatten(0, 1),
            light=None if light is None else light[camera],
        )
        colors: Tensor = material(inputs)
        return colors.view(batch, count, -1).to(toward.dtype)


def facing_normals(gaussians: GaussianSet, toward: Tensor) -> Tensor:
    """(B, N, 3) unit vectors along the shortest axes, oriented against the (B, N, 3) view directions ``toward``."""
    shortest = gaussians.scales.argmin(dim=-1)
    axes = rotation_matrices(gaussians.quaternions)
    axis = axes.gather(2, shortest[:, None, None].expand(-1, 3, 1))[..., 0]
    away = (axis * toward).sum(dim=-1, keepdim=True) > 0
    return torch.where(away, -axis, axis)

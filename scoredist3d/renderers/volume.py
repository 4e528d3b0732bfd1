"""Emission-absorption volume rendering with an occupancy grid (NeRF, arXiv 2003.08934; Instant-NGP, 2201.05989)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from scoredist3d.backgrounds.base import Background
from scoredist3d.cameras import Cameras
from scoredist3d.config import option
from scoredist3d.geometry.base import Field
from scoredist3d.materials.base import Light, Material
from scoredist3d.ops.compositing import accumulate, render_weights, transmittance
from scoredist3d.ops.occupancy import OccupancyGrid
from scoredist3d.ops.ray_marching import RaySamples, march_rays
from scoredist3d.registry import register
from scoredist3d.renderers.base import Render, Renderer, SampleRecord, over
from scoredist3d.seeding import Rng


@dataclass
class OccupancyConfig:
    """Which parts of space are skipped."""

    enabled: bool = option(True, "Skip cells that hold no density.")
    resolution: int = option(32, "Cells per axis over the ball's cube.", ge=1, le=512)
    every: int = option(16, "Steps between two updates.", ge=1)
    threshold: float = option(0.01, "Least optical depth of one ray step for a cell to count as occupied.", ge=0)
    decay: float = option(0.95, "Factor on a cell's remembered density at each update.", gt=0, le=1)


@dataclass(frozen=True)
class _RayColors:
    """Composited values of R rays: rgb premultiplied by opacity, depth and normal not yet divided by it."""

    rgb: Tensor  # (R, 3)
    opacity: Tensor  # (R, 1)
    depth: Tensor  # (R, 1)
    normal: Tensor | None  # (R, 3)
    record: SampleRecord | None


@register("renderer", "volume", summary="Volume rendering by ray marching through occupied space.", arxiv="2003.08934")
class VolumeRenderer(Renderer):
    """C = sum_i w_i c_i + (1 - sum_i w_i) C_bg, w_i = T_i (1 - exp(-sigma_i dt)), T_i = exp(-sum_{j<i} sigma_j dt).

    The ball is cut into steps of its diameter / ``num_samples``; in training each ray's steps are shifted by a random
    fraction, so that nothing can hide between samples. Steps in unoccupied cells are left out. Where gradients or
    normals make a sample expensive, so are those that less than ``min_transmittance`` of the light reaches: a first
    pass for the density alone finds them, which pays as soon as the object hides its inside.
    """

    @dataclass
    class Config(Renderer.Config):
        """Options of the volume renderer."""

        num_samples: int = option(96, "Steps across the ball's diameter.", ge=2, le=4096)
        jitter: bool = option(True, "Shift each training ray's steps by a random fraction of one.")
        min_transmittance: float = option(
            1e-3,
            "Training samples that less of the light reaches are left out; 0 keeps all and skips the first pass.",
            ge=0,
            lt=1,
        )
        occupancy: OccupancyConfig = field(
            default_factory=OccupancyConfig, metadata={"help": "Which parts of space are skipped."}
        )
        evaluation_chunk: int = option(8192, "Rays rendered at once in evaluation; bounds the memory.", ge=1)
        backend: Literal["auto", "torch", "native", "triton", "nerfacc"] = option(
            "auto", "Implementation of ray marching and compositing."
        )

    renders = Field

    def __init__(self, config: Config, *, geometry: Field, material: Material, background: Background) -> None:
        super().__init__(config, geometry=geometry, material=material, background=background)
        self.config = config
        self.step_size = 2.0 * geometry.radius / config.num_samples
        self.occupancy = (
            OccupancyGrid(
                config.occupancy.resolution,
                geometry.radius,
                threshold=config.occupancy.threshold,
                step_size=self.step_size,
            )
            if config.occupancy.enabled
            else None
        )

    def update_step(self, step: int, rng: Rng) -> None:
        """Coarse to fine in the geometry, and the occupancy grid where it is due (the same on every rank)."""
        super().update_step(step, rng)
        if self.occupancy is not None and step % self.config.occupancy.every == 0:
            generator = rng.shared()("occupancy", step, self.occupancy.density.device)
            self.occupancy.update(self.geometry.density, generator, decay=self.config.occupancy.decay)

    def forward(self, cameras: Cameras, *, step: int, rng: Rng | None = None, with_normal: bool = False) -> Render:
        """Render ``B`` images; without gradients in chunks of rays, with the same result."""
        rays = cameras.rays()
        shape, device = rays.directions.shape[:-1], rays.directions.device
        origins, directions = rays.origins.reshape(-1, 3), rays.directions.reshape(-1, 3)
        jitter = None
        if rng is not None and self.config.jitter:
            jitter = torch.rand(len(origins), generator=rng("jitter", step, device), device=device)
        light = self.material.sample_light(cameras, step, None if rng is None else rng("light", step, device))
        background = self.background(
            rays.directions, generator=None if rng is None else rng("background", step, device)
        )
        if torch.is_grad_enabled():
            colors = self._trace(origins, directions, jitter, light, 0, cameras, with_normal)
        else:
            colors = self._trace_chunks(origins, directions, jitter, light, cameras, with_normal)
        opacity = colors.opacity.view(*shape, 1)
        normal = None if colors.normal is None else F.normalize(colors.normal, dim=-1).view(*shape, 3)
        return Render(
            rgb=over(colors.rgb.view(*shape, 3), opacity, background),
            opacity=opacity,
            depth=colors.depth.view(*shape, 1) / opacity.clamp_min(1e-6),
            background=background,
            normal=normal,
            samples=colors.record,
        )

    def _trace_chunks(
        self,
        origins: Tensor,
        directions: Tensor,
        jitter: Tensor | None,
        light: Light | None,
        cameras: Cameras,
        with_normal: bool,
    ) -> _RayColors:
        chunks = []
        for first in range(0, len(origins), self.config.evaluation_chunk):
            part = slice(first, first + self.config.evaluation_chunk)
            shift = None if jitter is None else jitter[part]
            chunks.append(self._trace(origins[part], directions[part], shift, light, first, cameras, with_normal))
        normals = [chunk.normal for chunk in chunks if chunk.normal is not None]
        return _RayColors(
            rgb=torch.cat([chunk.rgb for chunk in chunks]),
            opacity=torch.cat([chunk.opacity for chunk in chunks]),
            depth=torch.cat([chunk.depth for chunk in chunks]),
            normal=torch.cat(normals) if normals else None,
            record=None,
        )

    def _trace(
        self,
        origins: Tensor,
        directions: Tensor,
        jitter: Tensor | None,
        light: Light | None,
        first_ray: int,
        cameras: Cameras,
        with_normal: bool,
    ) -> _RayColors:
        """March, query and composite (R, 3) rays, the first of which is pixel ``first_ray`` of the flattened batch."""
        backend = self.config.backend
        samples = march_rays(
            origins,
            directions,
            radius=self.geometry.radius,
            step_size=self.step_size,
            occupancy=None if self.occupancy is None else self.occupancy.occupied,
            jitter=jitter,
            backend=backend,
        )
        points = samples.positions(origins, directions)
        needs_normal = with_normal or light is not None
        if torch.is_grad_enabled() or needs_normal:
            samples, points = self._drop_hidden(samples, points)
        field_values = self.geometry(points, with_normal=needs_normal)
        normals = field_values.normal
        sample_light = None
        if light is not None:
            sample_light = light[(samples.ray_indices + first_ray) // (cameras.height * cameras.width)]
        rgb = self.material(field_values.features, normals=normals, points=points, light=sample_light)
        weights = render_weights(field_values.density, samples, backend=backend)
        values = [rgb, samples.midpoints[:, None]]
        if with_normal and normals is not None:
            values.append(normals)
        sums = accumulate(weights, torch.cat(values, dim=-1), samples, backend=backend)
        return _RayColors(
            rgb=sums[:, :3],
            opacity=accumulate(weights, None, samples, backend=backend),
            depth=sums[:, 3:4],
            normal=sums[:, 4:] if with_normal else None,
            record=SampleRecord(samples, weights, directions, normals) if torch.is_grad_enabled() else None,
        )

    @torch.no_grad()
    def _drop_hidden(self, samples: RaySamples, points: Tensor) -> tuple[RaySamples, Tensor]:
        """Leave out the samples that less than ``min_transmittance`` of the light reaches."""
        if self.config.min_transmittance == 0 or len(samples) == 0:
            return samples, points
        reached = transmittance(self.geometry.density(points), samples) > self.config.min_transmittance
        return samples.select(reached), points[reached]

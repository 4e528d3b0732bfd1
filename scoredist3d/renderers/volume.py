"""Emission-absorption volume rendering (NeRF, arXiv 2003.08934) of occupied, resampled or proposed parts of rays."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from scoredist3d.backgrounds.base import Background
from scoredist3d.cameras import Cameras
from scoredist3d.config import option
from scoredist3d.geometry.base import Field, GeometryOutput
from scoredist3d.geometry.implicit_volume import ImplicitVolume
from scoredist3d.geometry.protocols import HasDensity
from scoredist3d.materials.base import Light, Material
from scoredist3d.nn.hash_network import HashGridConfig, NetworkConfig
from scoredist3d.ops.volume_rendering.compositing import accumulate, render_weights, transmittance
from scoredist3d.ops.volume_rendering.occupancy import OccupancyGrid
from scoredist3d.ops.volume_rendering.ray_marching import RaySamples, march_rays
from scoredist3d.registry import register
from scoredist3d.renderers import volume_maps
from scoredist3d.renderers.base import NOTHING, Render, Renderer, over
from scoredist3d.renderers.patch import Patch, PatchConfig, draw_patch, low_resolution
from scoredist3d.renderers.volume_deferred import Maps, deferred, in_chunks
from scoredist3d.renderers.volume_sampling import Bins, Rays, interlevel, resample, uniform_bins
from scoredist3d.seeding import Rng


@dataclass
class OccupancyConfig:
    """Which parts of space are skipped."""

    enabled: bool = option(True, "Skip cells that hold no density.")
    resolution: int = option(32, "Cells per axis over the ball's cube.", ge=1, le=512)
    every: int = option(16, "Steps between two updates.", ge=1)
    threshold: float = option(0.01, "Least optical depth of one ray step for a cell to count as occupied.", ge=0)
    decay: float = option(0.95, "Factor on a cell's remembered density at each update.", gt=0, le=1)


@dataclass
class ResamplingConfig:
    """Coarse bins of the estimators ``importance`` and ``proposal``."""

    coarse_samples: int = option(64, "Bins of each ray's chord of the ball that are looked at first.", ge=2, le=4096)
    padding: float = option(
        0.01, "Share of the samples spread evenly over the chord, whatever the coarse weights are.", ge=0
    )


@dataclass
class ProposalConfig:
    """The small density field of the estimator ``proposal``."""

    num_levels: int = option(5, "Resolution levels of its hash grid.", ge=1, le=32)
    log2_hashmap_size: int = option(13, "log2 of the entries per level.", ge=4, le=24)
    base_resolution: int = option(8, "Vertices per axis of the coarsest level.", ge=2)
    per_level_scale: float = option(1.5, "Growth of the resolution from level to level.", ge=1)
    hidden_width: int = option(16, "Units of its hidden layer.", ge=1)


@dataclass(frozen=True)
class _Request:
    """What a render is to be made of, beside its rays.

    Attributes:
        needs: Maps beside colour, opacity and depth.
        training: For gradients: leave out what they would hardly reach, and compare proposals.
        step: Optimiser step.
        light: One light per image, or ``None``.
    """

    needs: Set[str]
    training: bool
    step: int
    light: Light | None


@dataclass(frozen=True)
class _Proposal:
    """What a proposal field has said about rays."""

    bins: Bins
    weights: Tensor  # (H, K)


@register("renderer", "volume", summary="Volume rendering by ray marching through occupied space.", arxiv="2003.08934")
class VolumeRenderer(Renderer):
    """C = sum_i w_i c_i + (1 - sum_i w_i) C_bg, w_i = T_i (1 - exp(-sigma_i dt_i)), T_i = exp(-sum_{j<i} sigma_j dt_j).

    Where samples lie is up to the ``estimator``. ``occupancy`` cuts the ball into steps of its diameter /
    ``num_samples`` and leaves out those in cells without density. ``importance`` looks at coarse bins of each ray
    first and puts ``num_samples`` intervals where these have weight (NeRF, section 5.2). ``proposal`` does the same
    with the density of a small field of its own, which learns to enclose the weights of the object (mip-NeRF 360). In
    training each ray's steps are shifted by a random fraction, so that nothing can hide between samples.

    Where gradients or normals make a sample expensive, those that less than ``min_transmittance`` of the light reaches
    are left out: a first pass for the density alone finds them, which pays as soon as the object hides its inside.
    """

    @dataclass
    class Config(Renderer.Config):
        """Options of the volume renderer."""

        num_samples: int = option(
            96,
            "Steps across the ball's diameter; with importance and proposal, intervals of each ray.",
            ge=2,
            le=4096,
        )
        estimator: Literal["occupancy", "importance", "proposal"] = option(
            "occupancy",
            "Where samples lie: in occupied cells, where a coarse pass sees something, or where a small field says.",
        )
        jitter: bool = option(True, "Shift each training ray's steps by a random fraction of one.")
        min_transmittance: float = option(
            1e-3,
            "Training samples that less of the light reaches are left out; 0 keeps all and skips the first pass.",
            ge=0,
            lt=1,
        )
        occupancy: OccupancyConfig = field(
            default_factory=OccupancyConfig, metadata={"help": "Which parts of space are skipped (occupancy)."}
        )
        resampling: ResamplingConfig = field(
            default_factory=ResamplingConfig, metadata={"help": "The coarse pass (importance, proposal)."}
        )
        proposal: ProposalConfig = field(
            default_factory=ProposalConfig, metadata={"help": "The small density field (proposal)."}
        )
        patch: PatchConfig = field(
            default_factory=PatchConfig, metadata={"help": "The part of each view that gets gradients."}
        )
        training_chunk: int | None = option(
            None,
            "Rays whose samples are kept at once in training: the backward pass computes each chunk again, for twice "
            "the time and a bounded memory; all at once where not given.",
            ge=1,
        )
        evaluation_chunk: int = option(8192, "Rays rendered at once in evaluation; bounds the memory.", ge=1)
        backend: Literal["auto", "torch", "native", "triton", "nerfacc"] = option(
            "auto", "Implementation of ray marching and compositing."
        )

    supports: type = HasDensity
    outputs = frozenset({"normal", "position", "depth_variance", "orientation", "distortion"})

    def __init__(
        self,
        config: Config,
        *,
        geometry: Field,
        material: Material,
        background: Background,
        rng: Rng | None = None,
    ) -> None:
        super().__init__(config, geometry=geometry, material=material, background=background)
        self.config = config
        self.step_size = 2.0 * geometry.radius / config.num_samples
        self.occupancy: OccupancyGrid | None = None
        self.proposal: ImplicitVolume | None = None
        if config.estimator == "occupancy" and config.occupancy.enabled:
            self.occupancy = OccupancyGrid(
                config.occupancy.resolution,
                geometry.radius,
                threshold=config.occupancy.threshold,
                step_size=self.step_size,
            )
        if config.estimator == "proposal":
            self.proposal = _proposal_field(config.proposal, geometry.radius, (rng or Rng()).derive("proposal"))

    @property
    def geometry(self) -> Field:
        """What is rendered."""
        return cast(Field, super().geometry)

    def update_step(self, step: int, rng: Rng) -> None:
        """Coarse to fine in the geometry, and the occupancy grid where it is due (the same on every rank)."""
        super().update_step(step, rng)
        if self.occupancy is not None and step % self.config.occupancy.every == 0:
            generator = rng.shared()("occupancy", step, self.occupancy.density.device)
            self.occupancy.update(self._extinction_at, generator, decay=self.config.occupancy.decay)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """``proposal`` where there is one."""
        if self.proposal is None:
            return []
        return [{"name": "proposal", "params": list(self.proposal.parameters())}]

    def forward(self, cameras: Cameras, *, step: int, rng: Rng | None = None, needs: Set[str] = NOTHING) -> Render:
        """Render ``B`` images; without gradients in chunks of rays, with the same result."""
        rays = cameras.rays()
        shape, device = rays.directions.shape[:-1], rays.directions.device
        light = self.material.sample_light(cameras, step, None if rng is None else rng("light", step, device))
        background = self.background(
            rays.directions, generator=None if rng is None else rng("background", step, device)
        )
        request = _Request(frozenset(needs), torch.is_grad_enabled(), step, light)
        patch = draw_patch(self.config.patch, cameras, rng, step)
        if patch is None or not request.training:
            maps = self._images(rays.origins, rays.directions, request, rng)
        else:
            maps = self._patched(patch, cameras, request, rng)
        opacity = maps["opacity"]
        depth = maps["depth"] / opacity.clamp_min(1e-6)
        return Render(
            rgb=over(maps["rgb"].view(*shape, -1), opacity, background),
            opacity=opacity,
            depth=depth,
            background=background,
            normal=F.normalize(maps["normal"], dim=-1) if "normal" in needs else None,
            position=rays.origins + rays.directions * depth.detach() if "position" in needs else None,
            depth_variance=maps.get("depth_variance"),
            orientation=maps.get("orientation"),
            distortion=maps.get("distortion"),
            auxiliary={"interlevel": maps["interlevel"].mean()} if "interlevel" in maps else {},
        )

    def _images(
        self, origins: Tensor, directions: Tensor, request: _Request, rng: Rng | None, stream: str = "jitter"
    ) -> Maps:
        """(B, H, W, C) maps of rays (B, H, W, 3)."""
        shape, device = directions.shape[:-1], directions.device
        count = directions[..., 0].numel()
        jitter = None
        if rng is not None and self.config.jitter:
            jitter = torch.rand(count, generator=rng(stream, request.step, device), device=device).to(directions)
        images = torch.arange(shape[0], device=device).repeat_interleave(count // shape[0])
        rays = Rays(origins.reshape(-1, 3), directions.reshape(-1, 3), images, jitter)
        maps = self._all_rays(rays, request)
        return {name: values.view(*shape, values.shape[-1]) for name, values in maps.items()}

    def _patched(self, patch: Patch, cameras: Cameras, request: _Request, rng: Rng | None) -> Maps:
        """Maps of whole images, of which only the patch has gradients; see :meth:`Patch.paste` for their scale."""
        coarse_rays, rays = low_resolution(self.config.patch, cameras).rays(), cameras.rays()
        with torch.no_grad():
            unseen = _Request(request.needs, False, request.step, request.light)
            coarse = self._images(coarse_rays.origins, coarse_rays.directions, unseen, rng, "jitter-coarse")
        fine = self._images(patch.cut(rays.origins), patch.cut(rays.directions), request, rng)
        size = (cameras.height, cameras.width)
        return {
            name: patch.paste(values, coarse[name], *size) if name in coarse else values
            for name, values in fine.items()
        }

    def _all_rays(self, rays: Rays, request: _Request) -> Maps:
        """(R, C) maps, with as many rays at a time as the memory is to hold."""

        def trace(part: Rays) -> Maps:
            return self._trace(part, request)

        if not request.training:
            return in_chunks(trace, rays, self.config.evaluation_chunk)
        chunk = self.config.training_chunk
        if chunk is None or chunk >= len(rays):
            return trace(rays)
        parts = (self.geometry, self.material, self)
        parameters = [parameter for part in parts for parameter in part.parameters() if parameter.requires_grad]
        return deferred(trace, rays, chunk, parameters)

    def _trace(self, rays: Rays, request: _Request) -> Maps:
        """Find samples, query and composite them: (R, C) maps, colour, depth and normal weighted by the opacity."""
        backend, needs = self.config.backend, request.needs
        samples, proposal = self._place(rays, request)
        points = samples.positions(rays.origins, rays.directions)
        with_normal = self._needs_normal(request)
        if request.training or with_normal:
            samples, points = self._drop_hidden(samples, points)
        values = self.geometry(points, with_normal=with_normal)
        view_dirs = None
        if self._needs_view_dirs(request):
            view_dirs = rays.directions.index_select(0, samples.ray_indices)
        light = None if request.light is None else request.light[rays.images[samples.ray_indices]]
        rgb = self.material(values.features, normals=values.normal, view_dirs=view_dirs, points=points, light=light)
        weights = render_weights(self._extinction(values, samples, view_dirs, request.step), samples, backend=backend)
        columns = [rgb, samples.midpoints[:, None]]
        if "normal" in needs and values.normal is not None:
            columns.append(values.normal)
        sums = accumulate(weights, torch.cat(columns, dim=-1), samples, backend=backend)
        channels = self.material.num_channels
        maps = {
            "rgb": sums[:, :channels],
            "opacity": accumulate(weights, None, samples, backend=backend),
            "depth": sums[:, channels : channels + 1],
        }
        if "normal" in needs:
            maps["normal"] = sums[:, channels + 1 :]
        if "depth_variance" in needs:
            depth = maps["depth"] / maps["opacity"].clamp_min(1e-6)
            maps["depth_variance"] = volume_maps.depth_variance(
                weights, samples, depth, maps["opacity"], backend=backend
            )
        if "orientation" in needs and values.normal is not None and view_dirs is not None:
            maps["orientation"] = volume_maps.orientation(weights, samples, values.normal, view_dirs, backend=backend)
        if "distortion" in needs:
            maps["distortion"] = volume_maps.distortion(weights, samples, 2.0 * self.geometry.radius)
        if proposal is not None:
            maps["interlevel"] = interlevel(proposal.bins, proposal.weights, samples, weights)
        return maps

    def _needs_normal(self, request: _Request) -> bool:
        """Whether samples need normals."""
        asked = not request.needs.isdisjoint({"normal", "orientation"})
        return asked or request.light is not None or self.material.needs_normal

    def _needs_view_dirs(self, request: _Request) -> bool:
        """Whether samples need the direction that they are seen along."""
        return self.material.needs_view_dirs or "orientation" in request.needs

    def _place(self, rays: Rays, request: _Request) -> tuple[RaySamples, _Proposal | None]:
        """Where to look along rays, and what a proposal field has said about it, for its training."""
        if self.config.estimator == "occupancy":
            return self._march(rays), None
        bins = uniform_bins(rays, self.geometry.radius, self.config.resampling.coarse_samples)
        points = bins.points(rays)
        if self.proposal is None:
            with torch.no_grad():
                weights = bins.weights(self._extinction_at(points))
        else:
            weights = bins.weights(self.proposal.extinction(points))
        padding = self.config.resampling.padding
        samples = resample(bins, weights.detach(), self.config.num_samples, jitter=rays.jitter, padding=padding)
        learns = self.proposal is not None and request.training
        return samples, _Proposal(bins, weights) if learns else None

    def _march(self, rays: Rays) -> RaySamples:
        """Steps through occupied cells."""
        return march_rays(
            rays.origins,
            rays.directions,
            radius=self.geometry.radius,
            step_size=self.step_size,
            occupancy=None if self.occupancy is None else self.occupancy.occupied,
            jitter=rays.jitter,
            backend=self.config.backend,
        )

    def _extinction_at(self, points: Tensor) -> Tensor:
        """(N,) at (N, 3), per scene unit, seen from nowhere in particular: what decides where to look closer."""
        return self.geometry.extinction(points)

    def _extinction(self, values: GeometryOutput, samples: RaySamples, view_dirs: Tensor | None, step: int) -> Tensor:
        """(M,) mean extinctions of the samples' intervals, per scene unit."""
        return values.density

    def _transmittance(self, samples: RaySamples, points: Tensor) -> Tensor:
        """(M,), at least the share of the light that reaches each interval's start."""
        return transmittance(self.geometry.extinction(points), samples)

    @torch.no_grad()
    def _drop_hidden(self, samples: RaySamples, points: Tensor) -> tuple[RaySamples, Tensor]:
        """Leave out the samples that less than ``min_transmittance`` of the light reaches."""
        if self.config.min_transmittance == 0 or len(samples) == 0:
            return samples, points
        reached = self._transmittance(samples, points) > self.config.min_transmittance
        return samples.select(reached), points[reached]


def _proposal_field(config: ProposalConfig, radius: float, rng: Rng) -> ImplicitVolume:
    """A small density volume; it starts as the same ball as a large one, with a single feature that nobody reads."""
    grid = HashGridConfig(
        num_levels=config.num_levels,
        log2_hashmap_size=config.log2_hashmap_size,
        base_resolution=config.base_resolution,
        per_level_scale=config.per_level_scale,
    )
    network = NetworkConfig(hidden_width=config.hidden_width)
    return ImplicitVolume(ImplicitVolume.Config(radius=radius, num_features=1, grid=grid, network=network), rng=rng)

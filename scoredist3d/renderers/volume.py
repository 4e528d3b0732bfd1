"""Emission-absorption volume rendering (NeRF, arXiv 2003.08934) with three ways of placing samples along rays."""

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
from scoredist3d.limits import MAX_HASH_RESOLUTION, MAX_SAMPLES, MAX_WIDTH
from scoredist3d.materials.base import Light, Material, ShadingInputs
from scoredist3d.nn.hash_network import HashGridConfig, NetworkConfig
from scoredist3d.ops.volume_rendering.compositing import accumulate, render_weights, transmittance
from scoredist3d.ops.volume_rendering.occupancy import OccupancyGrid
from scoredist3d.ops.volume_rendering.ray_marching import RaySamples, march_rays
from scoredist3d.registry import register
from scoredist3d.renderers import volume_maps
from scoredist3d.renderers.base import Render, Renderer, over
from scoredist3d.renderers.patch import Patch, PatchConfig, draw_patch, low_resolution
from scoredist3d.renderers.volume_deferred import Maps, deferred, in_chunks
from scoredist3d.renderers.volume_sampling import Bins, RayBatch, interlevel, resample, uniform_bins
from scoredist3d.seeding import Rng


@dataclass
class OccupancyConfig:
    """Options of empty-space skipping."""

    enabled: bool = option(True, "Skip cells without density.")
    resolution: int = option(32, "Cells per axis of the cube that encloses the ball.", ge=1, le=512)
    every: int = option(16, "Optimizer steps between updates of the grid.", ge=1)
    threshold: float = option(0.01, "Smallest optical depth of one ray step at which a cell counts as occupied.", ge=0)
    decay: float = option(0.95, "Factor by which each update multiplies the stored density of a cell.", gt=0, le=1)


@dataclass
class ResamplingConfig:
    """Coarse pass of the estimators ``importance`` and ``proposal``."""

    coarse_samples: int = option(64, "Bins per ray in the coarse pass.", ge=2, le=4096)
    padding: float = option(
        0.01, "Total weight spread evenly over all bins, relative to coarse weights that sum to 1.", ge=0
    )


@dataclass
class ProposalConfig:
    """Options of the proposal field, a small density field for the estimator ``proposal``."""

    num_levels: int = option(5, "Levels of the hash grid.", ge=1, le=32)
    log2_hashmap_size: int = option(13, "log2 of the number of entries per level.", ge=4, le=24)
    base_resolution: int = option(8, "Vertices per axis of the coarsest level.", ge=2, le=MAX_HASH_RESOLUTION)
    per_level_scale: float = option(1.5, "Ratio of the resolutions of consecutive levels.", ge=1)
    hidden_width: int = option(16, "Units of the hidden layer.", ge=1, le=MAX_WIDTH)


@dataclass(frozen=True)
class RenderRequest:
    """Settings of one call of the renderer, which apply to all of its rays.

    Attributes:
        needs: Names of the optional maps to render.
        training: Whether gradients are recorded. If so, hidden samples are dropped and the proposal loss is computed.
        step: Optimizer step.
        light: One light per image, or None.
    """

    needs: Set[str]
    training: bool
    step: int
    light: Light | None


@dataclass(frozen=True)
class _Proposal:
    """Bins along rays and their weights according to the proposal field."""

    bins: Bins
    weights: Tensor  # (H, K)


@register("renderer", "volume", summary="Volume rendering of density fields.", arxiv="2003.08934")
class VolumeRenderer(Renderer):
    """Volume renderer of density fields: C = sum_i w_i c_i + (1 - sum_i w_i) C_bg over the samples i of each ray.

    The weights are w_i = T_i (1 - exp(-sigma_i dt_i)) with T_i = exp(-sum_{j<i} sigma_j dt_j). The ``estimator``
    determines where the samples are. ``occupancy`` marches through the ball with a step of its diameter /
    ``num_samples`` and skips cells without density. ``importance`` evaluates the density in coarse bins and distributes
    ``num_samples`` intervals according to the weights of these bins (NeRF, section 5.2). ``proposal`` takes the weights
    from a small density field instead, which is trained to bound the weights of the object from above (mip-NeRF 360).
    In training, the steps of each ray are shifted by a random fraction of a step, so that all depths are sampled.

    If gradients or normals are computed, samples whose transmittance is below ``min_transmittance`` are dropped. A
    first pass without gradients determines the transmittance. This saves time once the surface hides the inside of the
    object.
    """

    @dataclass
    class Config(Renderer.Config):
        """Options of the volume renderer."""

        num_samples: int = option(
            96,
            "Steps across the diameter of the ball (occupancy), or intervals per ray (importance, proposal).",
            ge=2,
            le=4096,
        )
        estimator: Literal["occupancy", "importance", "proposal"] = option(
            "occupancy",
            "Placement of samples: in occupied cells (occupancy), or according to the weights of a coarse pass "
            "(importance) or of a proposal field (proposal).",
        )
        jitter: bool = option(True, "Shift the steps of each training ray by a random fraction of a step.")
        min_transmittance: float = option(
            1e-3,
            "Training samples with a lower transmittance are dropped; 0 keeps all samples and skips the first pass.",
            ge=0,
            lt=1,
        )
        occupancy: OccupancyConfig = field(
            default_factory=OccupancyConfig, metadata={"help": "Empty-space skipping (estimator occupancy)."}
        )
        resampling: ResamplingConfig = field(
            default_factory=ResamplingConfig, metadata={"help": "The coarse pass (estimators importance and proposal)."}
        )
        proposal: ProposalConfig = field(
            default_factory=ProposalConfig, metadata={"help": "The proposal field (estimator proposal)."}
        )
        patch: PatchConfig = field(
            default_factory=PatchConfig, metadata={"help": "Training on a random patch of each view."}
        )
        training_chunk: int | None = option(
            None,
            "Rays per chunk in training. The backward pass renders each chunk again, which limits memory use and "
            "doubles the time. Null renders all rays at once.",
            ge=1,
            le=MAX_SAMPLES,
        )
        evaluation_chunk: int = option(8192, "Rays per chunk in evaluation; limits memory use.", ge=1, le=MAX_SAMPLES)
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
        """The rendered field."""
        return cast(Field, super().geometry)

    def update_step(self, step: int, rng: Rng) -> None:
        """Update the geometry, the material and, every few steps, the occupancy grid; the same on all ranks."""
        super().update_step(step, rng)
        if self.occupancy is not None and step % self.config.occupancy.every == 0:
            generator = rng.shared()("occupancy", step, self.occupancy.density.device)
            self.occupancy.update(self._extinction_at, generator, decay=self.config.occupancy.decay)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The group ``proposal`` if the estimator is ``proposal``; empty otherwise."""
        if self.proposal is None:
            return []
        return [{"name": "proposal", "params": list(self.proposal.parameters())}]

    def forward(self, cameras: Cameras, *, step: int, rng: Rng | None = None, needs: Set[str] = frozenset()) -> Render:
        """Render ``B`` images. Evaluation renders in chunks of rays, with the same result."""
        rays = cameras.rays()
        shape, device = rays.directions.shape[:-1], rays.directions.device
        light = self.material.sample_light(cameras, step, None if rng is None else rng("light", step, device))
        background = self.background(
            rays.directions, generator=None if rng is None else rng("background", step, device)
        )
        request = RenderRequest(frozenset(needs), torch.is_grad_enabled(), step, light)
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
            auxiliary_losses={"interlevel": maps["interlevel"].mean()} if "interlevel" in maps else {},
        )

    def _images(
        self, origins: Tensor, directions: Tensor, request: RenderRequest, rng: Rng | None, stream: str = "jitter"
    ) -> Maps:
        """(B, H, W, C) maps along (B, H, W, 3) rays, jittered by the random ``stream``."""
        shape, device = directions.shape[:-1], directions.device
        count = directions[..., 0].numel()
        jitter = None
        if rng is not None and self.config.jitter:
            jitter = torch.rand(count, generator=rng(stream, request.step, device), device=device).to(directions)
        images = torch.arange(shape[0], device=device).repeat_interleave(count // shape[0])
        rays = RayBatch(origins.reshape(-1, 3), directions.reshape(-1, 3), images, jitter)
        maps = self._all_rays(rays, request)
        return {name: values.view(*shape, values.shape[-1]) for name, values in maps.items()}

    def _patched(self, patch: Patch, cameras: Cameras, request: RenderRequest, rng: Rng | None) -> Maps:
        """Maps of whole images in which only the patch has gradients, scaled as in :meth:`Patch.paste`."""
        coarse_rays, rays = low_resolution(self.config.patch, cameras).rays(), cameras.rays()
        with torch.no_grad():
            evaluation = RenderRequest(request.needs, False, request.step, request.light)
            coarse = self._images(coarse_rays.origins, coarse_rays.directions, evaluation, rng, "jitter-coarse")
        fine = self._images(patch.cut(rays.origins), patch.cut(rays.directions), request, rng)
        size = (cameras.height, cameras.width)
        return {
            name: patch.paste(values, coarse[name], *size) if name in coarse else values
            for name, values in fine.items()
        }

    def _all_rays(self, rays: RayBatch, request: RenderRequest) -> Maps:
        """(R, C) maps of all rays, computed in chunks of the configured size."""

        def trace(part: RayBatch) -> Maps:
            return self._trace(part, request)

        if not request.training:
            return in_chunks(trace, rays, self.config.evaluation_chunk)
        chunk = self.config.training_chunk
        if chunk is None or chunk >= len(rays):
            return trace(rays)
        parts = (self.geometry, self.material, self)
        parameters = [parameter for part in parts for parameter in part.parameters() if parameter.requires_grad]
        return deferred(trace, rays, chunk, parameters)

    def _trace(self, rays: RayBatch, request: RenderRequest) -> Maps:
        """(R, C) maps of the sampled and shaded rays; color, depth and normal are premultiplied by the opacity."""
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
        rgb = self.material(ShadingInputs(values.features, points, values.normal, view_dirs, light))
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

    def _needs_normal(self, request: RenderRequest) -> bool:
        """Whether the samples need normals."""
        for_maps = not request.needs.isdisjoint({"normal", "orientation"})
        return for_maps or request.light is not None or self.material.needs_normal

    def _needs_view_dirs(self, request: RenderRequest) -> bool:
        """Whether the samples need view directions."""
        return self.material.needs_view_dirs or "orientation" in request.needs

    def _place(self, rays: RayBatch, request: RenderRequest) -> tuple[RaySamples, _Proposal | None]:
        """The samples of the rays, and the proposal if it needs training, else None."""
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

    def _march(self, rays: RayBatch) -> RaySamples:
        """March through the occupied cells."""
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
        """(N,) view-independent extinctions at (N, 3) points, per scene unit, for the placement of samples."""
        return self.geometry.extinction(points)

    def _extinction(self, values: GeometryOutput, samples: RaySamples, view_dirs: Tensor | None, step: int) -> Tensor:
        """(M,) mean extinctions over the intervals of the samples, per scene unit."""
        return values.density

    def _transmittance(self, samples: RaySamples, points: Tensor) -> Tensor:
        """(M,) upper bounds on the transmittance up to the start of each interval."""
        return transmittance(self.geometry.extinction(points), samples)

    @torch.no_grad()
    def _drop_hidden(self, samples: RaySamples, points: Tensor) -> tuple[RaySamples, Tensor]:
        """Drop samples with a transmittance of at most ``min_transmittance``."""
        if self.config.min_transmittance == 0 or len(samples) == 0:
            return samples, points
        reached = self._transmittance(samples, points) > self.config.min_transmittance
        return samples.select(reached), points[reached]


def _proposal_field(config: ProposalConfig, radius: float, rng: Rng) -> ImplicitVolume:
    """A small density volume, initialized to the same ball as the default volume; its single feature is unused."""
    grid = HashGridConfig(
        num_levels=config.num_levels,
        log2_hashmap_size=config.log2_hashmap_size,
        base_resolution=config.base_resolution,
        per_level_scale=config.per_level_scale,
    )
    network = NetworkConfig(hidden_width=config.hidden_width)
    return ImplicitVolume(ImplicitVolume.Config(radius=radius, num_features=1, grid=grid, network=network), rng=rng)

"""Ray marching through a ball with empty-space skipping.

Along each ray the ball is divided into intervals of equal length that start at ``t_near + (k + jitter) * step_size``.
An interval is kept if its midpoint is inside the ball and in an occupied cell (the rule of nerfacc's grid traversal).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from scoredist3d.ops import backends, native

BACKENDS = ("torch", "native", "triton", "nerfacc")

# Size of the dense (ray, interval) blocks that the torch backend processes; it bounds the temporary memory.
_CHUNK = {"cpu": 2**19, "cuda": 2**24}


@dataclass(frozen=True)
class RaySamples:
    """Packed intervals along rays, sorted by ray, then by distance.

    Attributes:
        ray_indices: (M,) int64, the ray of each interval.
        t_starts, t_ends: (M,), distances along the ray in scene units.
        offsets: (R + 1,) int64; ray r has the intervals from ``offsets[r]`` up to ``offsets[r + 1]``.
        num_rays: R, number of rays, including those without intervals.
    """

    ray_indices: Tensor
    t_starts: Tensor
    t_ends: Tensor
    offsets: Tensor
    num_rays: int

    def __len__(self) -> int:
        return self.ray_indices.shape[0]

    @property
    def midpoints(self) -> Tensor:
        """(M,), distance of the midpoint of each interval."""
        return 0.5 * (self.t_starts + self.t_ends)

    @property
    def lengths(self) -> Tensor:
        """(M,), length of each interval."""
        return self.t_ends - self.t_starts

    def positions(self, origins: Tensor, directions: Tensor) -> Tensor:
        """(M, 3), midpoints in space; ``origins`` and ``directions`` (R, 3) are those of the marched rays."""
        middle = self.midpoints[:, None]
        return origins[self.ray_indices] + directions[self.ray_indices] * middle

    def select(self, keep: Tensor) -> RaySamples:
        """Subset of the intervals given by ``keep`` (M,) bool; the number of rays does not change."""
        kept_before = torch.nn.functional.pad(keep.cumsum(0), (1, 0))
        return RaySamples(
            self.ray_indices[keep], self.t_starts[keep], self.t_ends[keep], kept_before[self.offsets], self.num_rays
        )


@torch.no_grad()
def march_rays(
    origins: Tensor,
    directions: Tensor,
    *,
    radius: float,
    step_size: float,
    occupancy: Tensor | None = None,
    jitter: Tensor | None = None,
    backend: str = "auto",
) -> RaySamples:
    """Sample rays in the occupied part of the ball of ``radius`` around the origin.

    Args:
        origins: (R, 3), scene units.
        directions: (R, 3), unit length.
        radius: Radius of the ball, scene units.
        step_size: Length of the intervals, scene units.
        occupancy: (G, G, G) bool over [-radius, radius]^3, indexed [x, y, z]; None means occupied everywhere.
        jitter: (R,) in [0, 1), shift of all intervals of a ray as a fraction of a step; None means no shift.
        backend: auto, torch, native (CPU), triton or nerfacc (CUDA). All give the same intervals (nerfacc: up to
            rounding).

    Returns:
        The intervals; not differentiable.

    Raises:
        ValueError: A shape or size is invalid, or the backend is not usable.
    """
    _check(origins, directions, radius, step_size, occupancy, jitter)
    if jitter is None:
        jitter = origins.new_zeros(origins.shape[0])
    name = backends.choose("ray marching", backend, origins.device, BACKENDS, origins.dtype)
    origins, directions, jitter = origins.contiguous(), directions.contiguous(), jitter.contiguous()
    occupancy = None if occupancy is None else occupancy.contiguous()
    t_near, t_far = ball_intersection(origins, directions, radius)
    march = {"torch": _march_torch, "native": _march_native, "triton": _march_triton, "nerfacc": _march_nerfacc}[name]
    rays = _ClippedRays(origins, directions, t_near.contiguous(), t_far.contiguous(), jitter)
    return march(rays, float(radius), float(step_size), occupancy)


def ball_intersection(origins: Tensor, directions: Tensor, radius: float) -> tuple[Tensor, Tensor]:
    """Distances (R,) >= 0 at which rays enter and leave the ball; equal if a ray misses it."""
    ox, oy, oz = origins.unbind(1)
    dx, dy, dz = directions.unbind(1)
    closest = -(ox * dx + oy * dy + oz * dz)
    # Measured from the point of the ray that is closest to the center. This is accurate even for distant cameras, for
    # which the usual discriminant is the difference of two large squares.
    px, py, pz = ox + closest * dx, oy + closest * dy, oz + closest * dz
    squared = radius * radius - (px * px + py * py + pz * pz)
    half_chord = squared.clamp(min=0).sqrt()
    t_far = (closest + half_chord).clamp(min=0)
    return torch.minimum((closest - half_chord).clamp(min=0), t_far), t_far


def max_intervals(radius: float, step_size: float) -> int:
    """Upper bound on the number of intervals of a ray in the ball."""
    return math.ceil(2 * radius / step_size) + 1


def _check(
    origins: Tensor,
    directions: Tensor,
    radius: float,
    step_size: float,
    occupancy: Tensor | None,
    jitter: Tensor | None,
) -> None:
    if origins.ndim != 2 or origins.shape[1] != 3 or origins.shape != directions.shape:
        shapes = f"{tuple(origins.shape)} and {tuple(directions.shape)}"
        raise ValueError(f"ray marching: origins and directions must both be (R, 3), got {shapes}")
    if not radius > 0 or not step_size > 0:
        raise ValueError(f"ray marching: radius and step_size must be positive, got {radius} and {step_size}")
    if max_intervals(radius, step_size) > 2**20:
        raise ValueError(
            f"ray marching: step_size {step_size} is too small: a ray through the ball of radius {radius} can have "
            "more than 2^20 intervals"
        )
    if occupancy is not None and (
        occupancy.dtype != torch.bool or occupancy.ndim != 3 or len(set(occupancy.shape)) != 1
    ):
        found = f"{occupancy.dtype} {tuple(occupancy.shape)}"
        raise ValueError(f"ray marching: occupancy must be a bool tensor (G, G, G), got {found}")
    if jitter is not None and jitter.shape != origins.shape[:1]:
        raise ValueError(f"ray marching: jitter must be ({origins.shape[0]},), got {tuple(jitter.shape)}")


@dataclass(frozen=True)
class _ClippedRays:
    """Checked, contiguous rays and the distances at which they enter and leave the ball."""

    origins: Tensor
    directions: Tensor
    t_near: Tensor
    t_far: Tensor
    jitter: Tensor

    def __len__(self) -> int:
        return self.origins.shape[0]


def _march_torch(rays: _ClippedRays, radius: float, step_size: float, occupancy: Tensor | None) -> RaySamples:
    origins = rays.origins
    steps = torch.arange(max_intervals(radius, step_size), device=origins.device, dtype=origins.dtype)
    chunk = max(1, _CHUNK.get(origins.device.type, 2**22) // len(steps))
    indices, starts = [], []
    for first in range(0, len(rays), chunk):
        part = slice(first, first + chunk)
        t = rays.t_near[part, None] + (steps + rays.jitter[part, None]) * step_size  # (chunk, K)
        middle = t + 0.5 * step_size
        keep = middle < rays.t_far[part, None]
        if occupancy is not None:
            keep &= _occupied(origins[part], rays.directions[part], middle, radius, occupancy)
        indices.append(keep.nonzero(as_tuple=True)[0] + first)
        starts.append(t[keep])
    ray_indices = torch.cat(indices) if indices else origins.new_zeros(0, dtype=torch.int64)
    t_starts = torch.cat(starts) if starts else origins.new_zeros(0)
    offsets = torch.searchsorted(ray_indices, torch.arange(len(rays) + 1, device=origins.device))
    return RaySamples(ray_indices, t_starts, t_starts + step_size, offsets, len(rays))


def _occupied(origins: Tensor, directions: Tensor, middle: Tensor, radius: float, occupancy: Tensor) -> Tensor:
    """Whether the points at distances ``middle`` (R, K) are in occupied cells."""
    resolution = occupancy.shape[0]
    cells_per_unit = resolution / (2 * radius)
    index = torch.zeros((), dtype=torch.int32, device=middle.device)
    for axis in range(3):
        position = origins[:, axis, None] + directions[:, axis, None] * middle
        cell = ((position + radius) * cells_per_unit).clamp(0, resolution - 1).int()
        index = index * resolution + cell
    return occupancy.flatten()[index]


def _march_native(rays: _ClippedRays, radius: float, step_size: float, occupancy: Tensor | None) -> RaySamples:
    num_rays = len(rays)
    resolution = 1 if occupancy is None else occupancy.shape[0]
    geometry = (step_size, radius, resolution / (2 * radius))
    limits = (occupancy, resolution, max_intervals(radius, step_size))
    inputs = (rays.origins, rays.directions, rays.t_near, rays.t_far, rays.jitter, *geometry, *limits)
    offsets = torch.empty(num_rays + 1, dtype=torch.int64)
    native.call("sd3d_march_count", *inputs, offsets, num_rays)
    total = int(offsets[-1])
    ray_indices = torch.empty(total, dtype=torch.int64)
    t_starts, t_ends = torch.empty(total), torch.empty(total)
    native.call("sd3d_march_fill", *inputs, offsets, ray_indices, t_starts, t_ends, num_rays)
    return RaySamples(ray_indices, t_starts, t_ends, offsets, num_rays)


def _march_triton(rays: _ClippedRays, radius: float, step_size: float, occupancy: Tensor | None) -> RaySamples:
    from scoredist3d.ops.volume_rendering import triton_backend

    limit = max_intervals(radius, step_size)
    inputs = (rays.origins, rays.directions, rays.t_near, rays.t_far, rays.jitter)
    ray_indices, t_starts, t_ends, offsets = triton_backend.march(*inputs, radius, step_size, occupancy, limit)
    return RaySamples(ray_indices, t_starts, t_ends, offsets, len(rays))


def _march_nerfacc(rays: _ClippedRays, radius: float, step_size: float, occupancy: Tensor | None) -> RaySamples:
    from nerfacc.grid import traverse_grids

    device = rays.origins.device
    binaries = torch.ones(1, 1, 1, dtype=torch.bool, device=device) if occupancy is None else occupancy
    aabb = torch.tensor([[-radius] * 3 + [radius] * 3], device=device)
    near = rays.t_near + rays.jitter * step_size
    planes = {"near_planes": near, "far_planes": torch.maximum(rays.t_far, near)}
    cells = binaries[None]
    intervals, samples, _ = traverse_grids(rays.origins, rays.directions, cells, aabb, step_size=step_size, **planes)
    t_starts, t_ends = intervals.vals[intervals.is_left], intervals.vals[intervals.is_right]
    ray_indices = samples.ray_indices.long()
    offsets = torch.searchsorted(ray_indices, torch.arange(len(rays) + 1, device=device))
    return RaySamples(ray_indices, t_starts, t_ends, offsets, len(rays))

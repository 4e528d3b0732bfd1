"""Placement of samples along rays: coarse bins, importance resampling, and the loss of a proposal field."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from scoredist3d.ops.volume_rendering.compositing import accumulate
from scoredist3d.ops.volume_rendering.ray_marching import RaySamples, ball_intersection


@dataclass(frozen=True)
class RayBatch:
    """R rays of a batch of images, flattened.

    Attributes:
        origins: (R, 3), world.
        directions: (R, 3), unit.
        images: (R,) int64, index of the image of each ray.
        jitter: (R,) in [0, 1), shift of the samples as a fraction of a step; None for no shift.
    """

    origins: Tensor
    directions: Tensor
    images: Tensor
    jitter: Tensor | None = None

    def __len__(self) -> int:
        return len(self.origins)

    def __getitem__(self, part: slice) -> RayBatch:
        """The rays of a slice."""
        jitter = None if self.jitter is None else self.jitter[part]
        return RayBatch(self.origins[part], self.directions[part], self.images[part], jitter)


@dataclass(frozen=True)
class Bins:
    """K intervals of equal length on each of the H rays that hit the ball, from its entry to its exit.

    Attributes:
        rays: (H,) int64, indices of the rays that hit the ball.
        near: (H, 1), distance at which each ray enters the ball, scene units.
        width: (H, 1), length of the intervals of each ray, scene units.
        count: K.
        num_rays: R, including the rays that miss the ball.
    """

    rays: Tensor
    near: Tensor
    width: Tensor
    count: int
    num_rays: int

    def points(self, rays: RayBatch) -> Tensor:
        """(H * K, 3), one point per interval: its midpoint, or the position given by the ray's jitter."""
        shift = 0.5 if rays.jitter is None else rays.jitter[self.rays, None]
        index = torch.arange(self.count, device=self.near.device)
        distance = self.near + (index + shift) * self.width
        origins, directions = rays.origins[self.rays, None], rays.directions[self.rays, None]
        return (origins + directions * distance[..., None]).reshape(-1, 3)

    def weights(self, extinction: Tensor) -> Tensor:
        """(H, K) emission-absorption weights for (H * K,) extinctions."""
        depth = extinction.view(-1, self.count) * self.width
        before = depth.cumsum(-1) - depth
        return torch.exp(-before) * -torch.expm1(-depth)


@torch.no_grad()
def uniform_bins(rays: RayBatch, radius: float, count: int) -> Bins:
    """``count`` intervals of equal length on each ray, inside the ball of ``radius`` around the origin."""
    near, far = ball_intersection(rays.origins, rays.directions, radius)
    hit = (far - near > 1e-6 * radius).nonzero()[:, 0]
    near, far = near[hit, None], far[hit, None]
    return Bins(hit, near, (far - near) / count, count, len(rays))


@torch.no_grad()
def resample(bins: Bins, weights: Tensor, count: int, *, jitter: Tensor | None, padding: float) -> RaySamples:
    """``count`` intervals per ray, which together cover its bins and have equal weight.

    The interval boundaries are quantiles of the weights, by inverse transform sampling (NeRF, arXiv 2003.08934,
    section 5.2). Each weight comes from a single point of its bin, so the weights are first blurred over neighboring
    bins (mip-NeRF, arXiv 2103.13415, equation 18), and ``padding`` is spread evenly over all bins.

    Args:
        bins: The coarse intervals.
        weights: (H, K), non-negative weights of the bins.
        count: N, intervals per ray that hits the ball.
        jitter: (R,) in [0, 1). Inner boundaries shift by (jitter - 0.5) / N in cumulative weight; None for no shift.
        padding: Total weight to spread evenly, relative to weights that sum to 1.
    """
    wide = torch.cat([weights[:, :1], weights, weights[:, -1:]], dim=-1)
    larger = torch.maximum(wide[:, :-1], wide[:, 1:])
    mass = 0.5 * (larger[:, :-1] + larger[:, 1:]) + padding / bins.count
    inner = torch.arange(1, count, device=mass.device, dtype=mass.dtype).expand(len(mass), -1)
    if jitter is not None:
        inner = inner + (jitter[bins.rays, None] - 0.5)
    edges = bins.near + quantiles(mass, inner / count) * bins.width
    edges = torch.cat([bins.near, edges, bins.near + bins.count * bins.width], dim=-1).cummax(dim=-1).values
    held = torch.zeros(bins.num_rays + 1, dtype=torch.int64, device=mass.device)
    held[bins.rays + 1] = count
    return RaySamples(
        ray_indices=bins.rays.repeat_interleave(count),
        t_starts=edges[:, :-1].reshape(-1),
        t_ends=edges[:, 1:].reshape(-1),
        offsets=held.cumsum(0),
        num_rays=bins.num_rays,
    )


def quantiles(mass: Tensor, levels: Tensor) -> Tensor:
    """Quantiles of a piecewise constant distribution over K bins per row.

    Args:
        mass: (H, K), non-negative mass of each bin; a row of zeros stands for a uniform distribution.
        levels: (H, N) in [0, 1], cumulative probabilities.

    Returns:
        (H, N) positions in [0, K], in units of bins.
    """
    total = mass.sum(-1, keepdim=True)
    share = torch.where(total > 0, mass / total.clamp_min(1e-30), 1.0 / mass.shape[-1])
    below = torch.nn.functional.pad(share.cumsum(-1), (1, 0))
    index = (torch.searchsorted(below, levels.contiguous(), right=True) - 1).clamp(0, mass.shape[-1] - 1)
    within = (levels - below.gather(-1, index)) / share.gather(-1, index).clamp_min(1e-30)
    return index + within.clamp(0.0, 1.0)


def interlevel(bins: Bins, proposed: Tensor, samples: RaySamples, weights: Tensor) -> Tensor:
    """Proposal loss (R, 1): sum_i max(0, w_i - bound_i)^2 / w_i (mip-NeRF 360, arXiv 2111.12077, equation 13).

    bound_i is the total proposed weight of the bins that overlap sample i, an upper bound on w_i for a consistent
    proposal. The weights w are detached, so the loss trains only the proposal.

    Args:
        bins: The bins of the proposal.
        proposed: (H, K), weights of the bins.
        samples: M intervals on the rays of the bins.
        weights: (M,), weights of the samples.
    """
    weights = weights.detach()
    row = torch.zeros(bins.num_rays, dtype=torch.int64, device=weights.device)
    row[bins.rays] = torch.arange(len(bins.rays), device=weights.device)
    rows = row[samples.ray_indices]
    near, width = bins.near[rows, 0], bins.width[rows, 0]
    # A tolerance of a thousandth of a bin, so that rounding at a shared boundary does not add a bin to the bound.
    first = ((samples.t_starts - near) / width + 1e-3).floor().long().clamp(0, bins.count - 1)
    last = ((samples.t_ends - near) / width - 1e-3).ceil().long().clamp(1, bins.count)
    below = torch.nn.functional.pad(proposed.cumsum(-1), (1, 0))
    bound = below[rows, torch.maximum(last, first + 1)] - below[rows, first]
    excess = (weights - bound).clamp_min(0.0).square() / weights.clamp_min(1e-7)
    return accumulate(torch.ones_like(excess), excess[:, None], samples, backend="torch")

"""Gaussians as a field in space: what their surface is found in, and what paints it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from scoredist3d.geometry.base import GaussianSet
from scoredist3d.ops.rotations import rotation_matrices

_REACH = 3.0  # deviations; exp(-9 / 2) = 0.011 is left out beyond
_MAX_OPACITY = 0.999  # as in splatting: what is fully opaque has no finite extinction
_MAX_LEVEL = 7
_CELLS_ACROSS = 6  # of the level that a Gaussian's box is listed in
_PAIRS_PER_PASS = 1 << 20


@dataclass(frozen=True)
class _Level:
    """Gaussians of about one size, listed in the cells of a grid over the ball's cube.

    Attributes:
        cells: Per axis.
        members: (P,) Gaussians, cell by cell.
        offsets: (cells^3 + 1,), where each cell's members begin.
    """

    cells: int
    members: Tensor
    offsets: Tensor


class GaussianField:
    """sigma(x) = sum_i k_i exp(-d_i(x)^2 / 2), k_i = -ln(1 - o_i) / (sqrt(2 pi) s_i), within 3 deviations of each.

    d_i is the Mahalanobis distance, o_i the opacity and s_i the smallest deviation: a ray through the centre along that
    axis is dimmed by o_i, as when the Gaussian is splatted. Deviations are at least ``smallest`` (added in squares), so
    that flat Gaussians do not fall between the samples of a grid.
    """

    def __init__(self, gaussians: GaussianSet, radius: float, smallest: float) -> None:
        """Args:
        gaussians: Not differentiated.
        radius: Of the ball; the field is zero outside.
        smallest: Scene units.
        """
        with torch.no_grad():
            self.radius = radius
            self.features = gaussians.features.detach()
            self.means = gaussians.means.detach()
            scales = torch.hypot(gaussians.scales.detach(), torch.as_tensor(smallest).to(self.means))
            axes = rotation_matrices(gaussians.quaternions.detach())
            opacities = gaussians.opacities.detach().clamp_max(_MAX_OPACITY)
            strength = -torch.log1p(-opacities) / (math.sqrt(2 * math.pi) * scales.amin(dim=-1))
            whiten = axes.transpose(1, 2) / scales[:, :, None]
            # Side by side, since a query gathers all of them millions of times.
            self._packed = torch.cat([whiten.flatten(1), self.means, strength[:, None]], dim=-1)
            half = _REACH * (axes * scales[:, None]).norm(dim=-1)
            self._levels = list(self._listed(half))

    @torch.no_grad()
    def density(self, points: Tensor) -> Tensor:
        """(M,) extinction per scene unit at (M, 3)."""
        total = points.new_zeros(len(points))
        for index, _, weights in self._pairs(points):
            total.index_add_(0, index, weights)
        return total

    @torch.no_grad()
    def features_at(self, points: Tensor) -> Tensor:
        """(M, F) at (M, 3): the mean of the Gaussians there, weighted with their extinctions; the nearest elsewhere."""
        total = points.new_zeros(len(points))
        mixed = points.new_zeros(len(points), self.features.shape[1])
        for index, member, weights in self._pairs(points):
            total.index_add_(0, index, weights)
            mixed.index_add_(0, index, weights[:, None] * self.features[member])
        alone = total <= 0
        mixed = mixed / torch.where(alone, 1.0, total)[:, None]
        if bool(alone.any()):
            mixed[alone] = self.features[self._nearest(points[alone])]
        return mixed

    def _nearest(self, points: Tensor) -> Tensor:
        from scipy.spatial import cKDTree

        _, index = cKDTree(self.means.cpu().numpy()).query(points.cpu().numpy())
        return torch.from_numpy(index).to(points.device)

    def _listed(self, half: Tensor) -> Iterator[_Level]:
        """The levels that have members; ``half`` (N, 3) is half of each Gaussian's box."""
        widest = 2 * half.amax(dim=-1)
        depth = torch.log2(2 * self.radius * _CELLS_ACROSS / widest).floor().clamp(0, _MAX_LEVEL).long()
        inside = (self.means.abs() - half < self.radius).all(dim=-1)
        for level in depth.unique().tolist():
            chosen = torch.nonzero((depth == level) & inside)[:, 0]
            cells = 2**level
            low = self._cell(self.means[chosen] - half[chosen], cells)
            extent = self._cell(self.means[chosen] + half[chosen], cells) - low + 1
            owner, local = _expand(extent.prod(dim=-1))
            across, down = extent[owner, 2], extent[owner, 1]
            offset = torch.stack([local // (across * down), local // across % down, local % across], dim=-1)
            cell = _flat(low[owner] + offset, cells)
            order = cell.argsort(stable=True)
            counts = torch.bincount(cell, minlength=cells**3)
            yield _Level(cells, chosen[owner][order], _offsets(counts))

    def _cell(self, points: Tensor, cells: int) -> Tensor:
        """(M, 3) integer coordinates; points outside go to the nearest cell."""
        return ((points + self.radius) * (0.5 * cells / self.radius)).floor().long().clamp(0, cells - 1)

    def _pairs(self, points: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Points (P,), Gaussians (P,) near them and the extinctions (P,) of these there."""
        inside = torch.nonzero(points.norm(dim=-1) <= self.radius)[:, 0]
        for level in self._levels:
            cell = _flat(self._cell(points[inside], level.cells), level.cells)
            counts = level.offsets[cell + 1] - level.offsets[cell]
            ends = _offsets(counts)
            begin = 0
            while begin < len(inside):
                limit = int(ends[begin]) + _PAIRS_PER_PASS
                stop = max(begin + 1, int(torch.searchsorted(ends, limit, right=True)) - 1)
                owner, local = _expand(counts[begin:stop])
                index = inside[begin:stop][owner]
                member = level.members[level.offsets[cell[begin:stop]][owner] + local]
                yield index, member, self._extinction(points.index_select(0, index), member)
                begin = stop

    def _extinction(self, points: Tensor, member: Tensor) -> Tensor:
        whiten, means, strength = self._packed.index_select(0, member).split([9, 3, 1], dim=-1)
        away = torch.einsum("pij,pj->pi", whiten.unflatten(-1, (3, 3)), points - means)
        square = away.square().sum(dim=-1)
        return torch.where(square <= _REACH**2, strength[:, 0] * (-0.5 * square).exp(), 0.0)


def _flat(cell: Tensor, cells: int) -> Tensor:
    return (cell[:, 0] * cells + cell[:, 1]) * cells + cell[:, 2]


def _offsets(counts: Tensor) -> Tensor:
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0))


def _expand(counts: Tensor) -> tuple[Tensor, Tensor]:
    """For each owner i, ``counts[i]`` entries: their owner and their number among that owner's."""
    owner = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)
    return owner, torch.arange(len(owner), device=counts.device) - _offsets(counts)[:-1][owner]

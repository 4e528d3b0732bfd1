"""Distances to the surface of 3D Gaussians, and their features at arbitrary points, for export and conversion."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from scoredist3d.geometry.base import GaussianSet
from scoredist3d.geometry.gaussians.depths import gaussian_distances
from scoredist3d.geometry.trilinear import trilinear
from scoredist3d.ops.rotations import rotation_matrices

_REACH = 3.0  # standard deviations; the weight is cut off where it falls below exp(-9 / 2) = 0.011 of its peak
_MAX_OPACITY = 0.999  # as in splatting; an opacity of 1 has no finite extinction
_MAX_LEVEL = 7
_CELLS_ACROSS = 6  # maximum extent of a Gaussian's bounding box, in cells of its level
_PAIRS_PER_PASS = 1 << 20


@dataclass(frozen=True)
class _Level:
    """A regular grid over the cube around the ball, with a list of Gaussians of similar size near each cell.

    Attributes:
        cells: Number of cells per axis.
        members: (P,) indices of Gaussians, ordered by cell.
        offsets: (cells^3 + 1,), position of each cell's first entry in ``members``.
    """

    cells: int
    members: Tensor
    offsets: Tensor


class GaussianField:
    """Gaussians as a field: distances to their surface, and features.

    The distances are fused from depths in views all around (:mod:`scoredist3d.meshes.tsdf_fusion`). The features are
    means over the Gaussians within 3 standard deviations, weighted by their extinction k_i exp(-d_i(x)^2 / 2) with
    k_i = -ln(1 - o_i) / (sqrt(2 pi) s_i). d_i is the Mahalanobis distance to Gaussian i, o_i its opacity and s_i its
    smallest standard deviation. A ray through the center along the shortest axis therefore has the opacity o_i, as in
    splatting. The Gaussians are blurred with the standard deviation ``smallest``, so that flat ones have weight on both
    sides of the surface.
    """

    def __init__(self, gaussians: GaussianSet, radius: float, smallest: float, resolution: int) -> None:
        """Args:
        gaussians: Treated as constants; the field has no gradients.
        radius: Radius of the ball, scene units.
        smallest: Standard deviation of the blur, scene units.
        resolution: Number of points of the grid of distances along each axis.
        """
        with torch.no_grad():
            self.radius = radius
            self.resolution = resolution
            self._gaussians = gaussians
            self.features = gaussians.features.detach()
            self.means = gaussians.means.detach()
            scales = torch.hypot(gaussians.scales.detach(), torch.as_tensor(smallest).to(self.means))
            axes = rotation_matrices(gaussians.quaternions.detach())
            opacities = gaussians.opacities.detach().clamp_max(_MAX_OPACITY)
            strength = -torch.log1p(-opacities) / (math.sqrt(2 * math.pi) * scales.amin(dim=-1))
            whiten = axes.transpose(1, 2) / scales[:, :, None]
            # In one tensor, because each query gathers all of these values.
            self._packed = torch.cat([whiten.flatten(1), self.means, strength[:, None]], dim=-1)
            half = _REACH * (axes * scales[:, None]).norm(dim=-1)
            self._levels = list(self._listed(half))

    @cached_property
    def distances(self) -> Tensor:
        """(G, G, G) truncated signed distances to the surface, negative inside, for :func:`trilinear`; scene units.

        Raises:
            ValueError: The Gaussians are too transparent to have a surface.
        """
        return gaussian_distances(self._gaussians, self.radius, self.resolution)

    def distance(self, points: Tensor) -> Tensor:
        """(M,) signed distances to the surface at (M, 3) points, at most 0.1 radii in absolute value."""
        return trilinear(self.distances, points, self.radius)

    @torch.no_grad()
    def features_at(self, points: Tensor) -> Tensor:
        """(M, F) mean features at (M, 3) points, weighted by extinction.

        Where the extinction is 0, they are those of the nearest Gaussian.
        """
        total = points.new_zeros(len(points))
        mixed = points.new_zeros(len(points), self.features.shape[1])
        for index, member, weights in self._pairs(points):
            total.index_add_(0, index, weights)
            mixed.index_add_(0, index, weights[:, None] * self.features[member])
        empty = total <= 0
        mixed = mixed / torch.where(empty, 1.0, total)[:, None]
        if bool(empty.any()):
            mixed[empty] = self.features[self._nearest(points[empty])]
        return mixed

    def _nearest(self, points: Tensor) -> Tensor:
        """(M,) indices of the means that are nearest to (M, 3) points."""
        from scipy.spatial import cKDTree

        _, index = cKDTree(self.means.cpu().numpy()).query(points.cpu().numpy())
        return torch.from_numpy(index).to(points.device)

    def _listed(self, half: Tensor) -> Iterator[_Level]:
        """The levels with at least one Gaussian; ``half`` (N, 3) is half the size of each Gaussian's bounding box."""
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
        """(M, 3) integer coordinates of the cells of (M, 3) points; points outside the cube are clamped to it."""
        return ((points + self.radius) * (0.5 * cells / self.radius)).floor().long().clamp(0, cells - 1)

    def _pairs(self, points: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Pairs of points and nearby Gaussians, in chunks: (P,) indices of both, and (P,) extinctions at the points."""
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
        """(P,) extinction of Gaussian ``member[p]`` at point p."""
        whiten, means, strength = self._packed.index_select(0, member).split([9, 3, 1], dim=-1)
        away = torch.einsum("pij,pj->pi", whiten.unflatten(-1, (3, 3)), points - means)
        square = away.square().sum(dim=-1)
        return torch.where(square <= _REACH**2, strength[:, 0] * (-0.5 * square).exp(), 0.0)


def _flat(cell: Tensor, cells: int) -> Tensor:
    """(M,) flat indices of cells with (M, 3) integer coordinates."""
    return (cell[:, 0] * cells + cell[:, 1]) * cells + cell[:, 2]


def _offsets(counts: Tensor) -> Tensor:
    """(M + 1,) start of each of M consecutive runs with the given lengths, and the end of the last."""
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0))


def _expand(counts: Tensor) -> tuple[Tensor, Tensor]:
    """``counts[i]`` entries for each i: the index i of each entry, and its position within the run of i."""
    owner = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)
    return owner, torch.arange(len(owner), device=counts.device) - _offsets(counts)[:-1][owner]

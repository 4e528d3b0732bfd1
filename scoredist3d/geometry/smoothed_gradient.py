"""Sobolev gradient of values on a regular lattice: gradients that are smoothed by a Gaussian filter."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_CUT = 4.0  # standard deviations; without it, products of denormal numbers take most of the time on a CPU


@dataclass(frozen=True)
class VertexLattice:
    """Points of a cubic lattice, or a part of them.

    Attributes:
        codes: (V,) int64, flat index (x * side + y) * side + z of each point.
        side: Lattice points along each axis.
    """

    codes: Tensor
    side: int

    @classmethod
    def of(cls, points: Tensor, spacing: float, half: float) -> VertexLattice:
        """Lattice of points (V, 3) in [-half, half]^3 whose coordinates are -half plus multiples of ``spacing``."""
        side = round(2.0 * half / spacing) + 1
        x, y, z = ((points + half) / spacing).round().long().unbind(-1)
        return cls((x * side + y) * side + z, side)

    def dense(self, values: Tensor, elsewhere: Tensor) -> Tensor:
        """Values (C, V) as grids (C, side, side, side), indexed [x, y, z], with ``elsewhere`` (C,) at other points."""
        grid = elsewhere[:, None].repeat(1, self.side**3)
        grid[:, self.codes] = values
        return grid.view(-1, self.side, self.side, self.side)

    def sparse(self, grid: Tensor) -> Tensor:
        """Values (C, V) of the points, from grids (C, side, side, side); the inverse of :meth:`dense`."""
        return grid.flatten(1)[:, self.codes]

    def filtered(self, values: Tensor, sigma: float) -> Tensor:
        """Values (V,) after a Gaussian filter with a standard deviation of ``sigma`` spacings; zero elsewhere."""
        side = self.side
        index = torch.arange(side, device=values.device, dtype=values.dtype)
        steps = (index[:, None] - index) / sigma
        weights = torch.exp(-0.5 * steps**2) / (sigma * math.sqrt(2.0 * math.pi))
        weights = weights * (steps.abs() < _CUT)
        dense = values.new_zeros(side**3).index_put((self.codes,), values).view(side, side, side)
        # One product of matrices along each axis takes a few milliseconds; a convolution takes a hundred on a CPU.
        dense = (dense @ weights).transpose(1, 2) @ weights
        dense = (weights @ dense.reshape(side, -1)).view(side, side, side).transpose(1, 2)
        return dense.reshape(-1)[self.codes]


def smooth_gradient(values: Tensor, lattice: VertexLattice, sigma: float) -> Tensor:
    """``values`` (V,), whose gradient is filtered by :meth:`VertexLattice.filtered` on its way back.

    The gradient of a loss on a surface is nonzero only at the lattice points next to the surface. After the filter it
    moves all points within a few spacings alike, so the surface moves through the lattice without losing the slope of
    its signed distances (a Sobolev gradient, as in Nicolet et al. 2021, "Large steps in inverse rendering").
    """
    return cast(Tensor, _SmoothGradient.apply(values, lattice, sigma)) if sigma > 0 else values


class _SmoothGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, lattice: VertexLattice, sigma: float) -> Tensor:
        ctx.lattice, ctx.sigma = lattice, sigma
        return values.view_as(values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.lattice.filtered(grad, ctx.sigma), None, None

"""Real spherical harmonics up to degree 3, with the order and signs of 3D Gaussian splatting (arXiv 2308.04079).

Degree l and order m have the index l^2 + l + m. The functions are orthonormal on the sphere and include the
Condon-Shortley phase, so that degree 1 is sqrt(3 / 4 pi) (-y, z, -x).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

MAX_DEGREE = 3
DC = math.sqrt(1.0 / (4.0 * math.pi))
"""Value of the constant function of degree 0."""


def num_coefficients(degree: int) -> int:
    """Number of functions of all degrees up to ``degree``."""
    return (degree + 1) ** 2


def harmonics(directions: Tensor, degree: int) -> Tensor:
    """Values (..., (degree + 1)^2) at unit directions (..., 3); differentiable.

    Raises:
        ValueError: ``degree`` is not in the range 0 to 3.
    """
    if not 0 <= degree <= MAX_DEGREE:
        raise ValueError(f"spherical harmonics: degree must be from 0 to {MAX_DEGREE}, got {degree}")
    x, y, z = directions.unbind(-1)
    values = [torch.full_like(x, DC)]
    if degree >= 1:
        first = _root(3, 4)
        values += [-first * y, first * z, -first * x]
    if degree >= 2:
        xx, yy, zz = x * x, y * y, z * z
        second = _root(15, 4)
        values += [
            second * x * y,
            -second * y * z,
            _root(5, 16) * (2 * zz - xx - yy),
            -second * x * z,
            0.5 * second * (xx - yy),
        ]
    if degree >= 3:
        outer, inner = _root(35, 32), _root(21, 32)
        values += [
            -outer * y * (3 * xx - yy),
            _root(105, 4) * x * y * z,
            -inner * y * (4 * zz - xx - yy),
            _root(7, 16) * z * (2 * zz - 3 * xx - 3 * yy),
            -inner * x * (4 * zz - xx - yy),
            0.5 * _root(105, 4) * z * (xx - yy),
            -outer * x * (xx - 3 * yy),
        ]
    return torch.stack(values, dim=-1)


def rotation_of(rotation: Tensor, degree: int) -> Tensor:
    """Matrix (K, K) float64, K = (degree + 1)^2, that maps coefficients of f to those of f rotated by ``rotation``.

    The rotated function g satisfies g(R d) = f(d). Both are polynomials of the same degree, so their values at
    sufficiently many directions determine the coefficients; the matrix is exact up to rounding.

    Args:
        rotation: (3, 3) rotation matrix.
        degree: From 0 to 3.
    """
    count = 64
    height = torch.linspace(-1 + 1 / count, 1 - 1 / count, count, dtype=torch.float64)
    angle = math.pi * (3 - math.sqrt(5)) * torch.arange(count, dtype=torch.float64)
    ring = (1 - height.square()).sqrt()
    directions = torch.stack([ring * angle.cos(), ring * angle.sin(), height], dim=-1)
    moved = directions @ rotation.double().cpu().T
    return torch.linalg.lstsq(harmonics(moved, degree), harmonics(directions, degree)).solution


def _root(numerator: float, denominator: float) -> float:
    return math.sqrt(numerator / (denominator * math.pi))

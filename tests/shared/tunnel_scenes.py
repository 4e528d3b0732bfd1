"""Surfaces with tunnels and handles of known size, extracted from signed distances."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from scoredist3d.meshes.isosurface_extraction import extract_surface, sample_grid
from scoredist3d.meshes.mesh import Mesh
from shared.export_fields import AnalyticField, Sdf, box, difference, sphere, union

WALL = 0.1
OUTER = 0.8
"""Radius of the outer side of the bowl."""


def rod(x: float, y: float, radius: float, half: float = 1.0, tilt: float = 0.0) -> Sdf:
    """A vertical cylinder through (x, y, 0), which leans by ``tilt`` in x per unit of height."""

    def sdf(p: Tensor) -> Tensor:
        across = torch.hypot(p[:, 0] - x - tilt * p[:, 2], p[:, 1] - y)
        return torch.maximum(across - radius, p[:, 2].abs() - half)

    return sdf


def ring(major: float, minor: float, center: tuple[float, float, float], axis: int) -> Sdf:
    """A torus around an axis, 0 to 2 for x to z."""
    others = [index for index in range(3) if index != axis]

    def sdf(p: Tensor) -> Tensor:
        q = p - p.new_tensor(center)
        return torch.hypot(torch.hypot(q[:, others[0]], q[:, others[1]]) - major, q[:, axis]) - minor

    return sdf


def without(first: Sdf, others: Iterable[Sdf]) -> Sdf:
    for other in others:
        first = difference(first, other)
    return first


def plate(*holes: tuple[float, float, float]) -> Sdf:
    """A plate of 1.2 x 1.2 x 0.2 with round holes: x, y and radius of each."""
    return without(box((0.6, 0.6, 0.1)), (rod(*hole) for hole in holes))


def bowl(*holes: Sdf) -> Sdf:
    """The lower half of a thick sphere around the origin."""
    shell = difference(sphere(OUTER), sphere(OUTER - WALL))
    return without(difference(shell, box((1.0, 1.0, 0.5), (0.0, 0.0, 0.5))), holes)


def frame(thickness: float) -> Sdf:
    """The edges of a cube as thin struts."""
    struts: list[Sdf] = []
    for axis in range(3):
        for one in (-0.5, 0.5):
            for other in (-0.5, 0.5):
                half, center = [0.5 + thickness] * 3, [0.0, 0.0, 0.0]
                for index, place in zip((i for i in range(3) if i != axis), (one, other), strict=True):
                    half[index], center[index] = thickness, place
                struts.append(box((half[0], half[1], half[2]), (center[0], center[1], center[2])))
    return union(*struts)


def surface(sdf: Callable[[Tensor], Tensor], resolution: int = 64) -> Mesh:
    """The surface of a signed distance in the unit ball, with ``resolution`` grid points along each side."""
    field = AnalyticField(sdf, softness=0.02)
    return extract_surface(field, sample_grid(field, resolution), 250.0, refine_steps=6)

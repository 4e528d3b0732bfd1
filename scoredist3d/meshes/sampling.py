"""Random points on triangle meshes, near them, and in balls."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from scoredist3d.meshes.mesh import Mesh


def mesh_points(mesh: Mesh, count: int, generator: np.random.Generator) -> np.ndarray:
    """(count, 3) points on a mesh, distributed uniformly by area, as a numpy array."""
    area = mesh.face_areas
    face = generator.choice(len(area), count, p=area / area.sum())
    weights = generator.dirichlet((1.0, 1.0, 1.0), count)
    points: np.ndarray = np.einsum("nk,nkc->nc", weights, mesh.vertices[mesh.faces[face]])
    return points


def stratified_mesh_points(mesh: Mesh, count: int, generator: np.random.Generator) -> np.ndarray:
    """(count, 3) points on a mesh, one in each of ``count`` strata of equal area: more even than independent points."""
    areas = mesh.face_areas
    face = np.searchsorted(np.cumsum(areas), (np.arange(count) + 0.5) / count * areas.sum()).clip(0, len(areas) - 1)
    a, b = generator.random((2, count))
    outside = a + b > 1  # reflected into the triangle
    a, b = np.where(outside, 1 - a, a)[:, None], np.where(outside, 1 - b, b)[:, None]
    first, second, third = (mesh.vertices[mesh.faces[face, k]] for k in range(3))
    points: np.ndarray = first + a * (second - first) + b * (third - first)
    return points


def surface_sampler(mesh: Mesh, like: Tensor) -> Callable[[torch.Generator, int], tuple[Tensor, Tensor]]:
    """Sampler of points on a mesh, uniform by area, and the outward unit normals of their faces, (N, 3) each.

    Args:
        mesh: Mesh in world coordinates.
        like: Tensor that sets the device and dtype of the points; the generator must be on that device.

    Raises:
        ValueError: The total area of the faces is zero.
    """
    triangles = torch.from_numpy(np.ascontiguousarray(mesh.vertices[mesh.faces])).to(like)
    cumulative = torch.from_numpy(mesh.face_areas.cumsum(dtype=np.float64)).to(like.device)
    if len(cumulative) == 0 or not float(cumulative[-1]) > 0:
        raise ValueError("the mesh has no area to sample points on: check that it has non-degenerate faces")

    def sample(generator: torch.Generator, count: int) -> tuple[Tensor, Tensor]:
        place = torch.rand(count, generator=generator, device=like.device, dtype=torch.float64)
        face = torch.searchsorted(cumulative, place * cumulative[-1], right=True)
        a, b, c = triangles[face.clamp_max(len(triangles) - 1)].unbind(1)
        root = torch.rand(count, 1, generator=generator, device=like.device).sqrt().to(like)
        along = torch.rand(count, 1, generator=generator, device=like.device).to(like)
        points = (1 - root) * a + root * ((1 - along) * b + along * c)
        return points, functional.normalize(torch.linalg.cross(b - a, c - a), dim=-1, eps=1e-30)

    return sample


def points_near(mesh: Mesh, spread: float, like: Tensor) -> Callable[[torch.Generator, int], Tensor]:
    """Sampler of points near a mesh: points on its surface (see :func:`surface_sampler`) plus Gaussian noise.

    Args:
        mesh: Mesh in world coordinates.
        spread: Standard deviation of the noise, scene units.
        like: As in :func:`surface_sampler`.
    """
    on_surface = surface_sampler(mesh, like)

    def sample(generator: torch.Generator, count: int) -> Tensor:
        points, _ = on_surface(generator, count)
        return points + spread * torch.randn(count, 3, generator=generator, device=like.device).to(like)

    return sample


def points_in_ball(generator: torch.Generator, count: int, radius: float) -> Tensor:
    """(count, 3) points, uniform in the ball of ``radius`` around the origin, on the generator's device."""
    device = generator.device
    direction = functional.normalize(torch.randn(count, 3, generator=generator, device=device), dim=-1)
    return radius * direction * torch.rand(count, 1, generator=generator, device=device) ** (1 / 3)

"""Analytic fields with known surfaces and colours."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from scoredist3d.meshes.exportable import SurfaceChannels

Sdf = Callable[[Tensor], Tensor]


class AnalyticField:
    """Density from a signed distance: a step of ``peak`` at 0, or a logistic of width ``softness``."""

    def __init__(
        self,
        sdf: Sdf,
        *,
        color: Callable[[Tensor], Tensor] | None = None,
        radius: float = 1.0,
        peak: float = 500.0,
        softness: float = 0.0,
    ) -> None:
        self.sdf, self.radius, self.peak, self.softness = sdf, radius, peak, softness
        self.device = torch.device("cpu")
        self.color = color or position_color
        self.iso_level = None
        self.baked_lighting = False

    def channels(self, points: Tensor, normals: Tensor | None = None) -> SurfaceChannels:
        return SurfaceChannels(self.color(points))

    def surface(self) -> None:
        return None

    def splats(self) -> None:
        return None

    def density(self, points: Tensor) -> Tensor:
        assert points.norm(dim=-1).max() <= self.radius * (1 + 1e-5), "queried outside the ball"
        distance = self.sdf(points)
        if self.softness:
            return self.peak * torch.sigmoid(-distance / self.softness)
        return self.peak * (distance < 0).float()


def position_color(points: Tensor) -> Tensor:
    """Smooth, different everywhere, not symmetric in any axis."""
    return 0.5 + 0.45 * torch.sin(3.0 * points + points.new_tensor([0.3, 1.1, 2.3]))


def sphere(radius: float, center: tuple[float, float, float] = (0.0, 0.0, 0.0)) -> Sdf:
    return lambda p: (p - p.new_tensor(center)).norm(dim=-1) - radius


def box(half: tuple[float, float, float], center: tuple[float, float, float] = (0.0, 0.0, 0.0)) -> Sdf:
    def sdf(p: Tensor) -> Tensor:
        q = (p - p.new_tensor(center)).abs() - p.new_tensor(half)
        return q.clamp_min(0).norm(dim=-1) + q.max(dim=-1).values.clamp_max(0)

    return sdf


def torus(major: float, minor: float) -> Sdf:
    return lambda p: torch.hypot(torch.hypot(p[:, 0], p[:, 1]) - major, p[:, 2]) - minor


def union(*parts: Sdf) -> Sdf:
    return lambda p: torch.stack([part(p) for part in parts]).min(dim=0).values


def difference(first: Sdf, second: Sdf) -> Sdf:
    return lambda p: torch.maximum(first(p), -second(p))


def sample_texture(texture: np.ndarray, uv: np.ndarray) -> np.ndarray:
    """(N, 3) bilinear samples, (0, 0) the bottom left corner, as a renderer takes them."""
    size = texture.shape[0]
    x = np.clip(uv[:, 0] * size - 0.5, 0, size - 1.001)
    y = np.clip((1 - uv[:, 1]) * size - 0.5, 0, size - 1.001)
    column, row = x.astype(int), y.astype(int)
    fx, fy = (x - column)[:, None], (y - row)[:, None]
    t = texture.astype(np.float64)
    top = t[row, column] * (1 - fx) + t[row, column + 1] * fx
    bottom = t[row + 1, column] * (1 - fx) + t[row + 1, column + 1] * fx
    return top * (1 - fy) + bottom * fy


def random_surface_points(
    vertices: np.ndarray, faces: np.ndarray, count: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Area-uniform points (N, 3), their faces (N,) and barycentric weights (N, 3)."""
    a, b, c = (vertices[faces[:, k]] for k in range(3))
    area = np.linalg.norm(np.cross(b - a, c - a), axis=1)
    face = rng.choice(len(faces), count, p=area / area.sum())
    weights = rng.dirichlet((1.0, 1.0, 1.0), count)
    return np.einsum("nk,nkc->nc", weights, vertices[faces[face]]), face, weights

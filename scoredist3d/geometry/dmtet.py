"""Deep marching tetrahedra (DMTet, arXiv 2111.04276)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from scoredist3d.geometry.base import SurfaceMesh
from scoredist3d.geometry.grid_surface import GridSurface
from scoredist3d.ops.isosurface.marching_tetrahedra import marching_tetrahedra
from scoredist3d.ops.isosurface.tetrahedra import TetrahedralGrid, tetrahedral_grid
from scoredist3d.registry import register


@register(
    "geometry",
    "dmtet",
    summary="A mesh from signed distances on a deformable tetrahedral grid.",
    arxiv="2111.04276",
)
class DMTet(GridSurface):
    """Marching tetrahedra over signed distances: the mesh's faces change with them, and so may its topology."""

    @dataclass
    class Config(GridSurface.Config):
        """No further options."""

    def grid_vertices(self) -> tuple[Tensor, float]:
        """Of the tetrahedra that reach into the ball."""
        grid = _grid(self.config.resolution, torch.device("cpu"))
        return self.radius * grid.vertices, self.radius * grid.spacing

    def grid_edges(self) -> Tensor:
        """Of the tetrahedra."""
        return _grid(self.config.resolution, self.device).edges

    def extract(self, positions: Tensor, sdf: Tensor) -> SurfaceMesh:
        """By marching tetrahedra."""
        return SurfaceMesh(*marching_tetrahedra(positions, sdf, _grid(self.config.resolution, positions.device)))


@lru_cache(maxsize=4)
def _grid(resolution: int, device: torch.device) -> TetrahedralGrid:
    return tetrahedral_grid(resolution, radius=1.0).to(device)

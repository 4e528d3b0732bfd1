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
    summary="Mesh extracted from signed distances on a deformable tetrahedral grid.",
    arxiv="2111.04276",
)
class DMTet(GridSurface):
    """A surface extracted by marching tetrahedra; its faces and topology can change during training."""

    @dataclass
    class Config(GridSurface.Config):
        """Options of DMTet, the same as for all grid surfaces."""

    def grid_vertices(self) -> tuple[Tensor, float]:
        """Vertices of the tetrahedra that intersect the ball, and their spacing."""
        grid = _grid(self.config.resolution, torch.device("cpu"))
        return self.radius * grid.vertices, self.radius * grid.spacing

    def grid_edges(self) -> Tensor:
        """(E, 2) int32, the edges of the tetrahedra."""
        return _grid(self.config.resolution, self.device).edges

    def extract(self, positions: Tensor, sdf: Tensor) -> SurfaceMesh:
        """The surface, extracted by marching tetrahedra."""
        return SurfaceMesh(*marching_tetrahedra(positions, sdf, _grid(self.config.resolution, positions.device)))


@lru_cache(maxsize=4)
def _grid(resolution: int, device: torch.device) -> TetrahedralGrid:
    """The tetrahedral grid of the unit ball."""
    return tetrahedral_grid(resolution, radius=1.0).to(device)

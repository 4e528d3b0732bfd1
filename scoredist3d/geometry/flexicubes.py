"""FlexiCubes (arXiv 2308.05371): dual marching cubes with learned weights."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from scoredist3d.geometry.base import SurfaceMesh
from scoredist3d.geometry.grid_surface import GridSurface
from scoredist3d.materials.base import Material
from scoredist3d.ops.isosurface.flexicubes import VoxelGrid, flexicubes, voxel_grid
from scoredist3d.registry import register
from scoredist3d.seeding import Rng


@register(
    "geometry",
    "flexicubes",
    summary="Mesh extracted from signed distances on a grid of cubes with learned weights.",
    arxiv="2308.05371",
)
class FlexiCubes(GridSurface):
    """A surface extracted by dual marching cubes with 21 learned weights per cube.

    The weights move the vertices inside their cubes. Sharp edges and well-shaped triangles can thus be learned. During
    training, each quad is split into four triangles, so that all weights receive gradients; in the exported mesh, it is
    split into two. The loss ``dual-deviation`` regularizes the weights.
    """

    @dataclass
    class Config(GridSurface.Config):
        """Options of FlexiCubes, the same as for all grid surfaces."""

    def __init__(self, config: Config, *, rng: Rng | None = None, material: Material | None = None) -> None:
        super().__init__(config, rng=rng, material=material)
        cubes = config.resolution**3
        self.weights = nn.Parameter(torch.zeros(cubes, 21), requires_grad=not config.fix_geometry)

    def grid_vertices(self) -> tuple[Tensor, float]:
        """Vertices of all cubes of the grid, and their spacing."""
        grid = _grid(self.config.resolution, torch.device("cpu"))
        return self.radius * grid.vertices, self.radius * grid.spacing

    def grid_edges(self) -> Tensor:
        """(E, 2) int32, the edges of the cubes."""
        return _edges(self.config.resolution, self.device)

    def extract(self, positions: Tensor, sdf: Tensor) -> SurfaceMesh:
        """The surface, extracted by weighted dual marching cubes."""
        grid = _grid(self.config.resolution, positions.device)
        mesh = flexicubes(positions, sdf, grid, self.weights, subdivide=torch.is_grad_enabled())
        return SurfaceMesh(mesh.vertices, mesh.faces, deviation=mesh.deviation)

    def shape_parameters(self) -> list[nn.Parameter]:
        """Parameters that determine the surface: signed distances, vertex offsets and weights."""
        return [*super().shape_parameters(), self.weights]

    def set_distances(self, sdf: Tensor) -> None:
        """Set the signed distances at the grid's vertices, and reset the vertex offsets and the weights."""
        super().set_distances(sdf)
        self.weights.zero_()

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The groups of :class:`GridSurface`, and ``weights``."""
        return [*super().parameter_groups(), {"name": "weights", "params": [self.weights]}]


@lru_cache(maxsize=4)
def _grid(resolution: int, device: torch.device) -> VoxelGrid:
    """The grid of cubes over [-1, 1]^3."""
    return voxel_grid(resolution).to(device)


@lru_cache(maxsize=4)
def _edges(resolution: int, device: torch.device) -> Tensor:
    """(E, 2) int32, pairs of neighboring vertices; vertex indices increase fastest along z."""
    ids = torch.arange((resolution + 1) ** 3, dtype=torch.int32, device=device).view([resolution + 1] * 3)
    pairs = [
        torch.stack([ids.narrow(axis, 0, resolution), ids.narrow(axis, 1, resolution)], dim=-1) for axis in range(3)
    ]
    return torch.cat([pair.view(-1, 2) for pair in pairs])

"""FlexiCubes (arXiv 2308.05371): dual surfaces with weights to learn."""

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
    summary="A mesh from signed distances on a grid of cubes with learnt weights.",
    arxiv="2308.05371",
)
class FlexiCubes(GridSurface):
    """Dual marching cubes whose vertices can move inside of their cubes: sharp edges and even triangles can be learnt.

    While training, quads are cut into four triangles, of which gradients flow into all weights; the exported mesh has
    two. There are 21 weights per cube, which the loss ``dual-deviation`` keeps in order.
    """

    @dataclass
    class Config(GridSurface.Config):
        """No further options."""

    def __init__(self, config: Config, *, rng: Rng | None = None, material: Material | None = None) -> None:
        super().__init__(config, rng=rng, material=material)
        cubes = config.resolution**3
        self.weights = nn.Parameter(torch.zeros(cubes, 21), requires_grad=not config.fix_geometry)

    def grid_vertices(self) -> tuple[Tensor, float]:
        """Of all cubes of the box."""
        grid = _grid(self.config.resolution, torch.device("cpu"))
        return self.radius * grid.vertices, self.radius * grid.spacing

    def grid_edges(self) -> Tensor:
        """Of the cubes."""
        return _edges(self.config.resolution, self.device)

    def extract(self, positions: Tensor, sdf: Tensor) -> SurfaceMesh:
        """By weighted dual marching cubes."""
        grid = _grid(self.config.resolution, positions.device)
        mesh = flexicubes(positions, sdf, grid, self.weights, subdivide=torch.is_grad_enabled())
        return SurfaceMesh(mesh.vertices, mesh.faces, deviation=mesh.deviation)

    def shape_parameters(self) -> list[nn.Parameter]:
        """The weights too."""
        return [*super().shape_parameters(), self.weights]

    def set_distances(self, sdf: Tensor) -> None:
        """With equal weights."""
        super().set_distances(sdf)
        self.weights.zero_()

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Also ``weights``."""
        return [*super().parameter_groups(), {"name": "weights", "params": [self.weights]}]


@lru_cache(maxsize=4)
def _grid(resolution: int, device: torch.device) -> VoxelGrid:
    return voxel_grid(resolution).to(device)


@lru_cache(maxsize=4)
def _edges(resolution: int, device: torch.device) -> Tensor:
    """(E, 2) pairs of neighbouring vertices, of which z changes fastest."""
    ids = torch.arange((resolution + 1) ** 3, dtype=torch.int32, device=device).view([resolution + 1] * 3)
    pairs = [
        torch.stack([ids.narrow(axis, 0, resolution), ids.narrow(axis, 1, resolution)], dim=-1) for axis in range(3)
    ]
    return torch.cat([pair.view(-1, 2) for pair in pairs])

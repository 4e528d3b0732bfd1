"""Objects with a cavity or thin parts, their exact depths, and depths that are wrong in a known way."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scoredist3d.cameras import Cameras, sphere_cameras
from scoredist3d.meshes.space_carving import DepthEstimates
from scoredist3d.procedural.surface_estimator import LEAST_ERROR
from shared.export_fields import Sdf, box, difference, union
from shared.surface_estimators import LEVEL, write_level_estimator

CELLS = 32
CELL = 2.0 / CELLS
DISTANCE = 3.2
ERROR = 0.25 * CELL
VIEWS = 24


def cylinder(radius: float, bottom: float, top: float) -> Sdf:
    """Exact distance of a cylinder around the z axis."""

    def sdf(p: Tensor) -> Tensor:
        across, along = torch.hypot(p[:, 0], p[:, 1]) - radius, (p[:, 2] - 0.5 * (top + bottom)).abs()
        q = torch.stack([across, along - 0.5 * (top - bottom)], dim=-1)
        return q.clamp_min(0).norm(dim=-1) + q.amax(dim=-1).clamp_max(0)

    return sdf


def _loop(p: Tensor) -> Tensor:
    """A vertical ring of 2 cells in diameter, whose center is on the side of the body."""
    return torch.hypot(torch.hypot(p[:, 0] - 0.6, p[:, 2]) - 0.25, p[:, 1]) - CELL


WALL, BOTTOM = 2 * CELL, 3 * CELL
BODY = cylinder(0.6, -0.5, 0.5)
HOLE = cylinder(0.6 - WALL, -0.5 + BOTTOM, 0.8)
HANDLE = difference(_loop, cylinder(0.6 - WALL, -1.0, 1.0))
SOLID = union(BODY, HANDLE)
"""A mug that is not hollow yet."""
MUG = union(difference(BODY, HOLE), HANDLE)
"""Its wall and its handle are 2 cells thick, its bottom 3."""

THIN: dict[str, Sdf] = {
    "plates": union(*(box((CELL, 0.5, 0.5), (x, 0.0, 0.1)) for x in (-0.45, 0.0, 0.45))),
    "rod in front of a plate": union(box((CELL, CELL, 0.6), (0.5, 0.1, 0.0)), box((CELL, 0.6, 0.6), (-0.3, 0.0, 0.0))),
    "cross": union(box((CELL, 0.6, 0.6)), box((0.6, CELL, 0.6)), box((0.6, 0.6, CELL))),
}
"""Parts that are 2 cells thick, through the gaps between which views see other parts."""


def lattice(cells: int = CELLS, half: float = 1.0) -> Tensor:
    """(N^3, 3) points of a lattice over [-half, half]^3, N = cells + 1."""
    axis = torch.linspace(-half, half, cells + 1)
    return torch.cartesian_prod(axis, axis, axis)


def camera_ring(count: int = VIEWS, size: int = 48) -> Cameras:
    """Cameras on all sides, few of them from below; a pixel is about as wide as three quarters of a cell."""
    cameras = sphere_cameras(5 * count // 3, distance=DISTANCE, fovy_deg=40.0, size=size)
    return cameras[:count]


def exact_views(sdf: Sdf, cameras: Cameras, *, error: float = ERROR, steps: int = 32) -> DepthEstimates:
    """Depths of an exact distance by sphere tracing; pixels that show no surface have opacity 0 and a small depth."""
    rays = cameras.rays()
    origins, directions = rays.origins.reshape(-1, 3), rays.directions.reshape(-1, 3)
    t = torch.full((len(origins),), DISTANCE - 1.2)
    for _ in range(steps):
        t += sdf(origins + t[:, None] * directions).clamp_max(0.5)
    hit = sdf(origins + t[:, None] * directions).abs() < 0.02 * CELL
    maps = (torch.where(hit, t, 0.1), torch.full_like(t, error), hit.float())
    return DepthEstimates(cameras, *(values.view(rays.cosines.shape) for values in maps))


@cache
def mug_views() -> DepthEstimates:
    """Exact depths of the mug from all around."""
    return exact_views(MUG, camera_ring())


def level_views(cameras: Cameras, shift: float = 0.0, *, error: float = ERROR) -> DepthEstimates:
    """All pixels show a surface whose distance from the camera is ``shift`` larger than that of the origin."""
    shape = (len(cameras), cameras.height, cameras.width)
    depth = (cameras.origins.norm(dim=-1) + shift)[:, None, None].expand(shape)
    return DepthEstimates(cameras, depth, torch.full(shape, error), torch.ones(shape))


def estimated_views(cameras: Cameras) -> DepthEstimates:
    """The depths of :func:`~shared.surface_estimators.write_level_estimator`."""
    return level_views(cameras, LEVEL, error=LEAST_ERROR)


def some(views: DepthEstimates, index: Tensor | slice) -> DepthEstimates:
    """Some of the views, by indices or a mask."""
    maps = (views.depth, views.error, views.opacity)
    return DepthEstimates(views.cameras[index], *(values[index] for values in maps))


def joined(*parts: DepthEstimates) -> DepthEstimates:
    """All views of several sets."""
    maps = (torch.cat([getattr(part, name) for part in parts]) for name in ("depth", "error", "opacity"))
    return DepthEstimates(Cameras.cat([part.cameras for part in parts]), *maps)


def scaled(views: DepthEstimates, factor: float) -> DepthEstimates:
    """The views of the scene that is larger by a factor."""
    cameras = views.cameras
    c2w = cameras.c2w.clone()
    c2w[:, :3, 3] *= factor
    cameras = replace(cameras, c2w=c2w, distance=factor * cameras.distance)
    return DepthEstimates(cameras, factor * views.depth, factor * views.error, views.opacity)


def carving_block(folder: Path, *, guidance: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    """A ``system`` block that carves a sphere before step 2 by the depths of :func:`write_level_estimator`."""
    method = {"type": "hifa", "update_every": 50, "latent_weight": 0, "denoise_steps": 1, "depth_weight": 1.0}
    method |= {"carve_steps": [2], "surface_estimator": write_level_estimator(folder), **(guidance or {})}
    grid = {"num_levels": 2, "log2_hashmap_size": 4}
    geometry = {"type": "flexicubes", "resolution": 16, "grid": grid, "shape_init_size": 0.7}
    block = {"type": "text-to-3d", "guidance": method, "geometry": geometry, "renderer": {"type": "mesh-rasterizer"}}
    return block | changes

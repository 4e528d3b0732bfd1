"""Extraction of the surface of a density field: grid sampling, threshold, marching cubes and refinement.

The surface is the zero level set of f(p) = min((d - s) / (d + s), (radius - |p|) / h), with density d, threshold s and
grid step h. The first term is bounded and, near d = s, linear in log d, which suits densities that span orders of
magnitude. The second term intersects the object with the ball, so the surface is closed at the ball's border.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from scoredist3d.meshes.exportable import Extractable, HasFusedSurface, Progress, query_density
from scoredist3d.meshes.mesh import Mesh

THRESHOLD_SETTING = "exporter.threshold"
_MAX_DEPTH_ERROR = 8  # grid cells
_NEVER = 1 << 30  # depth of a ray without a surface


@dataclass(frozen=True)
class DensityGrid:
    """Densities on a cubic grid around the ball, with one layer of padding.

    Attributes:
        values: (N, N, N) float32, indexed [x, y, z]; 0 outside the ball.
        radius: Radius of the ball, scene units.
        spacing: Grid step h, scene units.
        low, high: Smallest and largest density at the grid points inside the ball.
    """

    values: np.ndarray
    radius: float
    spacing: float
    low: float
    high: float

    @property
    def axis(self) -> np.ndarray:
        """Coordinates (N,) of the grid points along each axis."""
        return _axis(self.radius, self.spacing, self.values.shape[0])

    @property
    def opacity(self) -> float:
        """Largest opacity of all axis-parallel rays through the grid, in [0, 1]."""
        most = max(float(self.values.sum(axis=axis).max()) for axis in range(3))
        return 1.0 - math.exp(-self.spacing * most)


def sample_grid(
    shape: Extractable, resolution: int, *, chunk: int = 131072, progress: Progress | None = None
) -> DensityGrid:
    """Sample the density at the points of a ``resolution``^3 grid over [-radius, radius]^3 that lie inside the ball.

    Raises:
        ValueError: A density is not finite or is negative.
    """
    radius = float(shape.radius)
    spacing = 2.0 * radius / (resolution - 1)
    axis = _axis(radius, spacing, resolution + 2)
    square = axis.astype(np.float64) ** 2
    inside = (square[:, None, None] + square[None, :, None] + square[None, None, :]) <= radius**2 * (1 + 1e-9)
    index = np.nonzero(inside)
    points = np.stack([axis[i] for i in index], axis=1)
    densities = query_density(shape, points, chunk=chunk, progress=progress)
    low, high = float(densities.min()), float(densities.max())
    if low < 0:
        raise ValueError(f"the object's densities lie in [{low:.4g}, {high:.4g}], but a density must not be negative")
    values = np.zeros(inside.shape, dtype=np.float32)
    values[index] = densities
    return DensityGrid(values=values, radius=radius, spacing=spacing, low=low, high=high)


def automatic_threshold(grid: DensityGrid, levels: int = 48, *, setting: str = THRESHOLD_SETTING) -> float:
    """Density whose iso-surface is closest to the surface seen in volume rendering.

    Parallel rays enter the grid from its six sides. The rendered depth of a ray is where its opacity
    1 - exp(-sum density h) reaches half of the largest opacity of all rays; its depth on the iso-surface at level s is
    where the density first exceeds s. The candidates are log-spaced levels from ln 2 / (2 radius) (below it, not even a
    ray across the whole ball is half opaque) to the largest density. The level with the smallest mean difference
    between the two depths is chosen; the difference is capped at :data:`_MAX_DEPTH_ERROR` cells, and equals that cap
    if only one of the two depths exists. If several levels are equally good, the middle one is returned.

    Raises:
        ValueError: No ray reaches an opacity of 5 %, so the field is empty.
    """
    # About 64^2 rays per side give a sufficiently accurate mean.
    count = grid.values.shape[0]
    stride = max(1, count // 64)
    sides = [np.moveaxis(grid.values, axis, 2)[::stride, ::stride].reshape(-1, count) for axis in range(3)]
    opacity = 1.0 - math.exp(-grid.spacing * max(float(side.sum(axis=1).max()) for side in sides))
    if opacity < 0.05:
        raise ValueError(
            f"no surface: densities lie in [{grid.low:.4g}, {grid.high:.4g}] and no ray through the field "
            f"is more than {100 * opacity:.2g} % opaque; train longer, or set {setting} to a number "
            "in that range"
        )
    half = -math.log(1.0 - 0.5 * opacity) / grid.spacing
    floor = min(math.log(2.0) / (2.0 * grid.radius), 0.5 * grid.high)
    candidates = np.geomspace(floor, grid.high, levels + 1)[:-1]
    error, rays = np.zeros(levels), np.zeros(levels)
    for side in sides:
        for densities in (side, side[:, ::-1]):
            seen = _crossing(np.cumsum(densities, axis=1) - 0.5 * densities, half)
            for k, candidate in enumerate(candidates):
                found = _crossing(densities, candidate)
                error[k] += np.minimum(np.abs(found - seen), _MAX_DEPTH_ERROR).sum()
                rays[k] += ((found < _NEVER) | (seen < _NEVER)).sum()
    error /= np.maximum(rays, 1)
    best = int(error.argmin())
    poor = np.flatnonzero(error > error[best] + 0.02)
    first = poor[poor < best].max(initial=-1) + 1
    last = poor[poor > best].min(initial=levels) - 1
    return float(candidates[(first + last) // 2])


def _crossing(values: np.ndarray, level: float) -> np.ndarray:
    """Position (R,), linearly interpolated, where each row of (R, N) first exceeds ``level``; else :data:`_NEVER`."""
    rows = np.arange(len(values))
    after = (values > level).argmax(axis=1)
    high, low = values[rows, after], values[rows, np.maximum(after - 1, 0)]
    fraction = (high - level) / np.maximum(high - low, 1e-20)
    return np.where(high > level, after - fraction, _NEVER)


def extract_surface(
    shape: Extractable,
    grid: DensityGrid,
    threshold: float,
    *,
    fill_cavities: bool = True,
    refine_steps: int = 4,
    chunk: int = 131072,
    setting: str = THRESHOLD_SETTING,
) -> Mesh:
    """Marching cubes on the grid, then bisection along the grid edges with newly evaluated densities.

    Args:
        shape: The object; its density is evaluated once per vertex and refinement step.
        grid: Result of :func:`sample_grid` for ``shape``.
        threshold: Density of the iso-surface.
        fill_cavities: Whether to treat empty regions that are not connected to the outside as solid.
        refine_steps: Bisection steps per vertex; without them, steep densities produce staircase artifacts.
        chunk: Points per query.
        setting: Config key of the threshold, for error messages.

    Raises:
        ValueError: The threshold is not positive, or is above all densities of the grid.
    """
    if not threshold > 0:
        raise ValueError(f"{setting} must be positive, got {threshold}")
    level = _level(grid, threshold)
    if not (level > 0).any():
        raise ValueError(
            f"no surface: {setting} is {threshold:.4g} but densities lie in "
            f"[{grid.low:.4g}, {grid.high:.4g}]; set it to a number in that range or to auto"
        )
    if fill_cavities:
        _fill_cavities(level)
    from skimage.measure import marching_cubes

    # level increases inwards, for which "ascent" gives outward winding.
    vertices, faces, _, _ = marching_cubes(level, 0.0, gradient_direction="ascent", allow_degenerate=False)
    if refine_steps > 0:
        vertices = _refine(shape, grid, level, threshold, vertices.astype(np.float64), refine_steps, chunk)
    world = (vertices - 1.0) * grid.spacing - grid.radius
    return Mesh(world.astype(np.float32), faces.astype(np.int64))


@dataclass(frozen=True)
class FoundSurface:
    """Surface of an object, and the parameters of its extraction.

    Attributes:
        mesh: Mesh in world coordinates, with outward winding.
        threshold: Density of the iso-surface; None if the surface was fused from renders, or if the object itself is a
            surface.
        density_range: Smallest and largest density of the grid. This and the following attributes are None if the
            object itself is a surface.
        opacity: Largest opacity of all axis-parallel rays.
        spacing: Grid step, scene units.
    """

    mesh: Mesh
    threshold: float | None = None
    density_range: tuple[float, float] | None = None
    opacity: float | None = None
    spacing: float | None = None


def find_surface(
    shape: Extractable,
    resolution: int,
    *,
    threshold: float | None = None,
    fill_cavities: bool = True,
    refine_steps: int = 4,
    chunk: int = 131072,
    setting: str = THRESHOLD_SETTING,
    progress: Progress | None = None,
) -> FoundSurface:
    """Surface of an object: its own mesh if it has one, otherwise one that is extracted.

    If the density on the surface is neither given nor known, the surface is fused from renders of the depth, if the
    object has them; otherwise it is an iso-surface of the density at an automatic threshold.

    Args:
        shape: The object.
        resolution: Grid points along each axis of the cube around the ball.
        threshold: Density of the iso-surface; None uses ``shape.iso_level`` or, failing that, a fused surface or the
            automatic threshold.
        fill_cavities, refine_steps, chunk, setting: See :func:`extract_surface`.
        progress: Callback that receives the fraction of densities evaluated so far.

    Raises:
        ValueError: There is no surface, or a density is negative or not finite.
    """
    own = shape.surface()
    if own is not None:
        if len(own.faces) == 0:
            raise ValueError("no surface: the mesh has no faces; train longer or start from another shape")
        return FoundSurface(own)
    grid = sample_grid(shape, resolution, chunk=chunk, progress=progress)
    level = threshold if threshold is not None else shape.iso_level
    options: dict[str, Any] = {
        "fill_cavities": fill_cavities,
        "refine_steps": refine_steps,
        "chunk": chunk,
        "setting": setting,
    }
    fused = shape.fused_surface(resolution) if level is None and isinstance(shape, HasFusedSurface) else None
    if fused is not None:
        mesh = find_surface(fused, resolution, **options).mesh
    else:
        level = automatic_threshold(grid, setting=setting) if level is None else level
        mesh = extract_surface(shape, grid, level, **options)
    return FoundSurface(mesh, level, (grid.low, grid.high), grid.opacity, grid.spacing)


def _axis(radius: float, spacing: float, count: int) -> np.ndarray:
    return ((np.arange(count) - 1) * spacing - radius).astype(np.float32)


def _contrast(density: np.ndarray, threshold: float) -> np.ndarray:
    return (density - threshold) / (density + threshold)


def _level(grid: DensityGrid, threshold: float) -> np.ndarray:
    """Values (N, N, N) float32 of f (module docstring) on the grid; never exactly 0, to avoid degenerate faces."""
    square = grid.axis.astype(np.float32) ** 2
    distance = np.sqrt(square[:, None, None] + square[None, :, None] + square[None, None, :])
    border = (grid.radius - distance) / grid.spacing
    level = np.where(border > 0, np.minimum(border, _contrast(grid.values, threshold)), border)
    level[np.abs(level) < 1e-4] = -1e-4
    return level.astype(np.float32)


def _fill_cavities(level: np.ndarray) -> None:
    """Fill empty regions that are not connected to the outside (the grid's corner), in place."""
    from scipy.ndimage import label

    regions, count = label(level < 0, structure=np.ones((3, 3, 3)))
    if count > 1:
        level[(regions > 0) & (regions != regions[0, 0, 0])] = 1.0


def _refine(
    shape: Extractable,
    grid: DensityGrid,
    level: np.ndarray,
    threshold: float,
    vertices: np.ndarray,
    steps: int,
    chunk: int,
) -> np.ndarray:
    """Move vertices (V, 3), in grid coordinates, along their grid edges to the zero crossing of f."""
    offset = np.abs(vertices - np.round(vertices))
    moving = offset.argmax(axis=1)
    rows = np.arange(len(vertices))
    # A few vertices of marching cubes lie inside cells, not on an edge, and are not moved.
    on_edge = (offset > 1e-5).sum(axis=1) == 1
    rows, moving = rows[on_edge], moving[on_edge]
    lower = np.round(vertices[on_edge])
    lower[np.arange(len(rows)), moving] = np.floor(vertices[rows, moving])
    upper = lower.copy()
    upper[np.arange(len(rows)), moving] += 1.0
    f_lower, f_upper = (level[tuple(corner.astype(np.int64).T)] for corner in (lower, upper))
    lower_inside = (f_lower > 0)[:, None]
    inside, outside = np.where(lower_inside, lower, upper), np.where(lower_inside, upper, lower)
    f_inside, f_outside = np.maximum(f_lower, f_upper), np.minimum(f_lower, f_upper)
    for _ in range(steps):
        middle = 0.5 * (inside + outside)
        f_middle = _evaluate(shape, grid, threshold, (middle - 1.0) * grid.spacing - grid.radius, chunk)
        solid = f_middle > 0
        inside[solid], f_inside[solid] = middle[solid], f_middle[solid]
        outside[~solid], f_outside[~solid] = middle[~solid], f_middle[~solid]
    weight = (f_inside / np.maximum(f_inside - f_outside, 1e-12))[:, None]
    vertices[rows] = inside + weight * (outside - inside)
    return vertices


def _evaluate(shape: Extractable, grid: DensityGrid, threshold: float, points: np.ndarray, chunk: int) -> np.ndarray:
    """Values (N,) of f at world-space points; the density is evaluated only inside the ball."""
    f = ((grid.radius - np.linalg.norm(points, axis=1)) / grid.spacing).astype(np.float32)
    inside = f > 0
    density = query_density(shape, points[inside], chunk=chunk)
    f[inside] = np.minimum(f[inside], _contrast(density, threshold))
    return f

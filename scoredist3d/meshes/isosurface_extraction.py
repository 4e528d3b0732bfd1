"""The surface of a density field: sampled on a grid, thresholded, extracted and refined.

The surface is where f(p) = min((d - s) / (d + s), (radius - |p|) / h) crosses zero, for density d, threshold s and grid
step h. The first term is bounded and near d = s grows with the logarithm of d, which suits densities that span decades.
The second term cuts the object at the ball's border, so the surface is closed there too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from scoredist3d.meshes.exportable import Progress, Shape, query_density
from scoredist3d.meshes.mesh import Mesh

THRESHOLD_SETTING = "exporter.threshold"
_MAX_DEPTH_ERROR = 8  # grid cells
_NEVER = 1 << 30  # depth of a ray without a surface


@dataclass(frozen=True)
class DensityGrid:
    """Densities on a cubic grid over the ball, with one layer of padding outside it.

    Attributes:
        values: (N, N, N) float32 indexed [x, y, z]; zero outside the ball.
        radius: The ball's radius.
        spacing: Grid step h in scene units.
        low, high: Smallest and largest density seen inside the ball.
    """

    values: np.ndarray
    radius: float
    spacing: float
    low: float
    high: float

    @property
    def axis(self) -> np.ndarray:
        """(N,) coordinates along each axis."""
        return _axis(self.radius, self.spacing, self.values.shape[0])

    @property
    def opacity(self) -> float:
        """Of the most opaque ray along an axis, in [0, 1]."""
        most = max(float(self.values.sum(axis=axis).max()) for axis in range(3))
        return 1.0 - math.exp(-self.spacing * most)


def sample_grid(shape: Shape, resolution: int, *, chunk: int = 131072, progress: Progress | None = None) -> DensityGrid:
    """Evaluate the density at ``resolution``^3 points over [-radius, radius]^3, only where they lie inside the ball.

    Raises:
        ValueError: A density that is not finite, or a negative one.
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
        raise ValueError(f"the object's densities lie in [{low:.4g}, {high:.4g}]: a density cannot be negative")
    values = np.zeros(inside.shape, dtype=np.float32)
    values[index] = densities
    return DensityGrid(values=values, radius=radius, spacing=spacing, low=low, high=high)


def automatic_threshold(grid: DensityGrid, levels: int = 48, *, setting: str = THRESHOLD_SETTING) -> float:
    """The density whose iso-surface lies where the renderer shows the surface.

    Parallel rays look at the grid from its six sides. A ray shows a surface at the depth where its opacity
    1 - exp(-sum density h) reaches half of the largest opacity of all rays; the iso-surface at level s puts it where
    the density first exceeds s. Candidates are log-spaced levels from ln 2 / (2 radius) (less does not make a ray half
    opaque even across the whole ball) to the largest density. The one with the smallest mean difference of the two
    depths wins; where only one of the two exists, or they are far apart, the difference counts as
    :data:`_MAX_DEPTH_ERROR` cells. Of levels that do equally well the middle one is taken.

    Raises:
        ValueError: No ray reaches 5 % opacity: the field is empty.
    """
    # About 64^2 rays per side are enough for a mean.
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
    """(R,) where each row of (R, N) first exceeds ``level``, in linearly interpolated cells; else :data:`_NEVER`."""
    rows = np.arange(len(values))
    after = (values > level).argmax(axis=1)
    high, low = values[rows, after], values[rows, np.maximum(after - 1, 0)]
    fraction = (high - level) / np.maximum(high - low, 1e-20)
    return np.where(high > level, after - fraction, _NEVER)


def extract_surface(
    shape: Shape,
    grid: DensityGrid,
    threshold: float,
    *,
    fill_cavities: bool = True,
    refine_steps: int = 4,
    chunk: int = 131072,
    setting: str = THRESHOLD_SETTING,
) -> Mesh:
    """Marching cubes on the grid, then bisection along the grid edges with fresh densities.

    Args:
        shape: Asked for 1 density per vertex and refinement step.
        grid: From :func:`sample_grid`.
        threshold: Density of the iso-surface.
        fill_cavities: Count empty space that is not connected to the outside as solid.
        refine_steps: Halvings of the interval that holds each vertex; a steep density otherwise gives stair steps.
        chunk: Points per query.
        setting: The key that sets the threshold, for messages.

    Raises:
        ValueError: The threshold is not positive or lies above the densities seen.
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

    # "ascent" is what gives outward winding here: level grows inwards.
    vertices, faces, _, _ = marching_cubes(level, 0.0, gradient_direction="ascent", allow_degenerate=False)
    if refine_steps > 0:
        vertices = _refine(shape, grid, level, threshold, vertices.astype(np.float64), refine_steps, chunk)
    world = (vertices - 1.0) * grid.spacing - grid.radius
    return Mesh(world.astype(np.float32), faces.astype(np.int64))


@dataclass(frozen=True)
class FoundSurface:
    """The surface of a shape, and how it was found.

    Attributes:
        mesh: World coordinates, outward winding.
        threshold: Density of the iso-surface; None where the shape is a surface itself.
        density_range: Smallest and largest density seen; None where none was asked for.
        opacity: Of the most opaque ray along an axis; None likewise.
        spacing: Grid step in scene units; None likewise.
    """

    mesh: Mesh
    threshold: float | None = None
    density_range: tuple[float, float] | None = None
    opacity: float | None = None
    spacing: float | None = None


def find_surface(
    shape: Shape,
    resolution: int,
    *,
    threshold: float | None = None,
    fill_cavities: bool = True,
    refine_steps: int = 4,
    chunk: int = 131072,
    setting: str = THRESHOLD_SETTING,
    progress: Progress | None = None,
) -> FoundSurface:
    """The shape's own surface, or else that of its density.

    Args:
        shape: What to look at.
        resolution: Density samples along each side of the cube around the ball.
        threshold: Density of the iso-surface; where not given that of the shape, or else the automatic one.
        fill_cavities, refine_steps, chunk, setting: See :func:`extract_surface`.
        progress: Fraction of the densities known.

    Raises:
        ValueError: There is no surface, or densities that cannot be.
    """
    own = shape.surface()
    if own is not None:
        if len(own.faces) == 0:
            raise ValueError("no surface: the mesh has no faces; train longer or start from another shape")
        return FoundSurface(own)
    grid = sample_grid(shape, resolution, chunk=chunk, progress=progress)
    level = threshold if threshold is not None else shape.iso_level
    level = automatic_threshold(grid, setting=setting) if level is None else level
    mesh = extract_surface(
        shape, grid, level, fill_cavities=fill_cavities, refine_steps=refine_steps, chunk=chunk, setting=setting
    )
    return FoundSurface(mesh, level, (grid.low, grid.high), grid.opacity, grid.spacing)


def _axis(radius: float, spacing: float, count: int) -> np.ndarray:
    return ((np.arange(count) - 1) * spacing - radius).astype(np.float32)


def _contrast(density: np.ndarray, threshold: float) -> np.ndarray:
    return (density - threshold) / (density + threshold)


def _level(grid: DensityGrid, threshold: float) -> np.ndarray:
    """(N, N, N) float32 f of the module's docstring, never exactly zero (that would make faces without area)."""
    square = grid.axis.astype(np.float32) ** 2
    distance = np.sqrt(square[:, None, None] + square[None, :, None] + square[None, None, :])
    border = (grid.radius - distance) / grid.spacing
    level = np.where(border > 0, np.minimum(border, _contrast(grid.values, threshold)), border)
    level[np.abs(level) < 1e-4] = -1e-4
    return level.astype(np.float32)


def _fill_cavities(level: np.ndarray) -> None:
    """Make empty regions that do not touch the grid's corner (the outside) solid, in place."""
    from scipy.ndimage import label

    regions, count = label(level < 0, structure=np.ones((3, 3, 3)))
    if count > 1:
        level[(regions > 0) & (regions != regions[0, 0, 0])] = 1.0


def _refine(
    shape: Shape,
    grid: DensityGrid,
    level: np.ndarray,
    threshold: float,
    vertices: np.ndarray,
    steps: int,
    chunk: int,
) -> np.ndarray:
    """Move vertices (V, 3, grid coordinates) along their grid edge to the crossing of f."""
    offset = np.abs(vertices - np.round(vertices))
    moving = offset.argmax(axis=1)
    rows = np.arange(len(vertices))
    # Marching cubes puts a few vertices inside cells, where there is no edge to search along: they stay.
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


def _evaluate(shape: Shape, grid: DensityGrid, threshold: float, points: np.ndarray, chunk: int) -> np.ndarray:
    """(N,) f at world points; the density is asked for only inside the ball."""
    f = ((grid.radius - np.linalg.norm(points, axis=1)) / grid.spacing).astype(np.float32)
    inside = f > 0
    density = query_density(shape, points[inside], chunk=chunk)
    f[inside] = np.minimum(f[inside], _contrast(density, threshold))
    return f

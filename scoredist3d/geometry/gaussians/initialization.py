"""Gaussians to begin with: in a ball, on a surface, or from a file of points."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from scoredist3d.config import FieldError
from scoredist3d.geometry.base import GaussianSet
from scoredist3d.meshes.mesh import Mesh
from scoredist3d.meshes.splats import Up, is_splats, read_points, read_points_table, read_splats
from scoredist3d.nn.regression import points_in_ball, surface_sampler
from scoredist3d.ops.rotations import quaternions_to

logger = logging.getLogger(__name__)

_NEIGHBOURS = 3
_MARGIN = 0.9  # what comes from a file reaches so far, in radii, as meshes do
_LEAST_SCALE = 1e-4  # of the radius: points at one place have no distance

Look = Callable[[Tensor], Tensor]
"""Points (N, 3) or colours (N, 3) to features (N, F)."""


def gaussians_in_ball(
    count: int, extent: float, opacity: float, paint: Look, generator: torch.Generator, radius: float
) -> GaussianSet:
    """Round Gaussians uniform in the ball of ``extent``, gray.

    Args:
        count: N.
        extent: Scene units.
        opacity: Of each.
        paint: Colours to features.
        generator: Draws the places.
        radius: Of the object's ball.
    """
    return round_gaussians(points_in_ball(generator, count, extent), None, opacity, paint, radius)


def round_gaussians(means: Tensor, colors: Tensor | None, opacity: float, paint: Look, radius: float) -> GaussianSet:
    """Gaussians at (N, 3) ``means``, as wide as their three nearest neighbours are far on average; gray by default."""
    quaternions = means.new_zeros(len(means), 4)
    quaternions[:, 0] = 1.0
    return GaussianSet(
        means,
        spacing(means, radius)[:, None].expand(-1, 3).contiguous(),
        quaternions,
        torch.full_like(means[:, 0], opacity),
        paint(torch.full_like(means, 0.5) if colors is None else colors),
    )


def gaussians_on_surface(
    mesh: Mesh,
    count: int,
    opacity: float,
    thickness: float,
    look: Look,
    generator: torch.Generator,
    radius: float,
    *,
    around: int = 0,
    distance: float = 0.0,
) -> GaussianSet:
    """Flat Gaussians uniform by area on a mesh, their shortest axes along its normals.

    Args:
        mesh: World coordinates.
        count: Gaussians on the surface.
        opacity: Of each.
        thickness: Deviation along the normal, in units of that along the surface (the mean distance to the three
            nearest neighbours).
        look: Points to features.
        generator: Draws the places.
        radius: Of the ball.
        around: Further, round ones near the surface (GaussianDreamer, arXiv 2310.08529, grows its points so); they
            have the features of the points that they were moved away from.
        distance: Deviation of that move, scene units.

    Raises:
        ValueError: The mesh has no area.
    """
    sample = surface_sampler(mesh, torch.zeros((), device=generator.device))
    points, normals = sample(generator, count + around)
    moved = points.clone()
    moved[count:] += distance * torch.randn(around, 3, generator=generator, device=points.device)
    scales = spacing(moved, radius)[:, None].repeat(1, 3)
    scales[:count, 2] *= thickness
    return GaussianSet(moved, scales, quaternions_to(normals), torch.full_like(points[:, 0], opacity), look(points))


def gaussians_from_points(
    path: str, up: Up, most: int, opacity: float, fit: bool, paint: Look, generator: torch.Generator, radius: float
) -> GaussianSet:
    """The Gaussians of a PLY file, or round ones at its points (some of them where there are more than ``most``).

    Colours are those seen from nowhere in particular; that view-dependent parts are left out is logged.

    Args:
        path: A local file.
        up: Its upward axis.
        most: Points taken of a plain point cloud.
        opacity: Of each, where the file holds plain points.
        fit: Move and scale into the ball.
        paint: Colours to features.
        generator: Chooses points.
        radius: Of the ball.

    Raises:
        ValueError: The file cannot be read, or holds too few points.
    """
    table, _ = read_points_table(path)
    if is_splats(table):
        splats = read_splats(path, up)
        _require_some(len(splats.means), path)
        if splats.harmonics is not None:
            logger.warning(
                "geometry.init_file: the view-dependent colours of %s (harmonics up to degree %d) are left out; its "
                "Gaussians start with the colours that all views share",
                Path(path).name,
                splats.degree,
            )
        means, scale = fitted(splats.means, radius) if fit else (splats.means, 1.0)
        features = paint(splats.colors)
        return GaussianSet(means, scale * splats.scales, splats.quaternions, splats.opacities, features)
    points, colors = read_points(path, up)
    _require_some(len(points), path)
    chosen = torch.randperm(len(points), generator=generator)[:most].sort().values
    means = (fitted(points, radius)[0] if fit else points)[chosen]
    return round_gaussians(means, None if colors is None else colors[chosen], opacity, paint, radius)


def fitted(points: Tensor, radius: float) -> tuple[Tensor, float]:
    """Points (N, 3) with the middle of their bounds at the origin, reaching 0.9 of the radius; and their scaling.

    Raises:
        ValueError: All points are at one position.
    """
    centred = points - 0.5 * (points.amin(dim=0) + points.amax(dim=0))
    reach = float(centred.norm(dim=-1).max())
    if not reach > 0:
        raise FieldError("all points are at one position", "init_file")
    scale = _MARGIN * radius / reach
    return centred * scale, scale


def spacing(points: Tensor, radius: float) -> Tensor:
    """(N,) mean distances of (N, 3) points, N > 3, to their three nearest neighbours; more than 0."""
    from scipy.spatial import cKDTree

    places = points.detach().double().cpu().numpy()
    distances, _ = cKDTree(places).query(places, k=_NEIGHBOURS + 1)
    mean = torch.from_numpy(distances[:, 1:].mean(axis=1)).to(points)
    return mean.clamp_min(_LEAST_SCALE * radius)


def _require_some(count: int, path: str) -> None:
    if count <= _NEIGHBOURS:
        raise FieldError(f"{Path(path).name} holds {count} points, at least 4 are needed", "init_file")

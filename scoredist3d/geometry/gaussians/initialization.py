"""Initial 3D Gaussians: in a ball, on a surface, or from a PLY file."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from scoredist3d.config import FieldError
from scoredist3d.geometry.base import GaussianSet, PointFunction
from scoredist3d.meshes.mesh import Mesh
from scoredist3d.meshes.sampling import points_in_ball, surface_sampler
from scoredist3d.meshes.splats import Up, is_splats, read_points, read_points_table, read_splats
from scoredist3d.ops.rotations import quaternions_to

logger = logging.getLogger(__name__)

_NEIGHBORS = 3
_MARGIN = 0.9  # extent of objects from files, as a fraction of the radius; the same as for meshes
_MIN_SCALE = 1e-4  # as a fraction of the radius, for coincident points

ColorFunction = Callable[[Tensor], Tensor]
"""Map from (N, 3) colors to (N, F) features with which the material reproduces them."""


def gaussians_in_ball(
    count: int, extent: float, opacity: float, color_features: ColorFunction, generator: torch.Generator, radius: float
) -> GaussianSet:
    """Gray isotropic Gaussians, uniformly distributed in a ball around the origin.

    Args:
        count: Number of Gaussians.
        extent: Radius of the filled ball, scene units.
        opacity: Opacity of each Gaussian.
        color_features: Maps colors to features.
        generator: Random generator for the means.
        radius: Radius of the object's ball, scene units.
    """
    return isotropic_gaussians(points_in_ball(generator, count, extent), None, opacity, color_features, radius)


def isotropic_gaussians(
    means: Tensor, colors: Tensor | None, opacity: float, color_features: ColorFunction, radius: float
) -> GaussianSet:
    """Isotropic Gaussians at (N, 3) ``means``; gray without ``colors`` (N, 3).

    The standard deviation is the mean distance to the three nearest neighbors.
    """
    quaternions = means.new_zeros(len(means), 4)
    quaternions[:, 0] = 1.0
    return GaussianSet(
        means,
        spacing(means, radius)[:, None].expand(-1, 3).contiguous(),
        quaternions,
        torch.full_like(means[:, 0], opacity),
        color_features(torch.full_like(means, 0.5) if colors is None else colors),
    )


def gaussians_on_surface(
    mesh: Mesh,
    count: int,
    opacity: float,
    thickness: float,
    features: PointFunction,
    generator: torch.Generator,
    radius: float,
    *,
    around: int = 0,
    distance: float = 0.0,
) -> GaussianSet:
    """Flat Gaussians on a mesh, uniformly distributed by area, with their shortest axes along the normals.

    Args:
        mesh: World coordinates.
        count: Number of Gaussians on the surface.
        opacity: Opacity of each Gaussian.
        thickness: Ratio of the standard deviation along the normal to that along the surface, which is the mean
            distance to the three nearest neighbors.
        features: Maps points to features.
        generator: Random generator for the means.
        radius: Radius of the object's ball, scene units.
        around: Number of additional isotropic Gaussians near the surface, as in the point growing of GaussianDreamer
            (arXiv 2310.08529). They have the features of the surface points from which they were displaced.
        distance: Standard deviation of that displacement, scene units.

    Raises:
        ValueError: The mesh has no area.
    """
    sample = surface_sampler(mesh, torch.zeros((), device=generator.device))
    points, normals = sample(generator, count + around)
    moved = points.clone()
    moved[count:] += distance * torch.randn(around, 3, generator=generator, device=points.device)
    scales = spacing(moved, radius)[:, None].repeat(1, 3)
    scales[:count, 2] *= thickness
    return GaussianSet(moved, scales, quaternions_to(normals), torch.full_like(points[:, 0], opacity), features(points))


def gaussians_from_points(
    path: str,
    up: Up,
    most: int,
    opacity: float,
    fit: bool,
    color_features: ColorFunction,
    generator: torch.Generator,
    radius: float,
) -> GaussianSet:
    """The Gaussians of a PLY file, or isotropic Gaussians at the points of a PLY point cloud.

    View-dependent colors are dropped, which is logged.

    Args:
        path: A local PLY file.
        up: Upward axis of the file.
        most: Maximum number of points used from a point cloud; a random subset of larger ones is used.
        opacity: Opacity of the Gaussians at the points of a point cloud.
        fit: Whether to center the object and scale it to the ball.
        color_features: Maps colors to features.
        generator: Random generator for the subset.
        radius: Radius of the object's ball, scene units.

    Raises:
        ValueError: The file cannot be read, or has too few points.
    """
    table, _ = read_points_table(path)
    if is_splats(table):
        splats = read_splats(path, up)
        _require_neighbors(len(splats.means), path)
        if splats.harmonics is not None:
            logger.warning(
                "geometry.init_file: the view-dependent colors of %s (spherical harmonics up to degree %d) are "
                "dropped; only the view-independent colors are used",
                Path(path).name,
                splats.degree,
            )
        means, scale = fitted(splats.means, radius) if fit else (splats.means, 1.0)
        features = color_features(splats.colors)
        return GaussianSet(means, scale * splats.scales, splats.quaternions, splats.opacities, features)
    points, colors = read_points(path, up)
    _require_neighbors(len(points), path)
    chosen = torch.randperm(len(points), generator=generator)[:most].sort().values
    means = (fitted(points, radius)[0] if fit else points)[chosen]
    return isotropic_gaussians(means, None if colors is None else colors[chosen], opacity, color_features, radius)


def fitted(points: Tensor, radius: float) -> tuple[Tensor, float]:
    """(N, 3) points, centered and scaled to reach 0.9 of the radius, and the scale factor.

    The center of the points' bounding box is moved to the origin.

    Raises:
        ValueError: All points coincide.
    """
    centered = points - 0.5 * (points.amin(dim=0) + points.amax(dim=0))
    reach = float(centered.norm(dim=-1).max())
    if not reach > 0:
        raise FieldError("all points coincide; use a file with at least two different points", "init_file")
    scale = _MARGIN * radius / reach
    return centered * scale, scale


def spacing(points: Tensor, radius: float) -> Tensor:
    """(N,) mean distances of (N, 3) points, N > 3, to their three nearest neighbors, at least 1e-4 of the radius."""
    from scipy.spatial import cKDTree

    places = points.detach().double().cpu().numpy()
    distances, _ = cKDTree(places).query(places, k=_NEIGHBORS + 1)
    mean = torch.from_numpy(distances[:, 1:].mean(axis=1)).to(points)
    return mean.clamp_min(_MIN_SCALE * radius)


def _require_neighbors(count: int, path: str) -> None:
    if count <= _NEIGHBORS:
        raise FieldError(
            f"{Path(path).name} has {count} points, but at least {_NEIGHBORS + 1} are needed; use a denser file",
            "init_file",
        )

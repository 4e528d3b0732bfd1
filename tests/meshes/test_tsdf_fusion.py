"""Fusion of exact depths: distance of the surface to the truth, closure, genus, and what no camera sees."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from shared.export_fields import AnalyticField, Sdf, box, sphere

from scoredist3d.cameras import Cameras, orbit, sphere_cameras
from scoredist3d.evaluation.surface_distance import chamfer_distance, visible_points
from scoredist3d.geometry.base import distance_density
from scoredist3d.geometry.trilinear import trilinear
from scoredist3d.meshes.isosurface_extraction import find_surface
from scoredist3d.meshes.mesh import Mesh, topology
from scoredist3d.meshes.quality import dihedrals, genus
from scoredist3d.meshes.sampling import mesh_points
from scoredist3d.meshes.tsdf_fusion import DepthMaps, fuse_depths, seen_pixels
from scoredist3d.procedural import CATEGORIES, cast_rays, sample_objects

RESOLUTION = 64
STEP = 2 / (RESOLUTION - 1)
TRUNCATION = 0.1


def traced(sdf: Sdf, cameras: Cameras, steps: int = 40) -> DepthMaps:
    """Depths of an exact distance by sphere tracing; infinite for rays that reach no surface."""
    rays = cameras.rays()
    origins, directions = rays.origins.reshape(-1, 3), rays.directions.reshape(-1, 3)
    t = torch.zeros(len(origins))
    for _ in range(steps):
        t += sdf(origins + t[:, None] * directions).clamp_max(0.5)
    hit = sdf(origins + t[:, None] * directions).abs() < 1e-3
    depth = torch.where(hit, t, torch.inf).view(rays.cosines.shape) * rays.cosines
    return DepthMaps(cameras, depth)


def views(count: int = 48, size: int = 96, distance: float = 3.2) -> Cameras:
    return sphere_cameras(count, distance=distance, fovy_deg=40.0, size=size)


def fused_mesh(maps: DepthMaps, **options: float) -> Mesh:
    """The surface of fused depths, extracted as that of any geometry with distances."""
    grid = fuse_depths(maps, 1.0, RESOLUTION, **{"truncation": TRUNCATION, **options})
    field = AnalyticField(lambda points: points[:, 0])
    field.density = lambda points: distance_density(trilinear(grid, points, 1.0), points, 1.0)
    field.iso_level = 1.0
    return find_surface(field, RESOLUTION).mesh


@cache
def seen_solid(name: str) -> DepthMaps:
    return traced(SOLIDS[name], views())


SOLIDS: dict[str, Sdf] = {
    "sphere": sphere(0.6),
    "sphere off the center": sphere(0.3, (0.3, -0.35, 0.4)),
    "box": box((0.5, 0.35, 0.6)),
}


@pytest.mark.parametrize("name", SOLIDS)
def test_the_surface_of_exact_depths_is_the_truth(name: str) -> None:
    mesh = fused_mesh(seen_solid(name))
    found = topology(mesh)
    assert found.watertight and found.components == 1 and genus(mesh) == 0 and mesh.volume > 0
    distance = SOLIDS[name](torch.from_numpy(mesh.vertices))
    # A depth is that of the pixel's center, and a pixel is 0.8 grid steps wide.
    assert distance.abs().mean() < 0.15 * STEP
    assert distance.abs().max() < 1.2 * STEP  # at the edges of the box


@pytest.mark.parametrize("name", SOLIDS)
def test_distances_are_those_of_the_truth_near_the_surface_and_limited_elsewhere(name: str) -> None:
    sdf = SOLIDS[name]
    grid = fuse_depths(seen_solid(name), 1.0, RESOLUTION, truncation=TRUNCATION)
    axis = torch.linspace(-1, 1, RESOLUTION)
    points = torch.cartesian_prod(axis, axis, axis)
    values, truth = grid.reshape(-1), sdf(points)
    outside_ball = points.norm(dim=-1) > 1 + 1e-6
    assert (values[outside_ball] == TRUNCATION).all()
    assert values.abs().max() <= TRUNCATION * (1 + 1e-6)
    torch.testing.assert_close(
        values[truth < -1.5 * TRUNCATION], torch.tensor(-TRUNCATION).expand_as(values[truth < -1.5 * TRUNCATION])
    )
    clear = (truth > STEP) | (truth < -STEP)
    assert (values[clear].sign() == truth[clear].sign()).float().mean() > 0.9999


def test_one_camera_measures_along_its_rays() -> None:
    """A plane at x = 0 that fills the image, seen at angles of up to 20 degrees."""
    camera = orbit(*(torch.tensor([value]) for value in (0.0, 0.0, 3.2, 40.0)), 64, 64)
    grid = fuse_depths(DepthMaps(camera, torch.full((1, 64, 64), 3.2)), 1.0, 16, truncation=0.3)
    axis = torch.linspace(-1, 1, 16)
    points = torch.cartesian_prod(axis, axis, axis)
    origin = torch.tensor([3.2, 0.0, 0.0])
    met = origin + (points - origin) * (3.2 / (3.2 - points[:, :1]))
    expected = ((met - origin).norm(dim=-1) - (points - origin).norm(dim=-1)).clamp(-0.3, 0.3)
    inside = points.norm(dim=-1) <= 1
    torch.testing.assert_close(grid.reshape(-1)[inside], expected[inside], atol=1e-5, rtol=0)


def test_points_on_rays_are_seen_in_the_pixels_of_the_rays() -> None:
    """An image of 7 x 10 pixels; points on both sides of its borders, and behind the camera."""
    cameras = orbit(*(torch.tensor(value) for value in ([0.0, 70.0], [0.0, 35.0], [3.0, 2.0], [40.0, 75.0])), 7, 10)
    rays, generator = cameras.rays(), torch.Generator().manual_seed(0)
    for index in range(2):
        t = 0.5 + 3.0 * torch.rand(7, 10, 1, generator=generator)
        points = (rays.origins[index] + t * rays.directions[index]).reshape(-1, 3)
        pixel, in_image, z, along_ray = seen_pixels(points, cameras[index])
        assert torch.equal(pixel, torch.arange(70)) and in_image.all()
        torch.testing.assert_close(along_ray, 1.0 / rays.cosines[index].flatten())
        torch.testing.assert_close(-z * along_ray, t.flatten())
        behind = (rays.origins[index] - t * rays.directions[index]).reshape(-1, 3)
        _, in_image, z, _ = seen_pixels(behind, cameras[index])
        assert not in_image.any() and (z > 0).all()
        # With the same focal length, the outermost pixels of a larger image are outside.
        half = torch.tan(0.5 * cameras[index].fovy) * 9 / 7
        rim = replace(cameras[index], fovy=2 * torch.atan(half), height=9, width=12)
        wider = rim.rays()
        pixel, in_image, _, _ = seen_pixels((wider.origins + wider.directions).reshape(-1, 3), cameras[index])
        inside = torch.zeros(9, 12, dtype=torch.bool)
        inside[1:-1, 1:-1] = True
        assert torch.equal(in_image, inside.flatten())
        assert torch.equal(pixel[in_image], torch.arange(70)) and pixel.min() >= 0 and pixel.max() < 70


def test_the_size_of_the_images_is_that_of_the_depths() -> None:
    maps = traced(sphere(0.6), views(4, 24))
    other = DepthMaps(maps.cameras.with_size(7, 5), maps.depth)
    grids = [fuse_depths(found, 1.0, 12, truncation=TRUNCATION) for found in (maps, other)]
    assert torch.equal(*grids) and (grids[0] < 0).any()


def test_what_is_behind_a_camera_is_not_fused() -> None:
    """The camera is in the ball and sees the half in front of it; points behind it are unknown, hence inside."""
    camera = orbit(*(torch.tensor([value]) for value in (0.0, 0.0, 0.2, 90.0)), 16, 16)
    grid = fuse_depths(DepthMaps(camera, torch.full((1, 16, 16), torch.inf)), 1.0, 16, truncation=0.3)
    axis = torch.linspace(-1, 1, 16)
    points = torch.cartesian_prod(axis, axis, axis)
    behind = (points[:, 0] > 0.21) & (points.norm(dim=-1) <= 1)
    assert behind.any() and (grid.flatten()[behind] == -0.3).all()


def test_a_mug_keeps_its_handle_and_its_inside() -> None:
    mug = sample_objects(1, torch.Generator().manual_seed(0), category=CATEGORIES.index("mug"))
    cameras = views(64)
    depths = []
    for index in range(len(cameras)):
        rays = cameras[index].rays()
        hits = cast_rays(mug.geometry, rays.origins.reshape(1, -1, 3)[:, :1], rays.directions.reshape(1, -1, 3))
        depths.append(hits.t.view(rays.cosines.shape) * rays.cosines)
    mesh = fused_mesh(DepthMaps(cameras, torch.cat(depths)))
    assert topology(mesh).watertight and topology(mesh).components == 1 and genus(mesh) == 1
    truth = visible_points(mug).numpy()
    assert chamfer_distance(mesh_points(mesh, 20000, np.random.default_rng(0)), truth) < 0.02
    # Points on the bottom inside of the mug: seen from above only.
    assert mesh.volume < 0.8 * float(np.prod(mesh.bounds[1] - mesh.bounds[0]))


def test_parts_that_no_camera_sees_are_inside() -> None:
    """From the upper hemisphere, the solid continues below the sphere as a closed shadow, without a hole."""
    cameras = views(64)
    above = cameras[cameras.origins[:, 2] > 1.0]
    mesh = fused_mesh(traced(sphere(0.4), above))
    assert topology(mesh).watertight
    assert mesh.bounds[0][2] < -0.45 and mesh.bounds[1][2] == pytest.approx(0.4, abs=STEP)


def test_empty_views_carve_everything() -> None:
    cameras = views(4, 16)
    grid = fuse_depths(DepthMaps(cameras, torch.full((4, 16, 16), torch.inf)), 1.0, 16, truncation=TRUNCATION)
    assert (grid == TRUNCATION).all()


def test_noise_is_averaged_by_a_larger_truncation_and_a_blur() -> None:
    generator = torch.Generator().manual_seed(0)
    exact = seen_solid("sphere")
    noisy = DepthMaps(exact.cameras, exact.depth + 0.04 * torch.randn(exact.depth.shape, generator=generator))
    rough, wide, smooth = (
        dihedrals(fused_mesh(noisy, **options)).mean_deg
        for options in ({"truncation": 0.04}, {"truncation": 0.16}, {"truncation": 0.16, "blur": 1.0})
    )
    assert rough > 1.5 * wide and wide > 1.5 * smooth


def test_weights_choose_between_contradicting_depths() -> None:
    """Half of the cameras see a sphere of another radius; their low weights make them irrelevant."""
    cameras = views(64)
    small, large = (traced(sphere(radius), cameras).depth for radius in (0.5, 0.56))
    other = (torch.arange(64) % 2 == 1)[:, None, None]
    depth = torch.where(other & large.isfinite() & small.isfinite(), large, small)
    between, near = (
        np.linalg.norm(fused_mesh(DepthMaps(cameras, depth, weight)).vertices, axis=1).mean()
        for weight in (None, torch.where(other, 1e-3, 1.0).expand_as(depth))
    )
    assert near == pytest.approx(0.5, abs=0.15 * STEP) and between > 0.51


def test_the_result_scales_with_the_scene() -> None:
    maps = traced(sphere(0.6), views(8, 48))
    grid = fuse_depths(maps, 1.0, 24, truncation=TRUNCATION)
    scaled = fuse_depths(DepthMaps(views(8, 48, 9.6), 3 * maps.depth), 3.0, 24, truncation=3 * TRUNCATION)
    # Rounding may move a point to the next pixel.
    assert ((scaled / 3 - grid).abs() < 1e-4).float().mean() > 0.99


def test_a_blur_keeps_linear_functions_and_total() -> None:
    from scoredist3d.meshes.tsdf_fusion import _blurred

    axis = torch.linspace(-1, 1, 20, dtype=torch.float64)
    linear = axis[:, None, None] + 2 * axis[None, :, None] - 3 * axis[None, None, :]
    torch.testing.assert_close(_blurred(linear, 1.0)[4:-4, 4:-4, 4:-4], linear[4:-4, 4:-4, 4:-4])
    point = torch.zeros(21, 21, 21, dtype=torch.float64)
    point[10, 10, 10] = 1.0
    spread = _blurred(point, 1.5)
    offset = torch.arange(21, dtype=torch.float64) - 10
    for dims in ((1, 2), (0, 2), (0, 1)):
        # The kernel is cut off at 3 standard deviations, which lowers the variance by about 3 %.
        assert float((spread.sum(dims) * offset**2).sum()) == pytest.approx(1.5**2, rel=0.05)
    assert float(spread.sum()) == pytest.approx(1.0)

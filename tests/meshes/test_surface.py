"""Extraction: position, closure, winding, thresholds, errors."""

import math

import numpy as np
import pytest
import torch
import trimesh
from shared.export_fields import AnalyticField, box, difference, sphere, torus, union

from scoredist3d.meshes.isosurface_extraction import automatic_threshold, extract_surface, sample_grid
from scoredist3d.meshes.mesh import Mesh, drop_small_components, topology


def surface_of(field, resolution=48, threshold=None, **options):
    grid = sample_grid(field, resolution)
    return extract_surface(field, grid, threshold or automatic_threshold(grid), **options)


SHAPES = {
    "sphere": (sphere(0.6), 1, 2, 4 / 3 * math.pi * 0.6**3),
    "torus": (torus(0.55, 0.2), 1, 0, 2 * math.pi**2 * 0.55 * 0.2**2),
    "two balls": (
        union(sphere(0.25, (0.5, 0, 0)), sphere(0.3, (-0.4, 0.1, 0))),
        2,
        4,
        4 / 3 * math.pi * (0.25**3 + 0.3**3),
    ),
}


@pytest.mark.parametrize("softness", [0.0, 0.01])
@pytest.mark.parametrize("name", SHAPES)
def test_closed_surface_with_outward_winding(name, softness):
    sdf, components, euler, volume = SHAPES[name]
    # With a known iso-value the surface of the soft field is at distance 0 exactly: half of the peak.
    mesh = surface_of(AnalyticField(sdf, softness=softness), threshold=250.0)
    found = topology(mesh)
    assert found.watertight and found.holes == 0 and found.components == components
    assert len(mesh.vertices) - 3 * len(mesh.faces) // 2 + len(mesh.faces) == euler
    assert mesh.volume == pytest.approx(volume, rel=0.02)
    distance = sdf(torch.from_numpy(mesh.vertices)).abs()
    # Four bisections leave 1/16 of a cell along the grid edge (2/47), an upper bound of the distance; soft fields then
    # interpolate.
    assert distance.quantile(0.999) < 2 / 47 / 16
    assert mesh.vertices.dtype == np.float32 and mesh.faces.dtype == np.int64


def test_refinement_removes_the_stairs_of_a_hard_field():
    sdf = sphere(0.6)
    rough, fine = (surface_of(AnalyticField(sdf), refine_steps=steps) for steps in (0, 6))
    rough_error, fine_error = (sdf(torch.from_numpy(mesh.vertices)).abs().mean() for mesh in (rough, fine))
    assert fine_error < 2 / 47 / 64 and rough_error > 8 * fine_error


def test_surface_that_reaches_the_ball_is_closed_on_it():
    slab = surface_of(AnalyticField(box((2.0, 2.0, 0.3)), radius=1.5))
    assert topology(slab).watertight
    reach = np.linalg.norm(slab.vertices, axis=1).max()
    assert 1.5 * 0.995 < reach <= 1.5 * (1 + 1e-5)
    cylinder_with_caps = 2 * math.pi * (1.5**2 * 0.3 - 0.3**3 / 3)
    assert slab.volume == pytest.approx(cylinder_with_caps, rel=0.01)


def test_a_field_that_is_solid_everywhere_gives_the_ball():
    ball = surface_of(AnalyticField(lambda p: -torch.ones(len(p))))
    assert topology(ball).watertight
    assert ball.volume == pytest.approx(4 / 3 * math.pi, rel=0.01)


def test_vertices_follow_the_world_axes():
    mesh = surface_of(AnalyticField(box((0.1, 0.15, 0.2), center=(0.5, -0.3, 0.1))), threshold=10.0, refine_steps=8)
    low, high = mesh.bounds
    np.testing.assert_allclose(low, [0.4, -0.45, -0.1], atol=2e-3)
    np.testing.assert_allclose(high, [0.6, -0.15, 0.3], atol=2e-3)


def test_cavities_are_filled_on_request_only():
    hollow = AnalyticField(difference(sphere(0.7), sphere(0.4)))
    filled, kept = surface_of(hollow), surface_of(hollow, fill_cavities=False)
    assert topology(filled).components == 1 and topology(kept).components == 2
    assert filled.volume == pytest.approx(4 / 3 * math.pi * 0.7**3, rel=0.02)
    assert kept.volume == pytest.approx(4 / 3 * math.pi * (0.7**3 - 0.4**3), rel=0.02)


def test_floaters_are_dropped_by_volume():
    # Volumes relative to the largest: 1, 0.125, 0.0024. The small ball is short, too.
    balls = union(sphere(0.3, (-0.4, 0, 0)), sphere(0.15, (0.3, 0, 0)), sphere(0.04, (0.6, 0.4, 0)))
    mesh = surface_of(AnalyticField(balls), resolution=64)
    for fraction, pieces in ((0.0, 3), (0.02, 2), (0.5, 2), (1.0, 1)):
        kept, dropped = drop_small_components(mesh, fraction)
        assert topology(kept).components == pieces and dropped == 3 - pieces
        assert topology(kept).watertight
    assert kept.bounds[1][0] == pytest.approx(-0.1, abs=0.01)


def test_thin_parts_are_kept_although_their_volume_is_small():
    ball, stick, chip = (
        trimesh.creation.icosphere(radius=0.5),
        *(trimesh.creation.box(size) for size in ((0.3, 0.04, 0.04), (0.08, 0.04, 0.04))),
    )
    stick.apply_translation([0.75, 0, 0])
    chip.apply_translation([-0.8, 0, 0])
    whole = trimesh.util.concatenate([ball, stick, chip])
    kept, dropped = drop_small_components(Mesh(whole.vertices, whole.faces), 0.02)
    assert dropped == 1 and kept.bounds[0][0] == pytest.approx(-0.5, abs=0.01)
    assert kept.bounds[1][0] == pytest.approx(0.9)
    assert drop_small_components(Mesh(whole.vertices, whole.faces), 1.0)[1] == 2


@pytest.mark.parametrize(("centers", "parts"), [((0.95,), 1), ((1.15, 0.75), 3), ((0.75, 1.15), 3), ((0.75, 1.3), 2)])
def test_thin_parts_are_kept_near_the_rest(centers: tuple[float, ...], parts: int):
    """Sticks of length 0.3 beside a ball of radius 0.5; one may reach the ball through another."""
    pieces = [trimesh.creation.icosphere(radius=0.5)]
    for center in centers:
        stick = trimesh.creation.box((0.3, 0.04, 0.04))
        stick.apply_translation([center, 0, 0])
        pieces.append(stick)
    whole = trimesh.util.concatenate(pieces)
    kept, dropped = drop_small_components(Mesh(whole.vertices, whole.faces), 0.02)
    assert (topology(kept).components, dropped) == (parts, 1 + len(centers) - parts)


def test_dropped_components_do_not_change_which_thin_parts_are_kept():
    """A cavity wall beside an arm is no bridge to it, and a far sliver does not make an arm short."""
    ball, far, wall, arm, sliver = (
        trimesh.creation.icosphere(radius=0.5),
        *(
            trimesh.creation.box(size)
            for size in ((0.3, 0.04, 0.04), (0.3, 0.04, 0.04), (0.3, 0.04, 0.04), (4, 0.02, 0.02))
        ),
    )
    far.apply_translation([1.15, 0, 0])
    wall.apply_translation([0.75, 0, 0])
    wall.invert()
    kept, dropped = drop_small_components(_joined(ball, far, wall), 0.02)
    assert (topology(kept).components, dropped) == (1, 2)
    arm.apply_translation([0.75, 0, 0])
    sliver.apply_translation([0, 9, 0])
    kept, dropped = drop_small_components(_joined(ball, arm, sliver), 0.02)
    assert (topology(kept).components, dropped) == (2, 1)


def _joined(*pieces: trimesh.Trimesh) -> Mesh:
    whole = trimesh.util.concatenate(list(pieces))
    return Mesh(whole.vertices, whole.faces)


@pytest.mark.parametrize("resolution", [32, 64])
def test_automatic_threshold_of_a_hard_object_gives_its_surface(resolution):
    field = AnalyticField(sphere(0.5))
    grid = sample_grid(field, resolution)
    threshold = automatic_threshold(grid)
    assert 0.5 < threshold < 450.0
    assert extract_surface(field, grid, threshold).volume == pytest.approx(4 / 3 * math.pi * 0.5**3, rel=0.02)


def test_automatic_threshold_of_a_soft_object_lies_where_it_becomes_half_opaque():
    # Head-on, the optical depth 200 * 0.02 * log(1 + exp(-d / 0.02)) is ln 2 at d = 0.033; grazing rays, which a ball
    # seen from six sides also has, are half opaque further out: the silhouette is at d = 0.069.
    field = AnalyticField(sphere(0.5), peak=200.0, softness=0.02)
    grid = sample_grid(field, 64)
    mesh = extract_surface(field, grid, automatic_threshold(grid))
    radius = (0.75 * mesh.volume / math.pi) ** (1 / 3)
    assert 0.533 - 0.005 < radius < 0.569


def test_automatic_threshold_ignores_thin_fog():
    field = AnalyticField(sphere(0.5))
    density = field.density
    field.density = lambda p: density(p) + 0.3  # type: ignore[method-assign]
    grid = sample_grid(field, 48)
    mesh = extract_surface(field, grid, automatic_threshold(grid))
    assert mesh.volume == pytest.approx(4 / 3 * math.pi * 0.5**3, rel=0.02)


def test_an_empty_field_is_an_error_with_range_and_setting():
    grid = sample_grid(AnalyticField(lambda p: torch.full((len(p),), -1.0), peak=0.01), 16)
    with pytest.raises(ValueError, match=r"0\.01.*exporter\.threshold"):
        automatic_threshold(grid)


def test_a_threshold_above_all_densities_is_an_error_with_range_and_setting():
    field = AnalyticField(sphere(0.5), peak=40.0)
    with pytest.raises(ValueError, match=r"exporter\.threshold is 50.*\[0, 40\]"):
        extract_surface(field, sample_grid(field, 16), 50.0)
    with pytest.raises(ValueError, match=r"exporter\.threshold must be positive"):
        extract_surface(field, sample_grid(field, 16), 0.0)


def test_impossible_densities_are_errors():
    nan = AnalyticField(lambda p: torch.where(p[:, 0] > 0.5, torch.nan, -1.0), softness=1.0)
    with pytest.raises(ValueError, match=r"density is not finite at .* points, first at"):
        sample_grid(nan, 16)
    with pytest.raises(ValueError, match=r"\[-3, -3\].*negative"):
        sample_grid(AnalyticField(lambda p: -torch.ones(len(p)), peak=-3.0), 16)
    wrong = AnalyticField(lambda p: torch.zeros(len(p), 1))
    with pytest.raises(ValueError, match="density must have shape"):
        sample_grid(wrong, 16)


def test_chunks_do_not_change_the_result_and_progress_ends_at_one():
    field, seen = AnalyticField(torus(0.5, 0.2), softness=0.05), []
    whole, parts = sample_grid(field, 24), sample_grid(field, 24, chunk=1000, progress=seen.append)
    # Vectorised functions may round the last bit differently at a chunk's end.
    np.testing.assert_allclose(whole.values, parts.values, rtol=1e-6)
    assert seen == sorted(seen) and seen[-1] == 1.0 and len(seen) > 3
    surfaces = [extract_surface(field, whole, 100.0, chunk=chunk) for chunk in (131072, 777)]
    np.testing.assert_array_equal(surfaces[0].faces, surfaces[1].faces)
    np.testing.assert_allclose(surfaces[0].vertices, surfaces[1].vertices, atol=1e-6)

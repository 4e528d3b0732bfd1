"""Mesh operations, atlas and baking."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from shared.export_fields import (
    AnalyticField,
    box,
    difference,
    position_color,
    random_surface_points,
    sample_texture,
    sphere,
    torus,
)

from scoredist3d.export.bake import bake_textures
from scoredist3d.meshes import uv
from scoredist3d.meshes.exportable import query_color
from scoredist3d.meshes.isosurface_extraction import extract_surface, sample_grid
from scoredist3d.meshes.mesh import Mesh, compact, decimate, repair, smooth, topology
from scoredist3d.meshes.texels import rasterize

TETRAHEDRON = Mesh(
    np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]], dtype=np.float32),
    np.array([[0, 2, 1], [0, 1, 3], [0, 3, 2], [1, 2, 3]]),
)


@pytest.fixture(scope="module")
def ball():
    field = AnalyticField(sphere(0.6))
    return extract_surface(field, sample_grid(field, 40), 250.0, refine_steps=6)


@pytest.fixture(scope="module")
def unwrapped(ball):
    mesh, note = uv.unwrap(decimate(ball, 1500), 512)
    assert note == ""
    return mesh


def test_tetrahedron_measures():
    assert TETRAHEDRON.volume == pytest.approx(1 / 6)
    assert TETRAHEDRON.face_areas.sum() == pytest.approx(1.5 + np.sqrt(3) / 2)
    np.testing.assert_allclose(TETRAHEDRON.vertex_normals()[0], -np.ones(3) / np.sqrt(3), atol=1e-6)
    assert topology(TETRAHEDRON).watertight


def test_topology_sees_holes_and_wrong_winding_and_fins():
    faces = TETRAHEDRON.faces
    opened = topology(Mesh(TETRAHEDRON.vertices, faces[:3]))
    assert (opened.boundary_edges, opened.holes, opened.watertight) == (3, 1, False)
    flipped = topology(Mesh(TETRAHEDRON.vertices, np.concatenate([faces[:3], faces[3:, ::-1]])))
    assert (flipped.boundary_edges, flipped.misoriented_edges, flipped.watertight) == (0, 3, False)
    fin = Mesh(np.concatenate([TETRAHEDRON.vertices, [[2, 2, 2]]]), np.concatenate([faces, [[0, 1, 4]]]))
    assert topology(fin).nonmanifold_edges == 1
    two = Mesh(np.concatenate([TETRAHEDRON.vertices] * 2), np.concatenate([faces[:3], faces[:3] + 4]))
    assert (topology(two).components, topology(two).holes) == (2, 2)


def test_compact_removes_unused_vertices_and_degenerate_faces():
    messy = Mesh(
        np.concatenate([[[9, 9, 9]], TETRAHEDRON.vertices]).astype(np.float32),
        np.concatenate([TETRAHEDRON.faces + 1, [[1, 1, 2]]]),
    )
    clean = compact(messy)
    np.testing.assert_array_equal(clean.vertices, TETRAHEDRON.vertices)
    np.testing.assert_array_equal(clean.faces, TETRAHEDRON.faces)


@pytest.mark.parametrize("budget", [300, 2000])
def test_decimation_keeps_budget_closure_and_shape(ball, budget):
    small = decimate(ball, budget)
    assert 0.8 * budget <= len(small.faces) <= budget < len(ball.faces)
    assert topology(small).watertight
    assert small.volume == pytest.approx(ball.volume, rel=0.02)
    assert decimate(small, budget) is small


def test_repair_parts_pinched_walls_and_removes_walls_without_thickness():
    # Two tetrahedra that share an edge (four faces there), and a double-sided triangle on a third edge.
    other = np.array([[0, 0, 0], [-1, 0, 0], [0, -1, 0], [0, 0, 1]], dtype=np.float32)
    vertices = np.concatenate([TETRAHEDRON.vertices, other[1:3], [[2, 2, 2]]]).astype(np.float32)
    second = np.array([0, 4, 5, 3])[TETRAHEDRON.faces]
    flap = np.array([[1, 2, 6], [2, 1, 6]])
    pinched = Mesh(vertices, np.concatenate([TETRAHEDRON.faces, second, flap]))
    assert topology(pinched).nonmanifold_edges == 2
    parted = repair(pinched)
    assert topology(parted).watertight and topology(parted).components == 2
    assert (len(parted.faces), len(parted.vertices)) == (8, 8)
    assert parted.volume == pytest.approx(2 / 6)
    assert repair(TETRAHEDRON).vertices.shape == (4, 3)


def test_repair_pairs_faces_of_opposite_direction_where_the_angles_tie():
    # A second tetrahedron on the edge 0-1, in the same wedge: sorting by angle alone cannot tell whose face is whose.
    vertices = np.concatenate([TETRAHEDRON.vertices, 2 * TETRAHEDRON.vertices[2:]])
    other = np.array([0, 1, 4, 5])[TETRAHEDRON.faces]
    pinched = Mesh(vertices, np.concatenate([TETRAHEDRON.faces, other]))
    assert topology(pinched).nonmanifold_edges == 1
    parted = topology(repair(pinched))
    assert (parted.nonmanifold_edges, parted.misoriented_edges, parted.boundary_edges) == (0, 0, 0)


def test_decimating_thin_noisy_walls_stays_watertight():
    directions = 28.0 * np.random.default_rng(0).standard_normal((64, 3))
    waves = torch.from_numpy(directions.astype(np.float32)).T
    shell = difference(sphere(0.6), sphere(0.56, (0.0, 0.0, 0.1)))
    field = AnalyticField(lambda p: shell(p) + 0.15 * torch.sin(p @ waves).mean(-1), softness=0.02)
    full = extract_surface(field, sample_grid(field, 64), 250.0)
    assert topology(full).watertight
    for budget in (4000, 1000):
        assert topology(decimate(full, budget)).watertight


def test_smoothing_removes_noise_and_keeps_volume(ball):
    rng = np.random.default_rng(0)
    noise = 0.01 * rng.standard_normal(ball.vertices.shape).astype(np.float32)
    noisy = Mesh(ball.vertices + noise, ball.faces)
    smoothed = smooth(noisy, 10)
    deviation = [np.linalg.norm(mesh.vertices, axis=1).std() for mesh in (noisy, smoothed)]
    assert deviation[1] < 0.5 * deviation[0]
    assert smoothed.volume == pytest.approx(ball.volume, rel=0.01)


def overlap_free(mesh, size):
    """Whether no texel center is strictly inside two UV triangles."""
    corners = mesh.uvs[mesh.uv_faces].astype(np.float64) * size
    count = np.zeros((size, size), dtype=int)
    for triangle in corners:
        low, high = np.floor(triangle.min(0)).astype(int), np.ceil(triangle.max(0)).astype(int)
        y, x = np.mgrid[low[1] : high[1], low[0] : high[0]] + 0.5
        edges = []
        for k in range(3):
            p, q = triangle[k], triangle[(k + 1) % 3]
            edges.append((q[0] - p[0]) * (y - p[1]) - (q[1] - p[1]) * (x - p[0]))
        edges = np.stack(edges)
        count[low[1] : high[1], low[0] : high[0]] += (edges > 1e-6).all(0) | (edges < -1e-6).all(0)
    return count.max() <= 1


def test_xatlas_keeps_faces_and_does_not_overlap(ball, unwrapped):
    assert unwrapped.uv_faces.shape == unwrapped.faces.shape
    assert unwrapped.uvs.min() >= 0 and unwrapped.uvs.max() <= 1
    assert overlap_free(unwrapped, 512)
    assert topology(unwrapped).watertight


def test_face_atlas_does_not_overlap_and_refuses_tiny_cells(ball):
    small = decimate(ball, 301)
    assert overlap_free(uv.face_atlas(small, 256), 256)
    with pytest.raises(
        ValueError, match=r"exporter\.texture_size to at least \d+ or exporter\.max_faces to at most \d+"
    ):
        uv.face_atlas(small, 64)


@pytest.mark.parametrize(
    ("worker", "reason"),
    [
        ("import time; time.sleep(3600)", "longer than 0.5 s"),
        ("import sys; sys.exit('no such luck')", "no such luck"),
        ("pass", "exit code 0"),
    ],
)
def test_a_hanging_or_failing_xatlas_falls_back_with_a_note(ball, tmp_path, monkeypatch, caplog, worker, reason):
    script = tmp_path / "worker.py"
    script.write_text(worker)
    monkeypatch.setattr(uv, "_WORKER", script)
    mesh, note = uv.unwrap(decimate(ball, 200), 256, timeout=0.5 if "sleep" in worker else 600)
    assert reason in note and note in caplog.text
    assert mesh.uv_faces.shape == mesh.faces.shape and len(mesh.uvs) == 3 * len(mesh.faces)


def test_the_worker_imports_nothing_of_the_package():
    run = f"runpy.run_path({str(uv._WORKER)!r}, run_name='w')"
    code = f"import runpy, sys; {run}; print('scoredist3d' in sys.modules)"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("atlas", ["xatlas", "faces"])
@pytest.mark.parametrize("shape", ["sphere", "box"])
def test_baked_colors_match_the_field_at_random_surface_points(shape, atlas):
    sdf = {"sphere": sphere(0.6), "box": box((0.5, 0.3, 0.4), (0.05, 0.1, -0.1))}[shape]
    field = AnalyticField(sdf)
    mesh = decimate(extract_surface(field, sample_grid(field, 40), 250.0), 1000)
    mesh = uv.unwrap(mesh, 512)[0] if atlas == "xatlas" else uv.face_atlas(mesh, 512)
    texture = bake_textures(field, mesh, 512).base_color
    points, face, weights = random_surface_points(mesh.vertices, mesh.faces, 20000, np.random.default_rng(1))
    sampled = sample_texture(texture, np.einsum("nk,nkc->nc", weights, mesh.uvs[mesh.uv_faces[face]]))
    expected = 255 * position_color(torch.from_numpy(points)).numpy()
    error = np.abs(sampled - expected)
    # Quantisation alone gives 0.25; the rest is bilinear interpolation and the extrapolation in the gutter.
    assert error.mean() < 0.6
    assert np.quantile(error, 0.999) < 6


def test_seams_hide_under_bilinear_filtering_and_mip_maps(unwrapped):
    """A constant color stays constant: no background texel leaks in at any mip level."""
    field = AnalyticField(sphere(0.6), color=lambda p: p.new_tensor([0.2, 0.4, 0.8]).expand(len(p), 3))
    texture = bake_textures(field, unwrapped, 512).base_color
    assert (texture == np.array([51, 102, 204])).all()


def test_rasterisation_covers_every_texel_once_with_valid_weights(unwrapped):
    texels = rasterize(unwrapped, 256)
    assert len(np.unique(texels.index)) == len(texels.index)
    assert texels.barycentric.min() >= 0
    np.testing.assert_allclose(texels.barycentric.sum(axis=1), 1.0, atol=1e-5)
    uvs = unwrapped.uvs[unwrapped.uv_faces[texels.face]]
    at = np.einsum("nk,nkc->nc", texels.barycentric, uvs) * 256
    center = np.stack([texels.index % 256 + 0.5, 256 - (texels.index // 256 + 0.5)], axis=1)
    distance = np.linalg.norm(at - center, axis=1)
    # UV areas of the charts: centres inside are met exactly, the gutter is what lies around them.
    corners = unwrapped.uvs[unwrapped.uv_faces].astype(np.float64)
    a, b = corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]
    area = 0.5 * np.abs(a[:, 0] * b[:, 1] - a[:, 1] * b[:, 0]).sum() * 256**2
    assert (distance < 1e-3).sum() == pytest.approx(area, rel=0.02)
    assert np.quantile(distance, 0.99) < 3.0


def test_rasterisation_in_passes_is_the_same(unwrapped, monkeypatch):
    whole = rasterize(unwrapped, 256)
    monkeypatch.setattr("scoredist3d.meshes.texels._CANDIDATES_PER_PASS", 5000)
    parts = rasterize(unwrapped, 256)
    np.testing.assert_array_equal(whole.index, parts.index)
    np.testing.assert_array_equal(whole.face, parts.face)


def test_unwrapping_is_required(ball):
    with pytest.raises(ValueError, match="unwrap it first"):
        rasterize(ball, 64)


def test_impossible_colors_are_errors():
    points = np.zeros((4, 3), dtype=np.float32)
    with pytest.raises(ValueError, match="color is not finite"):
        query_color(AnalyticField(torus(0.5, 0.1), color=lambda p: p + torch.nan), points, chunk=2)
    with pytest.raises(ValueError, match=r"base color lies in \[2, 2\].*sigmoid"):
        query_color(AnalyticField(torus(0.5, 0.1), color=lambda p: p + 2), points, chunk=2)

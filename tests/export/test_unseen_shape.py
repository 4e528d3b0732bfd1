"""Surface that no training camera sees becomes flat; everything else stays as it is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from shared.exports import make_exporter
from shared.pbr_shapes import MeshShape, uv_sphere

from scoredist3d.cameras import Cameras
from scoredist3d.data.random_camera import RandomCamera
from scoredist3d.export.unseen_shape import flatten_unseen
from scoredist3d.meshes.mesh import Mesh, topology

RINGS, SECTORS, HALF = 28, 48, 0.5
CAMERAS = RandomCamera(RandomCamera.Config(elevation_range=(-10.0, 60.0))).spread(80)


def can(depth: float, *, bumps: float = 0.0) -> Mesh:
    """Closed cylinder of radius and half height 0.5, whose underside is ``depth`` higher in the middle."""
    radii = np.linspace(0.0, HALF, RINGS + 1)[1:]
    angles = np.arange(SECTORS) * 2 * np.pi / SECTORS
    around = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    dent = depth * np.cos(0.5 * np.pi * radii / HALF)
    levels = [(r, -HALF + d) for r, d in zip(radii, dent, strict=True)]
    levels += [(HALF, z) for z in np.linspace(-HALF, HALF, RINGS + 1)[1:]]
    levels += [(r, HALF) for r in radii[:-1][::-1]]
    rings = [np.column_stack([r * around, np.full(SECTORS, z)]) for r, z in levels]
    for ring, r in zip(rings[: RINGS - 1], radii, strict=False):
        ring[:, 2] += bumps * np.cos(5 * angles) * np.sin(np.pi * r / HALF)
    vertices = np.concatenate([[[0, 0, -HALF + depth]], *rings, [[0, 0, HALF]]]).astype(np.float32)
    faces = []
    for level in range(len(rings) - 1):
        for i in range(SECTORS):
            a, b = 1 + level * SECTORS + i, 1 + level * SECTORS + (i + 1) % SECTORS
            faces += [(a, b, b + SECTORS), (a, b + SECTORS, a + SECTORS)]
    last, top = 1 + (len(rings) - 1) * SECTORS, len(vertices) - 1
    for i in range(SECTORS):
        faces += [(0, 1 + (i + 1) % SECTORS, 1 + i), (top, last + i, last + (i + 1) % SECTORS)]
    return Mesh(vertices, np.array(faces, dtype=np.int32))


def narrowed(mesh: Mesh) -> Mesh:
    """A can whose wall leans inwards below, so that it bends towards the underside."""
    x, y, z = mesh.vertices.T
    factor = 1.0 - 0.36 * np.clip((-0.2 - z) / 0.3, 0.0, 1.0)
    return Mesh(np.stack([factor * x, factor * y, z], axis=1).astype(np.float32), mesh.faces)


def inner(mesh: Mesh) -> np.ndarray:
    """Vertices of the underside whose neighbors belong to the underside as well."""
    return np.arange(len(mesh.vertices)) < 1 + (RINGS - 1) * SECTORS


def joined(*meshes: Mesh) -> Mesh:
    starts = np.cumsum([0, *(len(mesh.vertices) for mesh in meshes)])
    vertices = np.concatenate([mesh.vertices for mesh in meshes])
    return Mesh(vertices, np.concatenate([m.faces + s for m, s in zip(meshes, starts, strict=False)]).astype(np.int32))


def test_the_test_object_is_closed_and_oriented() -> None:
    assert topology(can(0.0)).watertight
    assert can(0.0).volume == pytest.approx(np.pi / 4, rel=0.01)


@pytest.mark.parametrize(("depth", "bumps"), [(0.15, 0.0), (0.1, 0.03), (-0.02, 0.0), (-0.04, 0.01)])
def test_an_uneven_underside_becomes_flat_and_seen_vertices_stay(depth: float, bumps: float) -> None:
    mesh = can(depth, bumps=bumps)
    flat = flatten_unseen(mesh, CAMERAS)
    below = inner(mesh)
    assert np.abs(mesh.vertices[below, 2] + HALF).max() > 0.015
    assert np.abs(flat.vertices[below, 2] + HALF).max() < 0.01
    assert np.array_equal(flat.vertices[~below], mesh.vertices[~below])
    assert flat.faces is mesh.faces and topology(flat).watertight
    assert flat.volume == pytest.approx(np.pi / 4, rel=0.02)


@pytest.mark.parametrize("mesh", [can(-0.2), narrowed(can(-0.06)), uv_sphere(32, 64)])
def test_a_round_underside_stays(mesh: Mesh) -> None:
    """The first bulges as much as half a ball; the walls of the others bend towards the underside."""
    assert flatten_unseen(mesh, CAMERAS) is mesh


def test_dents_below_leaning_walls_become_flat() -> None:
    mesh = narrowed(can(0.1))
    below = inner(mesh)
    assert np.abs(flatten_unseen(mesh, CAMERAS).vertices[below, 2] + HALF).max() < 0.01


def test_a_region_that_would_move_far_stays() -> None:
    mesh = can(0.3)
    assert flatten_unseen(mesh, CAMERAS) is mesh


def test_what_is_seen_does_not_change() -> None:
    """Cameras below the can see its underside."""
    mesh = can(0.15)
    below = RandomCamera(RandomCamera.Config(elevation_range=(-60.0, 60.0))).spread(80)
    assert flatten_unseen(mesh, below) is mesh
    assert flatten_unseen(can(0.0), below).volume == pytest.approx(np.pi / 4, rel=0.01)


def test_vertices_at_the_same_position_move_together() -> None:
    """As at the seams of texture coordinates."""
    mesh = can(0.15)
    split = Mesh(mesh.vertices[mesh.faces.ravel()], np.arange(mesh.faces.size, dtype=np.int32).reshape(-1, 3))
    one, other = flatten_unseen(mesh, CAMERAS), flatten_unseen(split, CAMERAS)
    np.testing.assert_allclose(other.vertices, one.vertices[mesh.faces.ravel()], atol=1e-5)


def test_a_region_that_would_pass_through_another_part_stays() -> None:
    """A small ball in the dent of the underside, which the flat underside would cut."""
    can_only = can(0.17)
    ball = uv_sphere()
    scale = 0.1 / np.abs(ball.vertices).max()
    center = np.array([0.0, 0.0, -HALF + 0.05], dtype=np.float32)
    both = joined(can_only, Mesh((scale * ball.vertices + center).astype(np.float32), ball.faces))
    flat = flatten_unseen(both, CAMERAS)
    assert np.array_equal(flat.vertices[: len(can_only.vertices)], can_only.vertices)


def test_a_component_that_no_camera_sees_stays() -> None:
    """It has no seen neighbor that could tell where it belongs."""
    ball = uv_sphere()
    small = (0.1 / np.abs(ball.vertices).max() * ball.vertices).astype(np.float32)
    hidden = Mesh(small + np.float32([0.35, 0.0, 0.0]), ball.faces[:, ::-1].copy())
    both = joined(can(0.0), hidden)
    count = len(hidden.vertices)
    assert np.array_equal(flatten_unseen(both, CAMERAS).vertices[-count:], both.vertices[-count:])


def test_cameras_that_see_nothing_change_nothing() -> None:
    mesh = can(0.15)
    pose = torch.eye(4)
    pose[2, 3] = -9.0  # below the object, looking down
    away = Cameras.from_poses(pose[None], CAMERAS.fovy[:1], 64, 64)
    assert flatten_unseen(mesh, away) is mesh


class SeenFromAbove(MeshShape):
    def training_cameras(self, count: int) -> Cameras | None:
        return CAMERAS[torch.arange(count) % len(CAMERAS)]


@pytest.mark.parametrize("option", ["auto", True, False])
def test_the_exporter_flattens_unless_the_option_is_false(option: str | bool, tmp_path: Path) -> None:
    mesh = can(0.15)
    exporter = make_exporter(formats=["stl"], flatten_unseen=option, max_faces=len(mesh.faces), check=False)
    (file,) = exporter.export(SeenFromAbove(mesh), tmp_path, "can").paths
    import trimesh

    volume = trimesh.load(file).volume
    expected = np.pi / 4 if option else mesh.volume
    assert volume == pytest.approx(expected, rel=0.02)
    assert abs(mesh.volume - np.pi / 4) > 0.03

"""Genus and dihedral angles of meshes with known values."""

from __future__ import annotations

import math

import numpy as np
import pytest
import trimesh
from shared.surface_scenes import cube, icosphere

from scoredist3d.meshes.mesh import Mesh
from scoredist3d.meshes.quality import dihedrals, genus


def torus() -> Mesh:
    made = trimesh.creation.torus(major_radius=1.0, minor_radius=0.3, major_sections=12, minor_sections=8)
    return Mesh(np.asarray(made.vertices, np.float32), np.asarray(made.faces, np.int64))


def together(*meshes: Mesh) -> Mesh:
    starts = np.cumsum([0, *(len(mesh.vertices) for mesh in meshes)])
    faces = [mesh.faces + start for mesh, start in zip(meshes, starts, strict=False)]
    return Mesh(np.concatenate([mesh.vertices for mesh in meshes]), np.concatenate(faces))


def opened(mesh: Mesh, count: int) -> Mesh:
    """The mesh without its first faces."""
    return Mesh(mesh.vertices, mesh.faces[count:])


@pytest.mark.parametrize(
    ("mesh", "handles"),
    [
        (cube(), 0),
        (torus(), 1),
        (together(torus(), cube()), 1),
        (together(torus(), torus(), cube()), 2),
        (opened(cube(), 2), 0),  # a disk
        (opened(torus(), 1), 1),
        (opened(cube(), 10), 0),  # a flat square
    ],
)
def test_genus_counts_the_handles_of_all_components(mesh: Mesh, handles: int) -> None:
    assert genus(mesh) == handles


def test_components_that_touch_count_as_separate() -> None:
    first, second = torus(), torus()
    both = together(first, second)
    at_a_vertex = both.faces.copy()
    at_a_vertex[at_a_vertex == len(first.vertices)] = 0
    assert genus(Mesh(both.vertices, at_a_vertex)) == 2
    # Two tetrahedra that share an edge, which then has four faces.
    points = np.array([[0, 0, 0], [0, 0, 1], [1, 1, 0], [1, -1, 0], [-1, 1, 0], [-1, -1, 0]], np.float32)
    tetrahedra = np.array([[0, 1, 2], [0, 2, 3], [0, 3, 1], [1, 3, 2], [0, 1, 5], [0, 5, 4], [0, 4, 1], [1, 4, 5]])
    assert genus(Mesh(points, tetrahedra)) == 0


def test_a_cube_has_right_angles_at_its_edges_and_flat_diagonals() -> None:
    found, edges, diagonals = dihedrals(cube(0.5)), 12.0, 6.0 * math.sqrt(2.0)
    assert len(found.angles_deg) == 18
    assert found.mean_deg == pytest.approx(90.0 * edges / (edges + diagonals))
    assert found.share_above(45.0) == pytest.approx(edges / (edges + diagonals))
    assert found.share_above(90.5) == 0.0


def test_all_angles_of_an_icosahedron_are_equal_and_do_not_depend_on_its_size() -> None:
    for radius in (1e-3, 1.0):
        found = dihedrals(icosphere(radius, 0))
        wanted = math.degrees(math.acos(math.sqrt(5.0) / 3.0))
        assert found.angles_deg == pytest.approx(np.full(30, wanted), abs=1e-4)  # vertices are float32


def test_angles_do_not_depend_on_the_winding_and_the_order_of_the_faces() -> None:
    mesh = cube()
    assert dihedrals(Mesh(mesh.vertices, mesh.faces[::-1, ::-1])).mean_deg == pytest.approx(dihedrals(mesh).mean_deg)


def test_borders_and_degenerate_faces_have_no_angle() -> None:
    square = Mesh(
        np.array([[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0], [0.5, 0, 0]], np.float32),
        np.array([[0, 1, 2], [0, 2, 3], [1, 0, 4]]),
    )
    found = dihedrals(square)
    assert found.lengths == pytest.approx([math.sqrt(2.0)]) and found.mean_deg == 0.0
    alone = dihedrals(Mesh(square.vertices, square.faces[:1]))
    assert (alone.mean_deg, alone.share_above(45.0)) == (0.0, 0.0)

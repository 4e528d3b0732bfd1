"""Subdivision of meshes, and interpolation on their surfaces."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from shared.pbr_shapes import uv_sphere
from shared.surface_scenes import cube

from scoredist3d.meshes.lattice import diffuse, subdivide
from scoredist3d.meshes.mesh import Mesh

QUAD = Mesh(np.array([[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0]], np.float32), np.array([[0, 1, 2], [0, 2, 3]]))


def random_points(mesh: Mesh, count: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    return generator.integers(len(mesh.faces), size=count), generator.dirichlet((1, 1, 1), count).astype(np.float32)


@pytest.mark.parametrize("longest", [0.05, 0.3, 10.0])
def test_points_are_located_in_the_triangle_that_contains_them(longest: float) -> None:
    mesh = cube()
    lattice = subdivide(mesh, longest)
    corners = lattice.nodes[lattice.triangles]
    edges = np.linalg.norm(corners - np.roll(corners, 1, axis=1), axis=2)
    assert edges.max() <= longest and (longest < 10 or len(lattice.face) == len(mesh.faces))
    face, barycentric = random_points(mesh, 500)
    triangle, weights = lattice.locate(face, barycentric)
    assert (lattice.face[triangle] == face).all() and weights.min() >= 0
    found = np.einsum("mk,mkc->mc", weights, corners[triangle])
    expected = np.einsum("mk,mkc->mc", barycentric, mesh.vertices[mesh.faces[face]])
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_corners_and_edges_of_faces_are_located_as_well() -> None:
    lattice = subdivide(QUAD, 0.2)
    face = np.zeros(4, dtype=np.int64)
    barycentric = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [0.5, 0.5, 0]], np.float32)
    triangle, weights = lattice.locate(face, barycentric)
    found = np.einsum("mk,mkc->mc", weights, lattice.nodes[lattice.triangles[triangle]])
    np.testing.assert_allclose(found, [[0, 0, 0], [1, 0, 0], [1, 1, 0], [0.5, 0, 0]], atol=1e-6)


def test_triangles_keep_the_winding_of_their_faces_and_share_nodes() -> None:
    lattice = subdivide(cube(), 0.3)
    a, b, c = (lattice.nodes[lattice.triangles[:, k]] for k in range(3))
    assert (np.einsum("tc,tc->t", np.cross(b - a, c - a), a) > 0).all()
    edges = np.sort(lattice.triangles[:, [0, 1, 1, 2, 2, 0]].reshape(-1, 2), axis=1)
    assert (np.unique(edges, axis=0, return_counts=True)[1] == 2).all()
    split = dataclasses.replace(
        cube(), vertices=cube().vertices[cube().faces].reshape(-1, 3), faces=np.arange(36).reshape(-1, 3)
    )
    assert len(subdivide(split, 0.3).nodes) == len(lattice.nodes)


def test_diffused_values_are_linear_between_two_opposite_sides() -> None:
    lattice = subdivide(QUAD, 0.1)
    x = lattice.nodes[:, 0]
    found = diffuse(lattice, (x < 1e-6) | (x > 1 - 1e-6), np.stack([x, 2 - x], axis=1), 0 * x)
    np.testing.assert_allclose(found, np.stack([x, 2 - x], axis=1), atol=0.02)
    assert found.min() >= 0 and found.max() <= 2


def test_a_part_without_known_values_has_those_of_the_nearest_node() -> None:
    ball = uv_sphere(8, 16, 0.2)
    vertices = np.concatenate([ball.vertices + np.array([shift, 0, 0]) for shift in (-0.6, 0.0, 0.6)]).astype(
        np.float32
    )
    faces = np.concatenate([ball.faces + number * len(ball.vertices) for number in range(3)])
    lattice = subdivide(Mesh(vertices, faces), 1.0)
    side = np.rint(lattice.nodes[:, 0] / 0.6)
    fixed = (side != 0) & (lattice.nodes[:, 2] > 0)
    found = diffuse(lattice, fixed, side[:, None], np.zeros(len(side)))[:, 0]
    np.testing.assert_allclose(found[side != 0], side[side != 0], atol=1e-5)
    assert set(found[side == 0].tolist()) == {-1.0, 1.0}


def test_own_values_are_kept_beyond_the_smoothing_length() -> None:
    """Between two sides with the value 1, and with own values of 0, the solution is a hyperbolic cosine."""
    lattice, length = subdivide(QUAD, 0.03), 0.2
    x = lattice.nodes[:, 0].astype(np.float64)
    ends = (x < 1e-6) | (x > 1 - 1e-6)
    found = diffuse(lattice, ends, ends[:, None].astype(float), np.full(len(x), length**-2))[:, 0]
    expected = np.cosh((x - 0.5) / length) / np.cosh(0.5 / length)
    np.testing.assert_allclose(found, expected, atol=0.02)

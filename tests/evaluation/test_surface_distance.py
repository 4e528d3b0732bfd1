"""Distances between surfaces compared with closed forms, and points sampled on surfaces."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import trimesh

from scoredist3d.evaluation.surface_distance import chamfer_distance, normal_angle_deg, visible_points
from scoredist3d.meshes.mesh import Mesh
from scoredist3d.meshes.sampling import mesh_points
from scoredist3d.procedural import sample_objects


def ball(radius: float) -> Mesh:
    found = trimesh.creation.icosphere(subdivisions=4, radius=radius)
    return Mesh(np.asarray(found.vertices, np.float32), np.asarray(found.faces, np.int64))


def test_two_balls_are_their_difference_of_radii_apart() -> None:
    rng = np.random.default_rng(0)
    first, second = (mesh_points(ball(radius), 20000, rng) for radius in (0.5, 0.7))
    assert chamfer_distance(first, second) == pytest.approx(0.2, abs=2e-3)
    assert chamfer_distance(first, second) == chamfer_distance(second, first)
    assert chamfer_distance(first, first) == 0.0


def square(angle_deg: float) -> Mesh:
    """A square in the plane z = 0 that is turned about x."""
    y, z = np.cos(np.deg2rad(angle_deg)), np.sin(np.deg2rad(angle_deg))
    corners = [[-1, -y, -z], [1, -y, -z], [1, y, z], [-1, y, z]]
    return Mesh(np.array(corners, np.float32), np.array([[0, 1, 2], [0, 2, 3]]))


def test_normals_of_turned_squares_differ_by_the_angle() -> None:
    assert normal_angle_deg(square(0), square(0)) == pytest.approx(0.0, abs=1e-3)
    assert normal_angle_deg(square(0), square(30)) == pytest.approx(30.0, abs=1e-3)
    turned_over = Mesh(square(0).vertices, square(0).faces[:, ::-1].copy())
    assert normal_angle_deg(square(0), turned_over) == pytest.approx(180.0, abs=1e-3)


def test_normals_of_concentric_balls_agree() -> None:
    # The faces of an icosphere of 4 subdivisions are 3 degrees wide; points near their edges find the next face.
    assert normal_angle_deg(ball(0.5), ball(0.5)) == pytest.approx(0.0, abs=0.02)
    assert normal_angle_deg(ball(0.5), ball(0.7)) < 0.5


def test_points_on_a_mesh_are_spread_by_area() -> None:
    big_and_small = Mesh(
        np.array([[0, 0, 0], [3, 0, 0], [0, 3, 0], [0, 0, 1], [1, 0, 1], [0, 1, 1]], np.float32),
        np.array([[0, 1, 2], [3, 4, 5]]),
    )
    points = mesh_points(big_and_small, 20000, np.random.default_rng(1))
    assert (points[:, 2] == 0).mean() == pytest.approx(0.9, abs=0.01)
    assert points[points[:, 2] == 0].mean(axis=0) == pytest.approx([1.0, 1.0, 0.0], abs=0.03)


def test_visible_points_lie_on_the_object() -> None:
    object = sample_objects(1, torch.Generator().manual_seed(0))
    points = visible_points(object, views=6, size=16)
    assert len(points) > 50
    outward = 2e-3 * torch.nn.functional.normalize(
        torch.randn(8, len(points), 3, generator=torch.Generator().manual_seed(1)), dim=-1
    )
    around = object.occupancy((points + outward).reshape(1, -1, 3)).reshape(8, -1)
    # Some of eight small steps lead inside and some outside.
    assert (around.any(0) & ~around.all(0)).float().mean() > 0.97

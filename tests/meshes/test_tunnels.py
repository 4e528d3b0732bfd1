"""Tiny tunnels are filled, and the surface around them becomes level; handles, struts and large holes stay."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from shared.export_fields import Sdf, box, difference, sphere, torus, union
from shared.tunnel_scenes import OUTER, WALL, bowl, frame, plate, ring, rod, surface, without

from scoredist3d.meshes import tunnels
from scoredist3d.meshes.mesh import Mesh, separate_sheets, topology
from scoredist3d.meshes.quality import genus
from scoredist3d.meshes.tunnels import cut_along, fill_tunnels
from scoredist3d.ops.mesh.distance import closest_point

GIRTH = 0.3
"""Longest loop around a tunnel that is filled; a round hole of radius 0.03 has 0.2, the edges around it have more."""
PINHOLES = ((0.0, 0.0, 0.03), (0.2, 0.1, 0.03), (-0.3, 0.3, 0.025))
MANY = [(0.15 * x, 0.15 * y, 0.03) for x in range(-3, 4) for y in range(-3, 3)]
BOWL_HOLE = rod(0.1, 0.0, 0.03)


def tiny_handle(thickness: float) -> Mesh:
    """A torus with a tiny handle on its top."""
    return surface(union(torus(0.6, 0.2), ring(0.05, thickness, (0.6, 0.0, 0.2), axis=1)))


def check_manifold(mesh: Mesh) -> None:
    """The mesh is a closed, consistently oriented 2-manifold without unused vertices and degenerate faces."""
    assert topology(mesh).watertight
    assert len(separate_sheets(mesh).vertices) == len(mesh.vertices) == len(np.unique(mesh.faces))
    assert (np.diff(np.sort(mesh.faces, axis=1), axis=1) > 0).all() and mesh.face_areas.min() > 0


def check_stays(mesh: Mesh, longest: float = GIRTH) -> None:
    filled, found = fill_tunnels(mesh, longest)
    assert filled is mesh and found == 0


def colors_at(vertices: np.ndarray) -> np.ndarray:
    """Colors (V, 3) uint8 that depend on the positions (V, 3)."""
    return (127.5 + 100.0 * np.sin(5.0 * vertices)).astype(np.uint8)


def distance(mesh: Mesh, points: np.ndarray) -> np.ndarray:
    """Distances (N,) of points (N, 3) from a mesh."""
    there = torch.from_numpy(points.astype(np.float32))
    closest = closest_point(there, torch.from_numpy(mesh.vertices), torch.from_numpy(mesh.faces)).points
    found: np.ndarray = (closest - there).norm(dim=1).numpy()
    return found


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("resolution", [64, 96])
def test_pinholes_of_a_plate_are_filled_and_the_plate_is_flat(count: int, resolution: int) -> None:
    mesh, whole = surface(plate(*PINHOLES[:count]), resolution), surface(plate(), resolution)
    assert genus(mesh) == count
    filled, found = fill_tunnels(mesh, GIRTH)
    assert found == count and genus(filled) == 0 and topology(filled).components == 1
    check_manifold(filled)
    assert mesh.volume < filled.volume == pytest.approx(whole.volume, rel=2e-3)
    spacing = 2.0 / resolution
    assert distance(whole, filled.vertices).max() < 0.1 * spacing


def test_a_pinhole_of_a_curved_wall_is_filled_level_with_both_sides() -> None:
    """The loop is at one mouth of the tunnel; the other side must be smoothed further than this one."""
    mesh = surface(bowl(BOWL_HOLE))
    assert genus(mesh) == 1
    filled, found = fill_tunnels(mesh, GIRTH)
    assert found == 1 and genus(filled) == 0
    check_manifold(filled)
    near = np.linalg.norm(filled.vertices[:, :2] - [0.1, 0.0], axis=1) < 0.1
    height = np.linalg.norm(filled.vertices[near], axis=1)
    assert near.sum() > 50
    assert np.minimum(np.abs(height - OUTER), np.abs(height - OUTER + WALL)).max() < 0.006


LARGE = ((-0.35, -0.35, 0.1), (0.35, -0.35, 0.1), (-0.35, 0.35, 0.1), (0.35, 0.35, 0.1), (0.0, 0.0, 0.1))
EIGHT = union(ring(0.3, 0.05, (0.33, 0.0, 0.0), axis=2), ring(0.3, 0.05, (-0.33, 0.0, 0.0), axis=2))


@pytest.mark.parametrize(
    ("sdf", "handles"),
    [
        pytest.param(torus(0.6, 0.2), 1, id="torus"),
        pytest.param(torus(0.6, 0.03), 1, id="torus with a thin tube, whose loops are short"),
        pytest.param(plate(*LARGE), 5, id="large holes"),
        pytest.param(frame(0.03), 5, id="thin struts"),
        pytest.param(EIGHT, 2, id="figure eight"),
        pytest.param(bowl(rod(0.1, 0.0, 0.1)), 1, id="bowl with a large hole"),
        pytest.param(plate(), 0, id="plate"),
    ],
)
def test_handles_struts_and_large_holes_stay(sdf: Sdf, handles: int) -> None:
    mesh = surface(sdf, 80)
    assert genus(mesh) == handles
    check_stays(mesh)


@pytest.mark.parametrize("thickness", [0.02, 0.03])
def test_a_tiny_handle_is_filled_and_the_torus_stays(thickness: float) -> None:
    mesh = tiny_handle(thickness)
    assert genus(mesh) == 2
    filled, found = fill_tunnels(mesh, GIRTH)
    assert found == 1 and genus(filled) == 1 and topology(filled).components == 1
    check_manifold(filled)
    assert distance(mesh, filled.vertices).max() < 0.05
    untouched = np.linalg.norm(mesh.vertices - [0.6, 0.0, 0.2], axis=1) > 0.3
    assert np.array_equal(filled.vertices[: len(mesh.vertices)][untouched], mesh.vertices[untouched])


def test_one_of_two_components_has_a_tunnel() -> None:
    left, right = box((0.2, 0.3, 0.1), (-0.4, 0.0, 0.0)), box((0.2, 0.3, 0.1), (0.4, 0.0, 0.0))
    mesh = surface(union(without(left, [rod(-0.4, 0.0, 0.03)]), right))
    assert (genus(mesh), topology(mesh).components) == (1, 2)
    filled, found = fill_tunnels(mesh, GIRTH)
    assert (found, genus(filled), topology(filled).components) == (1, 0, 2)
    check_manifold(filled)
    right_side = mesh.vertices[:, 0] > 0
    assert np.array_equal(filled.vertices[: len(mesh.vertices)][right_side], mesh.vertices[right_side])


def test_a_tunnel_with_a_rod_in_it_stays() -> None:
    """As an axle in a wheel: another component fills most of the space in the loop."""
    mesh, axle = surface(plate((0.0, 0.0, 0.04)), 80), surface(rod(0.0, 0.0, 0.02, 0.4), 128)
    both = Mesh(
        np.concatenate([mesh.vertices, axle.vertices]), np.concatenate([mesh.faces, axle.faces + len(mesh.vertices)])
    )
    assert genus(axle) == 0 and fill_tunnels(mesh, 0.4)[1] == 1
    check_stays(both, 0.4)


def test_many_tunnels_have_more_generators_than_bits() -> None:
    mesh = surface(plate(*MANY), 80)
    assert genus(mesh) == len(MANY) == 42
    filled, found = fill_tunnels(mesh, GIRTH)
    assert found == 42 and genus(filled) == 0
    check_manifold(filled)
    assert filled.volume == pytest.approx(surface(plate(), 80).volume, rel=0.01)


def test_tunnels_that_are_close_to_each_other_are_filled_one_after_the_other() -> None:
    """The smoothed surroundings of the first one contain the loop around the second one."""
    thin = box((0.6, 0.6, 0.02))
    mesh = surface(without(thin, [rod(-0.06, 0.0, 0.04), rod(0.06, 0.0, 0.04)]), 96)
    assert genus(mesh) == 2
    filled, found = fill_tunnels(mesh, 0.4)
    assert found == 2 and genus(filled) == 0
    check_manifold(filled)


def test_the_last_opening_of_a_cavity_stays() -> None:
    """A hollow ball with four pinholes has genus 3. Without the last one, its inner side would be a component."""
    holes = [rod(x, 0.0, 0.03, tilt=-2.0 * x) for x in (-0.3, 0.3)]
    mesh = surface(without(difference(sphere(OUTER), sphere(OUTER - WALL)), holes), 80)
    assert genus(mesh) == 3
    filled, found = fill_tunnels(mesh, GIRTH)
    assert (found, genus(filled), topology(filled).components) == (3, 0, 1)
    check_manifold(filled)


def test_a_surface_with_too_many_handles_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    mesh = surface(plate(*PINHOLES))
    monkeypatch.setattr(tunnels, "_MOST_HANDLES", 2)
    check_stays(mesh)
    monkeypatch.setattr(tunnels, "_MOST_HANDLES", 3)
    assert fill_tunnels(mesh, GIRTH)[1] == 3


def test_the_length_decides() -> None:
    mesh = surface(plate((0.3, 0.3, 0.03), (-0.3, -0.3, 0.06)), 80)
    assert [genus(fill_tunnels(mesh, longest)[0]) for longest in (0.0, 0.1, 0.3, 0.6)] == [2, 2, 1, 0]


def test_what_is_not_sound_is_tried_with_less_smoothing_and_then_left(monkeypatch: pytest.MonkeyPatch) -> None:
    mesh = surface(plate(PINHOLES[0]))
    tried = []

    def unsound(filled: Mesh, loops: list, moved: dict[int, np.ndarray]) -> list[int]:
        tried.extend(len(vertices) for vertices in moved.values())
        return list(moved)

    monkeypatch.setattr(tunnels, "_unsound", unsound)
    check_stays(mesh)
    assert len(tried) == 3 and tried[0] > tried[1] >= tried[2] > 0


def test_a_filling_that_changes_the_volume_much_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    mesh = surface(plate(PINHOLES[0]))
    monkeypatch.setattr(tunnels, "_LEAST_VOLUME", 0.0)
    monkeypatch.setattr(tunnels, "_MOST_VOLUME", 0.0)
    check_stays(mesh)


def test_a_filling_that_meets_another_surface_is_found() -> None:
    """The upper side of a filled hole is moved through the lower one."""
    mesh = surface(plate(PINHOLES[0]))
    (loop,) = tunnels.short_loops(mesh, GIRTH)
    filled, moved = tunnels._attempt(mesh, [loop], [0])
    assert tunnels._unsound(filled, [loop], moved) == []
    sunk = filled.vertices.copy()
    sunk[moved[0], 2] *= -1.0
    assert tunnels._unsound(replace(filled, vertices=sunk), [loop], moved) == [0]


def test_open_and_inverted_surfaces_stay() -> None:
    mesh = surface(plate(PINHOLES[0]))
    opened, inverted = replace(mesh, faces=mesh.faces[1:]), replace(mesh, faces=mesh.faces[:, ::-1].copy())
    empty = Mesh(np.zeros((0, 3), np.float32), np.zeros((0, 3), np.int64))
    for other in (opened, inverted, empty):
        check_stays(other)


def test_sheets_that_touch_in_a_vertex_are_separate_and_keep_their_colors() -> None:
    mesh = surface(plate(PINHOLES[0]))
    top, bottom = int(mesh.vertices[:, 2].argmax()), int(mesh.vertices[:, 2].argmin())
    copy = mesh.faces + len(mesh.vertices)
    copy[mesh.faces == bottom] = top  # a second plate stands with one vertex on the first
    vertices = np.concatenate([mesh.vertices, mesh.vertices + mesh.vertices[top] - mesh.vertices[bottom]])
    both = Mesh(vertices, np.concatenate([mesh.faces, copy]), vertex_colors=colors_at(vertices), authored=True)
    assert topology(both).components == 1
    filled, found = fill_tunnels(both, GIRTH)
    assert found == 2 and genus(filled) == 0 and filled.authored and topology(filled).components == 2
    check_manifold(filled)
    assert filled.vertex_colors is not None and filled.vertex_colors.shape == filled.vertices.shape
    known = {tuple(place) for place in vertices.tolist()}
    stayed = np.array([tuple(place) in known for place in filled.vertices.tolist()])
    assert stayed.sum() > 0.9 * len(vertices)
    assert np.array_equal(filled.vertex_colors[stayed], colors_at(filled.vertices)[stayed])
    assert filled.vertex_colors.min() >= 27  # the new ones are means of others


def test_cutting_along_a_loop_separates_its_sides() -> None:
    """A tetrahedron, cut along the edges of one face: this face is to the left."""
    vertices = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]], dtype=np.float32)
    mesh = Mesh(vertices, np.array([[0, 2, 1], [0, 1, 3], [0, 3, 2], [1, 2, 3]]))
    cut = cut_along(mesh, np.array([1, 2, 3]))
    assert cut.faces.tolist() == [[0, 2, 1], [0, 1, 3], [0, 3, 2], [4, 5, 6]]
    assert np.array_equal(cut.vertices[4:], vertices[1:])
    cut = cut_along(mesh, np.array([3, 2, 1]))
    assert cut.faces.tolist() == [[0, 5, 6], [0, 6, 4], [0, 4, 5], [1, 2, 3]]

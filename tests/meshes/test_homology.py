"""Short non-separating loops against closed forms and a slow search that removes edges and counts components."""

from __future__ import annotations

import heapq
import math

import numpy as np
import pytest
import trimesh
from shared.surface_scenes import cube
from shared.tunnel_scenes import plate, surface

from scoredist3d.meshes import homology
from scoredist3d.meshes.homology import SurfaceLoop, edge_signatures, short_loops
from scoredist3d.meshes.mesh import Mesh
from scoredist3d.meshes.quality import genus

HOLES = [(0.2 * x, 0.2 * y, 0.05) for x in range(-2, 3) for y in range(-2, 3)]


def torus(major: float, minor: float, around: int = 24, across: int = 12) -> Mesh:
    made = trimesh.creation.torus(major_radius=major, minor_radius=minor, major_sections=around, minor_sections=across)
    made.merge_vertices()
    return Mesh(np.asarray(made.vertices, np.float32), np.asarray(made.faces, np.int64))


def joined(*meshes: Mesh) -> Mesh:
    starts = np.cumsum([0, *(len(mesh.vertices) for mesh in meshes)])
    faces = [mesh.faces + start for mesh, start in zip(meshes, starts, strict=False)]
    return Mesh(np.concatenate([mesh.vertices for mesh in meshes]), np.concatenate(faces))


def walk(signatures: dict[tuple[int, int], int], loop: np.ndarray) -> int:
    """Exclusive or of the signatures of the edges of a loop."""
    combined = 0
    for a, b in zip(loop.tolist(), np.roll(loop, -1).tolist(), strict=True):
        combined ^= signatures[min(a, b), max(a, b)]
    return combined


def rank(codes: list[int]) -> int:
    """Rank of bit vectors over the field of two elements."""
    basis: list[int] = []
    for code in codes:
        for other in basis:
            code = min(code, code ^ other)
        basis += [code] if code else []
    return len(basis)


def separates(mesh: Mesh, loop: list[int]) -> bool:
    """Whether the faces fall into more components without the edges of a loop; a flood over the faces tells."""
    cut = {frozenset(pair) for pair in zip(loop, loop[1:] + loop[:1], strict=True)}
    by_edge: dict[frozenset[int], list[int]] = {}
    for face, corners in enumerate(mesh.faces.tolist()):
        for k in range(3):
            by_edge.setdefault(frozenset((corners[k], corners[k - 1])), []).append(face)
    near: list[list[int]] = [[] for _ in mesh.faces]
    for edge, (one, other) in by_edge.items():
        if edge not in cut:
            near[one].append(other)
            near[other].append(one)
    seen, stack = {0}, [0]
    while stack:
        for face in near[stack.pop()]:
            if face not in seen:
                seen.add(face)
                stack.append(face)
    return len(seen) < len(mesh.faces)


def shortest_by_removal(mesh: Mesh) -> float:
    """Length of the shortest non-separating loop: the shortest loops through each vertex are cut until one is found."""
    pairs = {frozenset((a, b)) for face in mesh.faces.tolist() for a, b in zip(face, face[1:] + face[:1], strict=True)}
    lengths = {pair: float(np.linalg.norm(np.subtract(*mesh.vertices[list(pair)].astype(float)))) for pair in pairs}
    near: dict[int, list[tuple[int, float]]] = {}
    for pair, length in lengths.items():
        a, b = pair
        near.setdefault(a, []).append((b, length))
        near.setdefault(b, []).append((a, length))
    best = math.inf
    for start in near:
        reached, paths, queue = {start: 0.0}, {start: [start]}, [(0.0, start)]
        while queue:
            distance, vertex = heapq.heappop(queue)
            for other, length in near[vertex] if distance <= reached[vertex] else []:
                if distance + length < reached.get(other, math.inf):
                    reached[other], paths[other] = distance + length, [*paths[vertex], other]
                    heapq.heappush(queue, (reached[other], other))
        for pair, length in lengths.items():
            a, b = pair
            simple = set(paths[a]) & set(paths[b]) == {start} and b not in paths[a] and a not in paths[b]
            total = reached[a] + reached[b] + length
            if simple and total < best and not separates(mesh, paths[a] + paths[b][:0:-1]):
                best = total
    return best


@pytest.mark.parametrize(
    ("mesh", "handles"),
    [(cube(), 0), (torus(1.0, 0.3), 1), (joined(torus(1.0, 0.3), cube(), torus(0.6, 0.2)), 2)],
)
def test_signatures_are_trivial_around_faces_and_independent_on_the_generators(mesh: Mesh, handles: int) -> None:
    check_signatures(mesh, handles)


def test_signatures_of_more_handles_than_bits() -> None:
    """25 holes have 50 generators, two such plates 100: more than the 64 bits of a signature."""
    one = surface(plate(*HOLES), 48)
    assert genus(one) == 25
    check_signatures(one, 25)
    check_signatures(joined(one, one), 50)


def check_signatures(mesh: Mesh, handles: int) -> None:
    found = edge_signatures(mesh.faces)
    codes = {(a, b): code for (a, b), code in zip(found.edges.tolist(), found.signatures.tolist(), strict=True)}
    assert len(codes) == 3 * len(mesh.faces) // 2
    for face in mesh.faces:
        assert walk(codes, face) == 0
    assert len(found.loops) == 2 * handles
    assert rank([walk(codes, loop) for loop in found.loops]) == min(2 * handles, 64)


def check_loop(mesh: Mesh, loop: SurfaceLoop) -> None:
    """The loop is simple, follows edges, has the stated length and does not separate the surface."""
    steps = np.stack([loop.vertices, np.roll(loop.vertices, -1)], axis=1)
    edges = {frozenset(pair) for pair in mesh.faces[:, [0, 1, 1, 2, 2, 0]].reshape(-1, 2).tolist()}
    assert all(frozenset(pair) in edges for pair in steps.tolist())
    assert len(set(loop.vertices.tolist())) == len(loop.vertices) >= 3
    a, b = mesh.vertices[steps.T].astype(np.float64)
    assert loop.length == pytest.approx(np.linalg.norm(a - b, axis=1).sum(), rel=1e-6)
    assert not separates(mesh, loop.vertices.tolist())


def test_the_loop_around_the_tube_of_a_torus() -> None:
    mesh = torus(1.0, 0.3, 24, 12)
    around_tube = 12 * 2 * 0.3 * math.sin(math.pi / 12)  # a regular polygon of 12 edges
    found = short_loops(mesh, 1.01 * around_tube)
    assert [loop.length for loop in found] == pytest.approx([around_tube], rel=1e-6)
    check_loop(mesh, found[0])
    assert short_loops(mesh, 0.99 * around_tube) == []


def test_the_loop_around_the_hole_of_a_fat_torus() -> None:
    """Its tube is wider than its hole."""
    mesh = torus(0.5, 0.4, 24, 24)
    around_hole = 24 * 2 * 0.1 * math.sin(math.pi / 24)
    found = short_loops(mesh, 1.1 * around_hole)
    assert [loop.length for loop in found] == pytest.approx([around_hole], rel=1e-6)
    assert np.linalg.norm(mesh.vertices[found[0].vertices, :2], axis=1) == pytest.approx(0.1, rel=1e-5)


def test_a_sphere_has_no_loops() -> None:
    assert short_loops(cube(), 100.0) == []


@pytest.mark.parametrize("seed", range(4))
def test_the_shortest_loop_is_that_of_a_slow_search(seed: int) -> None:
    """A torus with irregular edges: the shortest loop is not a coordinate line."""
    mesh = torus(1.0, 0.45, 9, 6)
    rng = np.random.default_rng(seed)
    mesh = Mesh((mesh.vertices + rng.normal(0.0, 0.12, mesh.vertices.shape)).astype(np.float32), mesh.faces)
    expected = shortest_by_removal(mesh)
    # With such coarse edges, every vertex of the generators is a start point.
    found = short_loops(mesh, 1.5 * expected)
    assert found[0].length == pytest.approx(expected, rel=1e-6)
    for loop in found:
        check_loop(mesh, loop)
    assert all(loop.length <= 1.5 * expected * (1 + 1e-9) for loop in found)
    assert len({loop.signature for loop in found}) == len(found)


@pytest.mark.parametrize("place", range(6))
def test_loops_that_do_not_pass_through_the_start_point(place: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tube of a torus is thin at one place. The paths from the only start point to it begin with the same edges."""
    monkeypatch.setattr(homology, "_MOST_STARTS", 1)
    mesh = torus(0.5, 0.4, 24, 12)
    angle = np.arctan2(mesh.vertices[:, 1], mesh.vertices[:, 0])
    middle = 0.5 * np.stack([np.cos(angle), np.sin(angle), np.zeros_like(angle)], axis=1)
    width = 0.1 + 0.9 * np.abs(np.sin(0.5 * angle - np.pi * place / 6))[:, None]
    mesh = Mesh((middle + width * (mesh.vertices - middle)).astype(np.float32), mesh.faces)
    loops = short_loops(mesh, 20.0)
    assert len(loops) == 3  # around the tube, around the hole, and around both
    for loop in loops:
        check_loop(mesh, loop)

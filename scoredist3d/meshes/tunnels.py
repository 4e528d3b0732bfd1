"""Removal of topological noise: tiny tunnels through an object are filled.

The idea is that of Guskov and Wood 2001, "Topological noise removal": the surface is cut along a short loop around each
tunnel, and both sides of the cut are closed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import dijkstra

from scoredist3d.meshes.holes import fill_loops
from scoredist3d.meshes.homology import SurfaceLoop, short_loops
from scoredist3d.meshes.lattice import harmonic, vertex_lattice
from scoredist3d.meshes.mesh import Mesh, component_labels, separate_sheets, topology
from scoredist3d.ops.mesh.distance import winding_number
from scoredist3d.ops.mesh.topology import euler_characteristic

_MOST_HANDLES = 512  # a surface with a larger genus is left as it is
_MOST_PASSES = 4  # each fills the tunnels that are apart from each other
_DEPTHS = (0.0, 0.3, 0.6)  # relative distances from the center of a loop at which the space in it is tested
_IN_AIR = 0.75  # share of these points that are outside of the object if the loop surrounds a tunnel
# Distances from the cut, relative to the length of the loop, up to which a side of it is smoothed: the first one at
# which the border of the smoothed part is so long, relative to the loop, that it is beyond the mouth of the tunnel.
_REACHES, _WIDE = (0.3, 0.5, 0.7, 1.0, 1.5), 2.0
_SHORT_REACHES = (0.15, 0.0)  # tried if the result is not sound
_MOST_VOLUME = 0.5  # largest change of the volume, relative to the cube of the length of the loop, and
_LEAST_VOLUME = 1e-3  # change that is always accepted, relative to the volume of the mesh
_OFFSET = 0.02  # distance of tested points from the surface, relative to the length of the loop
_WRONG = 0.1  # share of these points that may be on the wrong side


@dataclass
class _EditedMesh:
    """A mesh that is changed in place, so that a change does not copy all of it.

    Attributes:
        vertices, faces, colors: Arrays of which the first elements are used; the others are room for new ones.
        num_vertices, num_faces: Number of used elements.
    """

    vertices: np.ndarray
    faces: np.ndarray
    colors: np.ndarray | None
    num_vertices: int
    num_faces: int

    @classmethod
    def of(cls, mesh: Mesh, more_vertices: int, more_faces: int) -> _EditedMesh:
        """A copy of a mesh with room for more vertices and faces."""

        def extended(values: np.ndarray, more: int) -> np.ndarray:
            return np.concatenate([values, np.zeros((more, 3), dtype=values.dtype)])

        colors = None if mesh.vertex_colors is None else extended(mesh.vertex_colors, more_vertices)
        vertices, faces = extended(mesh.vertices, more_vertices), extended(mesh.faces, more_faces)
        return cls(vertices, faces, colors, len(mesh.vertices), len(mesh.faces))

    @property
    def mesh(self) -> Mesh:
        """The present mesh, which shares the arrays."""
        colors = None if self.colors is None else self.colors[: self.num_vertices]
        return Mesh(self.vertices[: self.num_vertices], self.faces[: self.num_faces], vertex_colors=colors)

    def change(self, faces: np.ndarray, vertices: np.ndarray, part: Mesh) -> np.ndarray:
        """Replace a part of the mesh and return the vertices (M,) of the new part.

        Args:
            faces: (K,) indices of the faces of the part, which are the first ones of the new part.
            vertices: (N,) indices of its vertices, likewise.
            part: The new part, possibly with further faces and vertices.
        """
        used = np.arange(self.num_vertices, self.num_vertices + len(part.vertices) - len(vertices))
        numbers = np.concatenate([vertices, used])
        self.vertices[numbers] = part.vertices
        if self.colors is not None and part.vertex_colors is not None:
            self.colors[numbers] = part.vertex_colors
        more = np.arange(self.num_faces, self.num_faces + len(part.faces) - len(faces))
        self.faces[np.concatenate([faces, more])] = numbers[part.faces]
        self.num_vertices, self.num_faces = self.num_vertices + len(used), self.num_faces + len(more)
        return numbers


def fill_tunnels(mesh: Mesh, longest: float) -> tuple[Mesh, int]:
    """Fill tiny tunnels through the object, such as pinholes in a thin wall, and return their number.

    A tunnel is filled if the shortest loop of edges around it is at most ``longest`` long. The space in the loop must
    be outside of the object, so handles and struts are never cut, however thin they are. The surface is cut along the
    loop, both sides are closed, and the surroundings get harmonic positions. A tunnel stays if its filling would change
    the volume much or intersect the surface.

    The work is limited: there are up to four passes, each of which fills at most 64 tunnels; on a surface with more
    than about a hundred handles, not all places are searched; one with more than 512 is returned as it is.

    Args:
        mesh: Mesh; one that is not closed or that is inside out is returned as it is.
        longest: Length in scene units.

    Returns:
        The mesh, the same object if nothing changes, and the number of filled tunnels. Texture coordinates are dropped.
    """
    surface = _as_manifold(mesh) if longest > 0 else None
    if surface is None:
        return mesh, 0
    filled = 0
    for _ in range(_MOST_PASSES):
        if not 0 < topology(surface).components - _euler(surface) // 2 <= _MOST_HANDLES:
            break
        candidate, count = _fill_all(surface, _around_air(surface, short_loops(surface, longest)))
        if count == 0 or not _is_simpler(candidate, surface, count):
            break
        surface, filled = candidate, filled + count
    return (replace(surface, authored=mesh.authored), filled) if filled else (mesh, 0)


def _as_manifold(mesh: Mesh) -> Mesh | None:
    """The mesh without texture coordinates and with one vertex per sheet; None if it is open or inside out."""
    if not len(mesh.faces):
        return None
    sheets = separate_sheets(mesh)
    if not topology(sheets).watertight or sheets.volume <= 0:
        return None
    if mesh.vertex_colors is None:
        return sheets
    colors = np.empty((len(sheets.vertices), 3), dtype=np.uint8)
    colors[sheets.faces.ravel()] = mesh.vertex_colors[mesh.faces.ravel()]
    return replace(sheets, vertex_colors=colors)


def _euler(mesh: Mesh) -> int:
    return euler_characteristic(torch.from_numpy(mesh.faces))


def _is_simpler(mesh: Mesh, before: Mesh, count: int) -> bool:
    """Whether a mesh is a closed 2-manifold with ``count`` handles less than before and as many components."""
    found = topology(mesh)
    same = found.watertight and found.components == topology(before).components
    manifold = len(separate_sheets(mesh).vertices) == len(np.unique(mesh.faces))
    return same and manifold and _euler(mesh) == _euler(before) + 2 * count


def _inside(mesh: Mesh, points: list[np.ndarray]) -> list[np.ndarray]:
    """Whether points are inside the object: a bool array (N,) for each array of points (N, 3)."""
    every = torch.from_numpy(np.concatenate(points).astype(np.float32))
    winding = winding_number(every, torch.from_numpy(mesh.vertices), torch.from_numpy(mesh.faces)).numpy()
    return np.split(winding > 0.5, np.cumsum([len(part) for part in points])[:-1])


def _around_air(mesh: Mesh, loops: list[SurfaceLoop]) -> list[SurfaceLoop]:
    """The loops that surround a tunnel: the disk in each is outside of the object, not inside as that of a handle."""
    if not loops:
        return []
    points = []
    for loop in loops:
        corners = mesh.vertices[loop.vertices].astype(np.float64)
        center = corners.mean(axis=0)
        towards = np.concatenate([corners, 0.5 * (corners + np.roll(corners, 1, axis=0))]) - center
        points.append(np.concatenate([center + depth * towards for depth in _DEPTHS]))
    inside = _inside(mesh, points)
    return [loop for loop, part in zip(loops, inside, strict=True) if 1.0 - part.mean() >= _IN_AIR]


def _fill_all(mesh: Mesh, loops: list[SurfaceLoop]) -> tuple[Mesh, int]:
    """The mesh with all tunnels filled that are apart from each other, and their number.

    If a filling is not sound, it is tried again with less smoothing, and then left out.
    """
    attempts = [0] * len(loops)
    while True:
        filled, moved = _attempt(mesh, loops, attempts)
        unsound = _unsound(filled, loops, moved)
        if not unsound:
            return filled, len(moved)
        for index in unsound:
            attempts[index] += 1


def _attempt(mesh: Mesh, loops: list[SurfaceLoop], attempts: list[int]) -> tuple[Mesh, dict[int, np.ndarray]]:
    """The mesh with filled tunnels, and the vertices (M,) that moved or are new, by index of the loop.

    Disjoint loops that are independent in homology do not separate the surface, even if it is cut along all of them.

    Args:
        mesh: The closed mesh.
        loops: Loops around tunnels. Those that meet an earlier filling are left out.
        attempts: Number of earlier attempts for each loop, which is increased here if one fails at once.
    """
    touched, least = np.zeros(len(mesh.vertices), dtype=bool), _LEAST_VOLUME * mesh.volume
    edges = sum(len(loop.vertices) for loop in loops)
    edited = _EditedMesh.of(mesh, edges + 2 * len(loops), 2 * edges)
    independent: list[int] = []
    moved: dict[int, np.ndarray] = {}
    for index, loop in enumerate(loops):
        rest = loop.signature
        for other in independent:
            rest = min(rest, rest ^ other)
        if rest == 0 or touched[loop.vertices].any():
            continue
        found = None
        while found is None and attempts[index] <= len(_SHORT_REACHES):
            found = _fill(edited, loop, attempts[index], least)
            attempts[index] += found is None
        if found is not None:
            moved[index] = found
            independent.append(rest)
            touched[found[found < len(touched)]] = True
    return edited.mesh, moved


def _fill(edited: _EditedMesh, loop: SurfaceLoop, attempt: int, least: float) -> np.ndarray | None:
    """Fill one tunnel and return the vertices (M,) that moved or are new; None if the mesh would change much.

    Args:
        edited: The closed mesh, which is changed.
        loop: Loop around the tunnel.
        attempt: Number of earlier attempts; the first one smooths as far as is needed for a level surface.
        least: Change of the volume that is always accepted, cubic scene units.
    """
    farthest = _REACHES[-1] * loop.length
    faces, vertices, part = _surroundings(edited.mesh, loop.vertices, farthest)
    old = np.searchsorted(vertices, loop.vertices)
    new = np.arange(len(vertices), len(vertices) + len(old))
    closed = fill_loops(cut_along(part, old), [old, new[::-1]])
    free = np.arange(len(closed.vertices)) > new[-1]  # the centers of both sides
    for ring in (old, new):
        distances = _distances(closed, ring, farthest)
        reach = _SHORT_REACHES[attempt - 1] if attempt else _reach(closed, distances, loop.length)
        free |= distances <= reach * loop.length
    smooth = _harmonic(closed, free)
    if smooth is None or abs(smooth.volume - closed.volume) > max(_MOST_VOLUME * loop.length**3, least):
        return None
    return edited.change(faces, vertices, smooth)[free]


def cut_along(mesh: Mesh, loop: np.ndarray) -> Mesh:
    """The mesh, cut along a simple loop of edges (L,).

    The faces to the left of the loop, seen from outside, get new vertices, which follow the others in the order of the
    loop.

    Args:
        mesh: A 2-manifold without texture coordinates, closed around the loop.
        loop: Vertices in order; the last is connected with the first.
    """
    near = np.flatnonzero(np.isin(mesh.faces, loop).any(axis=1))
    following: dict[tuple[int, int], tuple[int, int]] = {}  # face to the left of an edge, and its third corner
    for face, (a, b, c) in zip(near.tolist(), mesh.faces[near].tolist(), strict=True):
        following |= {(a, b): (face, c), (b, c): (face, a), (c, a): (face, b)}
    faces, count = mesh.faces.copy(), len(mesh.vertices)
    neighbors = zip(np.roll(loop, 1).tolist(), loop.tolist(), np.roll(loop, -1).tolist(), strict=True)
    for place, (last, vertex, neighbor) in enumerate(neighbors):
        while neighbor != last:
            face, neighbor = following[vertex, neighbor]
            faces[face, mesh.faces[face] == vertex] = count + place
    colors = mesh.vertex_colors
    return replace(
        mesh,
        vertices=np.concatenate([mesh.vertices, mesh.vertices[loop]]),
        faces=faces,
        vertex_colors=None if colors is None else np.concatenate([colors, colors[loop]]),
    )


def _surroundings(mesh: Mesh, center: np.ndarray, farthest: float) -> tuple[np.ndarray, np.ndarray, Mesh]:
    """The part of a mesh that has all faces at vertices near some vertices.

    Args:
        mesh: The whole mesh.
        center: (M,) vertices.
        farthest: Distance from them up to which vertices are near.

    Returns:
        The faces (K,) and vertices (N,) of the part as indices in ascending order, and the part.
    """
    low, high = mesh.vertices[center].min(axis=0) - farthest, mesh.vertices[center].max(axis=0) + farthest
    near = ((mesh.vertices >= low) & (mesh.vertices <= high)).all(axis=1)
    faces = np.flatnonzero(near[mesh.faces].any(axis=1))
    vertices, local = np.unique(mesh.faces[faces], return_inverse=True)
    colors = None if mesh.vertex_colors is None else mesh.vertex_colors[vertices]
    return faces, vertices, Mesh(mesh.vertices[vertices], local.reshape(-1, 3), vertex_colors=colors)


def _distances(mesh: Mesh, starts: np.ndarray, farthest: float) -> np.ndarray:
    """Distances (V,) along edges from the nearest of the vertices ``starts`` (S,), infinite beyond ``farthest``."""
    a, b = mesh.faces[:, [0, 1, 1, 2, 2, 0]].reshape(-1, 2).T  # inner edges occur in both directions
    lengths = np.linalg.norm(mesh.vertices[a].astype(np.float64) - mesh.vertices[b], axis=1)
    graph = coo_matrix((lengths, (a, b)), shape=(len(mesh.vertices),) * 2).tocsr()
    found: np.ndarray = dijkstra(graph, indices=starts, limit=farthest, min_only=True)
    return found


def _reach(mesh: Mesh, distances: np.ndarray, length: float) -> float:
    """Distance from the cut, relative to the length of the loop, up to which one side is smoothed.

    Beyond the mouth of a tunnel, the border of the smoothed part is longer than the loop. Only from there on, the
    surface becomes level with its surroundings; a shorter distance leaves a pit.

    Args:
        mesh: The surroundings of the tunnel.
        distances: (V,) distances of its vertices from the cut on that side.
        length: Length of the loop.
    """
    wide = (reach for reach in _REACHES if _border(mesh, distances <= reach * length) > _WIDE * length)
    return next(wide, _REACHES[0])


def _border(mesh: Mesh, inside: np.ndarray) -> float:
    """Length of the border of a set of vertices (V,): of the edges opposite of the only corner of a face in the set."""
    corners = inside[mesh.faces]
    face, corner = np.nonzero(corners & (corners.sum(axis=1) == 1)[:, None])
    a, b = (mesh.vertices[mesh.faces[face, (corner + step) % 3]].astype(np.float64) for step in (1, 2))
    return float(np.linalg.norm(a - b, axis=1).sum())


def _harmonic(mesh: Mesh, free: np.ndarray) -> Mesh | None:
    """The mesh with harmonic positions of the free vertices (V,), a bool array; None if a component has no others."""
    around = Mesh(mesh.vertices, mesh.faces[free[mesh.faces].any(axis=1)])
    count, labels = component_labels(around)
    if len(np.unique(labels[~free[around.faces].all(axis=1)])) < count:
        return None
    surface = harmonic(vertex_lattice(around.vertices, around.faces), ~free)
    return replace(mesh, vertices=np.where(free[:, None], surface.nodes, mesh.vertices))


def _unsound(mesh: Mesh, loops: list[SurfaceLoop], moved: dict[int, np.ndarray]) -> list[int]:
    """Indices of the loops whose fillings intersect the surface.

    Points just in front of the moved vertices (M,) must be outside of the object, and points just behind them inside.
    """
    if not moved:
        return []
    normals, points = mesh.vertex_normals(), []
    for index, vertices in moved.items():
        away = _OFFSET * loops[index].length * normals[vertices]
        points += [mesh.vertices[vertices] + away, mesh.vertices[vertices] - away]
    inside = _inside(mesh, points)
    wrong = [0.5 * (front.mean() + 1.0 - back.mean()) for front, back in zip(inside[::2], inside[1::2], strict=True)]
    return [index for index, share in zip(moved, wrong, strict=True) if share > _WRONG]

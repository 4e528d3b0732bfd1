"""Hole filling of triangle meshes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from scoredist3d.meshes.mesh import Mesh


def fill_holes(mesh: Mesh) -> tuple[Mesh, int]:
    """Close every boundary loop with a triangle fan around its center, or with one face if it has three edges.

    Args:
        mesh: A mesh without texture coordinates.

    Returns:
        The closed mesh and the number of loops that were closed.
    """
    loops = boundary_loops(mesh)
    return (fill_loops(mesh, loops), len(loops)) if loops else (mesh, 0)


def fill_loops(mesh: Mesh, loops: list[np.ndarray]) -> Mesh:
    """The mesh with further faces that close the given loops, as :func:`fill_holes` does; the centers are the last.

    Args:
        mesh: A mesh without texture coordinates.
        loops: Boundary loops as vertices in the order in which the new faces traverse them; at least one.
    """
    faces: list[np.ndarray] = [mesh.faces]
    centers: list[np.ndarray] = []  # loops that are filled by a fan around a new vertex
    for loop in loops:
        if len(loop) == 3:
            faces.append(np.array([loop]))
            continue
        center = len(mesh.vertices) + len(centers)
        centers.append(loop)
        faces.append(np.stack([loop, np.roll(loop, -1), np.full(len(loop), center)], axis=1))
    middle = np.array([mesh.vertices[loop].mean(axis=0) for loop in centers], dtype=np.float32).reshape(-1, 3)
    colors = mesh.vertex_colors
    if colors is not None:
        own = [colors[loop].mean(axis=0) for loop in centers]
        colors = np.concatenate([colors, np.round(np.reshape(own, (-1, 3))).astype(np.uint8)])
    filled = Mesh(np.concatenate([mesh.vertices, middle]), np.concatenate(faces).astype(np.int64))
    return replace(filled, vertex_colors=colors)


def boundary_loops(mesh: Mesh) -> list[np.ndarray]:
    """Boundary loops as vertex indices, oriented so that faces filling them match the orientation of the surface.

    Boundary edges that are not part of a closed loop are omitted.
    """
    directed = mesh.faces[:, [0, 1, 1, 2, 2, 0]].reshape(-1, 2)
    keys = directed.min(axis=1) * len(mesh.vertices) + directed.max(axis=1)
    _, inverse, counts = np.unique(keys, return_inverse=True, return_counts=True)
    # The missing face would traverse the edge in the opposite direction.
    edges = directed[counts[inverse.ravel()] == 1][:, ::-1]
    following: dict[int, list[int]] = {}
    for start, end in edges.tolist():
        following.setdefault(start, []).append(end)
    loops = []
    while following:
        loops += _walk(following)
    return loops


def _walk(following: dict[int, list[int]]) -> list[np.ndarray]:
    """Remove the edges of one walk from ``following`` and split the walk into simple loops."""
    path = [next(iter(following))]
    place, loops = {path[0]: 0}, []
    while path[-1] in following:
        ends = following[path[-1]]
        vertex = ends.pop()
        if not ends:
            del following[path[-1]]
        if vertex in place:
            cut = place[vertex]
            loops.append(np.array(path[cut:]))
            for left in path[cut + 1 :]:
                del place[left]
            path = path[: cut + 1]
        else:
            place[vertex] = len(path)
            path.append(vertex)
    return [loop for loop in loops if len(loop) >= 3]

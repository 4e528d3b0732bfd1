"""Flattening of surface that no training camera sees, such as undersides.

Optimization never compares these parts with the prior, so they keep whatever bumps and dents the earlier steps left. A
surface of least area that continues the seen parts is the usual guess: undersides become flat. Parts that are round,
such as the bottom of a hull, continue the seen parts better as they are: the surface around them already bends towards
them, while the walls around a flat underside are about perpendicular to it.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components, dijkstra

from scoredist3d.cameras import Cameras
from scoredist3d.export.visibility import exposure, relative_exposure
from scoredist3d.meshes.lattice import Lattice, harmonic, node_areas, subdivide
from scoredist3d.meshes.mesh import Mesh
from scoredist3d.ops.mesh.distance import winding_number

_UNSEEN = 0.02  # relative exposure below which a vertex moves; well seen parts have about 0.2
# Mean inward displacement of a region that may be round, and of one that is, relative to the square root of its area.
_ROUND = 0.015, 0.065
_CONTINUED = 0.2  # mean cosine between a round region's normal and those of the seen surface around it
_AROUND = 0.15  # width of that surface, relative to the radius of the mesh
_FARTHEST = 0.35  # largest displacement, relative to that radius
_CHECKED = 0.01  # displacement from which a vertex is checked, relative to that radius
_TOLERATED = 0.02  # share of the vertices of a region that may fail the check
_STEPS = (0.3, 0.6, 1.0, 1.3)  # fractions of the displacement at which it is checked


def flatten_unseen(mesh: Mesh, cameras: Cameras) -> Mesh:
    """The mesh with a surface of little area where no training camera sees it; the same object if nothing changes.

    Seen vertices keep their positions. A connected region of unseen vertices stays as it is if it has no seen neighbor,
    if it is round, so that it would move inwards as a whole and continues the seen surface around it, or if it would
    pass through another part of the surface or move far.

    Args:
        mesh: A closed mesh; vertices at the same position move together.
        cameras: Training cameras, spread over their whole range.
    """
    lattice = subdivide(mesh, np.inf)
    found = exposure(mesh, lattice, cameras)
    if not found.any():
        return mesh
    best = np.zeros(len(lattice.nodes), dtype=np.float32)
    np.maximum.at(best, lattice.triangles.ravel(), relative_exposure(found).ravel())
    regions, touched = _regions(lattice, best < _UNSEEN)
    moving = regions >= 0
    moving[moving] = touched[regions[moving]]
    if not moving.any():
        return mesh
    surface, normals = harmonic(lattice, ~moving), _node_normals(mesh, lattice)
    displacement = surface.nodes - lattice.nodes
    numbers, areas = regions[moving], node_areas(lattice)
    inward = np.bincount(numbers, -(displacement * normals).sum(axis=1)[moving] * areas[moving])
    perhaps, surely = (inward > limit * np.bincount(numbers, areas[moving]) ** 1.5 for limit in _ROUND)
    regions = np.where(moving, regions, -1)
    round_ = surely | (perhaps & (_continuation(lattice, normals, areas, regions, len(inward)) > _CONTINUED))
    blocked = np.bincount(numbers, _blocked(lattice, normals, displacement)[moving])
    bad = round_ | (blocked > _TOLERATED * np.bincount(numbers))
    moving &= ~np.isin(regions, np.flatnonzero(bad))
    if not moving.any():
        return mesh
    nodes = np.where(moving[:, None], surface.nodes, lattice.nodes)
    vertices = mesh.vertices.copy()
    vertices[mesh.faces[lattice.face].ravel()] = nodes[lattice.triangles.ravel()]
    return replace(mesh, vertices=vertices)


def _regions(lattice: Lattice, unseen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Number of the connected region (N,) of each unseen node, -1 for seen ones; and which regions have seen neighbors.

    Args:
        lattice: The surface.
        unseen: (N,) bool.
    """
    a = lattice.triangles.ravel()
    b = np.roll(lattice.triangles, 1, axis=1).ravel()
    size, inner = len(lattice.nodes), unseen[a] & unseen[b]
    graph = coo_matrix((np.ones(inner.sum()), (a[inner], b[inner])), shape=(size, size))
    count, labels = connected_components(graph, directed=False)
    touched = np.zeros(count, dtype=bool)
    for one, other in ((a, b), (b, a)):
        touched[labels[one[unseen[one] & ~unseen[other]]]] = True
    return np.where(unseen, labels, -1), touched


def _continuation(
    lattice: Lattice, normals: np.ndarray, areas: np.ndarray, regions: np.ndarray, count: int
) -> np.ndarray:
    """(count,), mean cosine between the mean normal of each region and the normals of the surface around it.

    Args:
        lattice: The surface.
        normals: (N, 3), of its nodes.
        areas: (N,), of its nodes.
        regions: (N,), number of the region of each node, -1 for none.
        count: Number of regions; those without a node have a mean cosine of 0.
    """
    a, b = lattice.triangles.ravel(), np.roll(lattice.triangles, 1, axis=1).ravel()
    lengths = np.linalg.norm(lattice.nodes[a] - lattice.nodes[b], axis=1)
    size = len(lattice.nodes)
    graph = coo_matrix((lengths, (a, b)), shape=(size, size)).tocsr()
    width = _AROUND * float(np.linalg.norm(lattice.nodes, axis=1).max())
    found = np.zeros(count)
    for region in np.unique(regions[regions >= 0]):
        inside = regions == region
        far = dijkstra(graph, directed=False, indices=np.flatnonzero(inside), min_only=True, limit=width)
        around = np.isfinite(far) & (regions < 0)
        mean = areas[inside] @ normals[inside]
        weights = areas[around] / max(float(areas[around].sum()), 1e-12)
        found[region] = weights @ normals[around] @ mean / max(float(np.linalg.norm(mean)), 1e-12)
    return found


def _node_normals(mesh: Mesh, lattice: Lattice) -> np.ndarray:
    """(N, 3), unit normals at the nodes."""
    normals = np.zeros((len(lattice.nodes), 3))
    np.add.at(normals, lattice.triangles.ravel(), mesh.vertex_normals()[mesh.faces[lattice.face]].reshape(-1, 3))
    normals /= np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-12)
    return normals


def _blocked(lattice: Lattice, normals: np.ndarray, displacement: np.ndarray) -> np.ndarray:
    """(N,) bool, nodes whose displacements (N, 3) are too large, or leave and enter the object again.

    A node that moves inwards must stay inside the object, beyond its new position as well, and one that moves outwards
    must stay outside.
    """
    radius = float(np.linalg.norm(lattice.nodes, axis=1).max())
    along = (displacement * normals).sum(axis=1)
    blocked: np.ndarray = np.linalg.norm(displacement, axis=1) > _FARTHEST * radius
    checked = np.flatnonzero(np.abs(along) > _CHECKED * radius)
    if not len(checked):
        return blocked
    vertices, faces = torch.from_numpy(lattice.nodes), torch.from_numpy(lattice.triangles.astype(np.int32))
    for step in _STEPS:
        points = lattice.nodes[checked] + step * along[checked, None] * normals[checked]
        inside = winding_number(torch.from_numpy(points.astype(np.float32)), vertices, faces).numpy() > 0.5
        blocked[checked] |= inside == (along[checked] > 0)
    return blocked

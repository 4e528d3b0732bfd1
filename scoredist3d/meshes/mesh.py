"""Triangle meshes in world coordinates: topology, components, smoothing, decimation and repair."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

_LONG = 0.15  # shortest diagonal of a thin part, relative to the longest one of the other components
_GAP = 0.5  # longest gap between a thin part and the rest, relative to its diagonal


@dataclass(frozen=True)
class Mesh:
    """Triangle mesh; faces are counter-clockwise seen from outside.

    Attributes:
        vertices: (V, 3) float32, world coordinates (z up).
        faces: (F, 3) int64, indices into ``vertices``.
        uvs: (T, 2) float32 or None, texture coordinates; the origin is the bottom left corner of the image.
        uv_faces: (F, 3) int64 or None, indices into ``uvs``. Vertices on seams have several texture coordinates without
            being duplicated, so the surface stays closed.
        vertex_colors: (V, 3) uint8 or None, display sRGB.
        authored: Whether the mesh comes from a user's file; such a mesh is decimated only on request.
    """

    vertices: np.ndarray
    faces: np.ndarray
    uvs: np.ndarray | None = None
    uv_faces: np.ndarray | None = None
    vertex_colors: np.ndarray | None = None
    authored: bool = False

    @property
    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """Minimum and maximum coordinates, (3,) each."""
        return self.vertices.min(axis=0), self.vertices.max(axis=0)

    @property
    def volume(self) -> float:
        """Signed volume by the divergence theorem, positive for outward winding."""
        return float(_face_volumes(self).sum())

    @property
    def face_areas(self) -> np.ndarray:
        """Areas (F,) of the faces."""
        return 0.5 * np.linalg.norm(_face_normals(self), axis=1)

    def vertex_normals(self) -> np.ndarray:
        """Unit normals (V, 3) float32: the area-weighted mean over adjacent faces; +z where that mean vanishes."""
        corner_normals = np.repeat(_face_normals(self), 3, axis=0)
        corners, count = self.faces.ravel(), len(self.vertices)
        normals = np.stack([np.bincount(corners, corner_normals[:, axis], count) for axis in range(3)], axis=1)
        length = np.linalg.norm(normals, axis=1, keepdims=True)
        normals = np.where(length > 1e-20, normals / np.maximum(length, 1e-20), [0.0, 0.0, 1.0])
        return normals.astype(np.float32)


@dataclass(frozen=True)
class Topology:
    """Counts of defects and components of a mesh.

    Attributes:
        boundary_edges: Number of edges with one face.
        nonmanifold_edges: Number of edges with more than two faces.
        misoriented_edges: Number of edges whose two faces have inconsistent winding.
        holes: Number of connected sets of boundary edges.
        components: Number of connected components.
    """

    boundary_edges: int
    nonmanifold_edges: int
    misoriented_edges: int
    holes: int
    components: int

    @property
    def watertight(self) -> bool:
        """Whether every edge has exactly two faces with consistent winding."""
        return self.boundary_edges == self.nonmanifold_edges == self.misoriented_edges == 0


def topology(mesh: Mesh) -> Topology:
    """Count boundary, non-manifold and misoriented edges, holes and components."""
    directed = mesh.faces[:, [0, 1, 1, 2, 2, 0]].reshape(-1, 2).astype(np.int64)
    forward = directed[:, 0] < directed[:, 1]
    keys = directed.min(axis=1) * len(mesh.vertices) + directed.max(axis=1)
    unique, inverse, counts = np.unique(keys, return_inverse=True, return_counts=True)
    balance = np.bincount(inverse, np.where(forward, 1, -1), len(unique))
    boundary = unique[counts == 1]
    ends = np.stack([boundary // len(mesh.vertices), boundary % len(mesh.vertices)], axis=1)
    _, local = np.unique(ends, return_inverse=True)
    return Topology(
        boundary_edges=len(boundary),
        nonmanifold_edges=int((counts > 2).sum()),
        misoriented_edges=int(((counts == 2) & (balance != 0)).sum()),
        holes=_connected(local.reshape(-1, 2), int(local.max()) + 1)[0] if len(boundary) else 0,
        components=component_labels(mesh)[0],
    )


def component_labels(mesh: Mesh) -> tuple[int, np.ndarray]:
    """Number of connected components and the component (F,) of each face; faces that share a vertex are connected."""
    used, local = np.unique(mesh.faces, return_inverse=True)
    local = local.reshape(-1, 3)
    count, labels = _connected(local[:, [0, 1, 1, 2]].reshape(-1, 2), len(used))
    return count, labels[local[:, 0]]


def drop_small_components(mesh: Mesh, fraction: float) -> tuple[Mesh, int]:
    """Remove small components and return their number.

    A component is small if its volume is below ``fraction`` of the largest volume, unless it is a thin part of the
    object, such as an arm of a snowman: the diagonal of its bounding box is at least 15 % of the largest one, and the
    gap between it and the rest is at most half of this diagonal. A fraction of 0 keeps every component with a positive
    volume; 1 keeps only the largest one. Components with a negative volume are walls of inner cavities and are always
    removed.

    Raises:
        ValueError: No component has a positive volume.
    """
    count, labels = component_labels(mesh)
    volumes = np.bincount(labels, _face_volumes(mesh), count)
    if volumes.max() <= 0:
        raise ValueError(
            "the surface encloses no positive volume: its faces are oriented inwards; reverse their winding"
        )
    if fraction >= 1:
        keep = np.arange(count) == volumes.argmax()
    else:
        keep = (volumes > 0) & (volumes >= fraction * volumes.max())
        keep |= _thin_parts(mesh, labels, keep, (volumes > 0) & ~keep)
    if keep.all():
        return mesh, 0
    return compact(replace(mesh, faces=mesh.faces[keep[labels]])), int((~keep).sum())


def _thin_parts(mesh: Mesh, labels: np.ndarray, kept: np.ndarray, candidates: np.ndarray) -> np.ndarray:
    """(C,) bool: long components that are near a kept one, directly or through other long components.

    ``kept`` and ``candidates`` are (C,) bool. Gaps are measured between vertices.
    """
    from scipy.spatial import cKDTree

    lengths = _diagonals(mesh, labels, len(kept))
    found = np.zeros_like(kept)
    open_ones = {int(index) for index in np.flatnonzero(candidates & (lengths >= _LONG * lengths[kept].max()))}
    points = {index: mesh.vertices[np.unique(mesh.faces[labels == index])] for index in open_ones}
    near = [mesh.vertices[np.unique(mesh.faces[kept[labels]])]]
    while near and open_ones:
        tree = cKDTree(np.concatenate(near))
        reached = [index for index in open_ones if tree.query(points[index])[0].min() <= _GAP * lengths[index]]
        found[reached] = True
        open_ones -= set(reached)
        near = [points[index] for index in reached]
    return found


def _diagonals(mesh: Mesh, labels: np.ndarray, count: int) -> np.ndarray:
    """(C,) diagonals of the bounding boxes of components, from the component of each face."""
    lowest, highest = np.full((count, 3), np.inf), np.full((count, 3), -np.inf)
    corners, owners = mesh.vertices[mesh.faces].reshape(-1, 3), labels.repeat(3)
    np.minimum.at(lowest, owners, corners)
    np.maximum.at(highest, owners, corners)
    return np.linalg.norm(highest - lowest, axis=1)


def compact(mesh: Mesh) -> Mesh:
    """Remove faces that use a vertex twice, and unused vertices. Texture coordinates are dropped."""
    a, b, c = mesh.faces.T
    faces = mesh.faces[(a != b) & (b != c) & (c != a)]
    used, inverse = np.unique(faces, return_inverse=True)
    colors = None if mesh.vertex_colors is None else mesh.vertex_colors[used]
    return Mesh(mesh.vertices[used], inverse.reshape(-1, 3).astype(np.int64), vertex_colors=colors)


def smooth(mesh: Mesh, iterations: int, shrink: float = 0.5, grow: float = -0.53) -> Mesh:
    """Volume-preserving Taubin smoothing (1995): Laplacian steps, alternating inward and slightly larger outward."""
    from scipy.sparse import coo_matrix, diags

    directed = mesh.faces[:, [0, 1, 1, 2, 2, 0, 1, 0, 2, 1, 0, 2]].reshape(-1, 2)
    size = len(mesh.vertices)
    adjacency = coo_matrix((np.ones(len(directed)), directed.T), shape=(size, size)).tocsr()
    adjacency.data[:] = 1.0
    mean = diags(1.0 / np.maximum(np.asarray(adjacency.sum(axis=1)).ravel(), 1.0)) @ adjacency
    vertices = mesh.vertices.astype(np.float64)
    for _ in range(iterations):
        for step in (shrink, grow):
            vertices = vertices + step * (mean @ vertices - vertices)
    return replace(mesh, vertices=vertices.astype(np.float32))


def decimate(mesh: Mesh, max_faces: int) -> Mesh:
    """Quadric edge collapse (Garland and Heckbert 1997) down to at most ``max_faces`` faces, then :func:`repair`.

    The collapse keeps a closed surface closed but may merge thin walls into non-manifold edges, which the repair
    splits. The repair sometimes fails, for example if two edges with the same end points remain. In that case, a few
    lower targets, which lead to different collapses, are tried until there are no more defects than before.
    """
    if len(mesh.faces) <= max_faces:
        return mesh
    import fast_simplification

    best, fewest = mesh, math.inf
    boundary = topology(mesh).boundary_edges
    for scale in (1.0, 0.98, 0.95, 0.91, 0.86, 0.8):
        vertices, faces = fast_simplification.simplify(
            mesh.vertices.astype(np.float64), mesh.faces.astype(np.int32), target_count=int(scale * max_faces)
        )
        candidate = repair(Mesh(vertices.astype(np.float32), faces.astype(np.int64)))
        seen = topology(candidate)
        bad = seen.nonmanifold_edges + seen.misoriented_edges + max(0, seen.boundary_edges - boundary)
        if bad < fewest:
            best, fewest = candidate, bad
        if bad == 0:
            break
    return replace(best, authored=mesh.authored)


def repair(mesh: Mesh) -> Mesh:
    """Split non-manifold edges (four or more faces) by duplicating the vertices of each sheet that meets there.

    Pairs of faces on the same three vertices with opposite winding (walls without thickness) are removed first. The
    faces around an edge are sorted by angle, and neighbors with opposite direction are paired into a sheet. There are
    two such pairings. If the first one leaves both sheets on the same vertices, because they are connected around the
    end points of the edge, the second one separates them. Positions do not change.
    """
    mesh = _drop_double_faces(compact(mesh))
    for shift in (0, 1, 0, 1):
        if topology(mesh).nonmanifold_edges == 0:
            break
        mesh = separate_sheets(mesh, shift)
    return mesh


def _drop_double_faces(mesh: Mesh) -> Mesh:
    _, inverse, counts = np.unique(np.sort(mesh.faces, axis=1), axis=0, return_inverse=True, return_counts=True)
    keep = counts[inverse.ravel()] != 2
    return mesh if keep.all() else compact(replace(mesh, faces=mesh.faces[keep]))


def separate_sheets(mesh: Mesh, shift: int = 0) -> Mesh:
    """Create one vertex per group of face corners that are connected across paired edges.

    In the result, sheets that only touch, at a vertex or a non-manifold edge, share no vertices. ``shift`` selects one
    of the two pairings of the faces around non-manifold edges; see :func:`repair`. Texture coordinates are dropped.
    """
    start, end = mesh.faces.ravel(), mesh.faces[:, [1, 2, 0]].ravel()
    corner = np.arange(len(start))
    next_corner = corner - corner % 3 + (corner + 1) % 3
    forward = start < end
    low, high = np.minimum(start, end), np.maximum(start, end)
    angle = _edge_angles(mesh.vertices[low], mesh.vertices[high], mesh.vertices[mesh.faces[:, [2, 0, 1]].ravel()])
    # Two faces of one sheet traverse their common edge in opposite directions: pair the k-th face of one direction with
    # the (k + shift)-th of the other, in order of their angles.
    side = 2 * (low * len(mesh.vertices) + high) + forward
    order = np.lexsort((angle, side))
    _, first, group, counts = np.unique(side[order], return_index=True, return_inverse=True, return_counts=True)
    rank = (np.arange(len(order)) - first[group] + np.where(forward[order], shift, 0)) % counts[group]
    by = np.lexsort((forward[order], rank, side[order] // 2))
    order, rank = order[by], rank[by]
    edge = side[order] // 2
    partner = np.flatnonzero(
        (edge[1:] == edge[:-1]) & (rank[1:] == rank[:-1]) & (forward[order][1:] != forward[order][:-1])
    )
    one, two = order[partner], order[partner + 1]
    # Connect the corners of both faces at the lower vertex of the edge, and those at the higher vertex.
    low_corner, high_corner = np.where(forward, corner, next_corner), np.where(forward, next_corner, corner)
    edges = np.concatenate(
        [np.stack([low_corner[one], low_corner[two]], 1), np.stack([high_corner[one], high_corner[two]], 1)]
    )
    count, labels = _connected(edges, len(start))
    vertices = np.empty((count, 3), dtype=mesh.vertices.dtype)
    vertices[labels] = mesh.vertices[start]
    return Mesh(vertices, labels.reshape(-1, 3).astype(np.int64))


def _edge_angles(low: np.ndarray, high: np.ndarray, opposite: np.ndarray) -> np.ndarray:
    """Angles (N,) of faces around their edges ``low`` to ``high``; ``opposite`` are the third corners; (N, 3) each."""
    along = (high - low).astype(np.float64)
    across = np.cross(along, np.eye(3)[np.abs(along).argmin(axis=1)])
    upwards = np.cross(along, across) / np.maximum(np.linalg.norm(along, axis=1, keepdims=True), 1e-20)
    towards = opposite - low
    return np.arctan2((towards * upwards).sum(axis=1), (towards * across).sum(axis=1))


def _face_normals(mesh: Mesh) -> np.ndarray:
    """Normals (F, 3) float64, whose length is twice the face area."""
    a, b, c = (mesh.vertices[mesh.faces[:, k]].astype(np.float64) for k in range(3))
    return np.cross(b - a, c - a)


def _face_volumes(mesh: Mesh) -> np.ndarray:
    """Signed volumes (F,) of the tetrahedra formed by each face and the origin."""
    return (mesh.vertices[mesh.faces[:, 0]].astype(np.float64) * _face_normals(mesh)).sum(axis=1) / 6.0


def _connected(edges: np.ndarray, size: int) -> tuple[int, np.ndarray]:
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    graph = coo_matrix((np.ones(len(edges), dtype=np.int8), (edges[:, 0], edges[:, 1])), shape=(size, size))
    count, labels = connected_components(graph, directed=False)
    return int(count), labels

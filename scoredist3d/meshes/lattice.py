"""Even subdivision of a mesh into small triangles, and smooth interpolation of values over its surface."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from scoredist3d.meshes.mesh import Mesh

_MOST_DIVISIONS = 64
_WEIGHTS = 0.01, 100.0  # limits of the cotangents; negative ones would let values leave the range of the fixed ones
_HARMONIC_STEPS = 3
_KEY_STEPS = 2**20  # nodes closer than this fraction of the mesh's extent are one node


@dataclass(frozen=True)
class Lattice:
    """Subdivision of ``F`` faces into ``T`` small triangles with ``N`` shared corners, the nodes.

    A face with n divisions is split into n^2 congruent triangles. Neighbors with other divisions share only some of
    the nodes on their common edge. Vertices at the same position are one node, so seams do not separate faces.

    Attributes:
        divisions: (F,) int64, divisions of each face, powers of 2.
        first: (F,) int64, first triangle of each face.
        face: (T,) int64, face of each triangle.
        barycentric: (T, 3, 3) float32, corners of the triangles as weights of the corners of their face.
        nodes: (N, 3) float32, positions in world coordinates.
        triangles: (T, 3) int64, indices into ``nodes``.
    """

    divisions: np.ndarray
    first: np.ndarray
    face: np.ndarray
    barycentric: np.ndarray
    nodes: np.ndarray
    triangles: np.ndarray

    def locate(self, face: np.ndarray, barycentric: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Triangles (M,) that contain surface points, and the points' weights (M, 3) of the triangles' corners.

        Args:
            face: (M,) int64, faces of the points.
            barycentric: (M, 3), weights of the corners of those faces.
        """
        count = self.divisions[face]
        u, v = barycentric[:, 0] * count, barycentric[:, 1] * count
        row = np.clip(u.astype(np.int64), 0, count - 1)
        column = np.clip(v.astype(np.int64), 0, count - 1 - row)
        u, v = u - row, v - column
        down = (u + v > 1.0) & (column < count - 1 - row)
        upper = np.stack([u, v, 1.0 - u - v], axis=1)
        lower = np.stack([u + v - 1.0, 1.0 - u, 1.0 - v], axis=1)
        weights = np.where(down[:, None], lower, upper).clip(0.0, None)
        weights /= weights.sum(axis=1, keepdims=True)
        return self.first[face] + _position(count, row, column, down), weights.astype(np.float32)


def subdivide(mesh: Mesh, longest: float) -> Lattice:
    """Subdivide the faces of a mesh so that no edge is longer than ``longest``, with at most 64 divisions per face."""
    corners = mesh.vertices[mesh.faces].astype(np.float64)
    edges = np.linalg.norm(corners - np.roll(corners, 1, axis=1), axis=2).max(axis=1)
    powers = np.ceil(np.log2(np.maximum(edges / longest, 1.0)))
    divisions = np.minimum(2**powers, _MOST_DIVISIONS).astype(np.int64)
    first = np.cumsum(divisions**2) - divisions**2
    face = np.repeat(np.arange(len(mesh.faces)), divisions**2)
    barycentric = np.empty((len(face), 3, 3), dtype=np.float32)
    for count in np.unique(divisions).tolist():
        of_count = np.flatnonzero(divisions == count)
        barycentric[(first[of_count, None] + np.arange(count**2)).ravel()] = np.tile(
            _template(count), (len(of_count), 1, 1)
        )
    points = np.einsum("tkc,tcx->tkx", barycentric, corners[face]).reshape(-1, 3)
    low = points.min(axis=0)
    steps = np.rint((points - low) * (_KEY_STEPS / max(float((points.max(axis=0) - low).max()), 1e-12))).astype(
        np.int64
    )
    keys = (steps[:, 0] * (2 * _KEY_STEPS) + steps[:, 1]) * (2 * _KEY_STEPS) + steps[:, 2]
    _, chosen, inverse = np.unique(keys, return_index=True, return_inverse=True)
    nodes = points[chosen].astype(np.float32)
    return Lattice(divisions, first, face, barycentric, nodes, inverse.reshape(-1, 3).astype(np.int64))


def vertex_lattice(vertices: np.ndarray, faces: np.ndarray) -> Lattice:
    """The lattice of a mesh without subdivision, with one node per vertex (V, 3), also where vertices coincide."""
    count = len(faces)
    corners = np.broadcast_to(np.eye(3, dtype=np.float32), (count, 3, 3))
    return Lattice(np.ones(count, dtype=np.int64), np.arange(count), np.arange(count), corners, vertices, faces)


def _position(count: np.ndarray, row: np.ndarray, column: np.ndarray, down: np.ndarray) -> np.ndarray:
    """Index of a triangle among those of its face; row r has 2 (count - r) - 1 triangles, of alternating direction."""
    index: np.ndarray = 2 * count * row - row**2 + 2 * column + down
    return index


def _template(count: int) -> np.ndarray:
    """(count^2, 3, 3) float32: the corners of the triangles of one face, as weights of its corners."""
    found = []
    for row in range(count):
        for column in range(count - row):
            found.append([(row + 1, column), (row, column + 1), (row, column)])
            if column < count - row - 1:
                found.append([(row + 1, column + 1), (row, column + 1), (row + 1, column)])
    pairs = np.array(found, dtype=np.float32) / np.float32(count)
    return np.concatenate([pairs, 1.0 - pairs.sum(axis=2, keepdims=True)], axis=2)


def node_areas(lattice: Lattice) -> np.ndarray:
    """(N,) areas of the nodes: a third of those of their triangles."""
    a, b, c = (lattice.nodes[lattice.triangles[:, k]] for k in range(3))
    area = np.linalg.norm(np.cross(b - a, c - a), axis=1) / 6.0
    return np.bincount(lattice.triangles.ravel(), np.repeat(area, 3), len(lattice.nodes))


def _edge_weights(lattice: Lattice) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ends (E,), (E,) and positive weights (E,) of the edges of all triangles: cotangents of the opposite angles."""
    found, nodes = [], lattice.nodes.astype(np.float64)
    for k in range(3):
        opposite, a, b = (lattice.triangles[:, (k + step) % 3] for step in range(3))
        one, other = nodes[a] - nodes[opposite], nodes[b] - nodes[opposite]
        area = np.linalg.norm(np.cross(one, other), axis=1)
        cotangent = (one * other).sum(axis=1) / np.maximum(area, 1e-12)
        proper = a != b
        found.append((a[proper], b[proper], cotangent.clip(*_WEIGHTS)[proper]))
    a, b, weights = (np.concatenate(column) for column in zip(*found, strict=True))
    return a, b, weights


def diffuse(lattice: Lattice, fixed: np.ndarray, values: np.ndarray, pull: np.ndarray) -> np.ndarray:
    """Values (N, C) float32 of all nodes: those of the fixed nodes, interpolated smoothly to the others.

    The values x of the other nodes solve the screened Laplace equation ``laplacian(x) = pull (x - values)``: without
    ``pull`` each is the weighted mean of its neighbors, and with it the node's own value, smoothed over a length of
    1 / sqrt(pull). The weights are cotangents (Pinkall and Polthier 1993), limited to positive ones, so values stay
    within the range of the given ones. Nodes in parts of the surface without a fixed node have the value of the nearest
    fixed node.

    Args:
        lattice: The lattice.
        fixed: (N,) bool, nodes with a given value; at least one.
        values: (N, C), read at fixed nodes and where ``pull`` is positive.
        pull: (N,), non-negative, per squared unit of length.
    """
    from scipy.sparse import coo_matrix, diags
    from scipy.sparse.csgraph import connected_components
    from scipy.sparse.linalg import splu
    from scipy.spatial import cKDTree

    size = len(lattice.nodes)
    a, b, weights = _edge_weights(lattice)
    areas = node_areas(lattice)
    ends = np.concatenate([a, b]), np.concatenate([b, a])
    graph = coo_matrix((np.tile(weights, 2), ends), shape=(size, size)).tocsr()
    count, labels = connected_components(graph, directed=False)
    reached = np.bincount(labels[fixed], minlength=count) > 0
    result = np.where(fixed[:, None], values, 0.0).astype(np.float64)
    lost = np.flatnonzero(~reached[labels])
    if len(lost):
        known = np.flatnonzero(fixed)
        result[lost] = result[known[cKDTree(lattice.nodes[known]).query(lattice.nodes[lost])[1]]]
    free = np.flatnonzero(~fixed & reached[labels])
    if len(free):
        rows, own = graph[free], 2.0 * (pull * areas)[free]  # the sum of two cotangents is twice the weight of an edge
        matrix = diags(np.asarray(rows.sum(axis=1)).ravel() + own) - rows[:, free]
        solver = splu(matrix.tocsc(), permc_spec="MMD_AT_PLUS_A")
        result[free] = solver.solve(rows @ result + own[:, None] * values[free])
    return result.astype(np.float32)


def harmonic(lattice: Lattice, fixed: np.ndarray) -> Lattice:
    """The lattice with a surface of little area through its fixed nodes (N,), a bool array with at least one of them.

    The positions of the other nodes are harmonic for the cotangents of the last surface, three times in turn.
    """
    still = np.zeros(len(lattice.nodes))
    for _ in range(_HARMONIC_STEPS):
        lattice = replace(lattice, nodes=diffuse(lattice, fixed, lattice.nodes, still))
    return lattice

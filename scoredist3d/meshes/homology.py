"""Short non-separating loops of closed surfaces: those around the tunnels and handles of a triangle mesh.

A tree-cotree decomposition (Eppstein 2003, "Dynamic generators of topologically embedded graphs") gives every edge a
signature, so that the combined signature of a closed walk says whether the walk is trivial in homology. Shortest paths
from the loops of that decomposition, which every non-separating loop crosses, then find the short ones (Erickson and
Whittlesey 2005, "Greedy optimal homotopy and homology generators").
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse import coo_matrix, csr_matrix
from scipy.sparse.csgraph import breadth_first_order, connected_components, dijkstra

from scoredist3d.meshes.mesh import Mesh
from scoredist3d.ops.mesh.topology import edge_faces

_SPACING = 16  # start points on a loop of the decomposition are at most this fraction of the longest loop apart
_MOST_STARTS = 2048  # of a mesh with many handles, only some start points are used; loops near them are still found
_BATCH = 32  # start points that are searched together; neighbors on a loop, so that their surroundings overlap
_MOST_CLASSES = 32  # different signatures among the loops of one batch; the shortest ones are kept
_BITS = 64


@dataclass(frozen=True)
class EdgeSignatures:
    """Edges of a closed triangle mesh of genus ``g``, with their homology signatures.

    The exclusive or of the signatures of the edges of a closed walk is 0 if the walk is trivial in homology modulo 2,
    for example if it bounds a part of the surface, and not 0 otherwise. Up to genus 32, each of 2g bits counts the
    crossings with one dual loop, modulo 2. Beyond, the signatures are a random linear map of these bits, and a walk is
    taken to be trivial by mistake with a probability of 2^-64.

    Attributes:
        edges: (E, 2) int64, vertices of the edges, the smaller first, in ascending order.
        signatures: (E,) uint64.
        loops: 2g loops that generate the homology, each as vertices (L,) int64 in order.
    """

    edges: np.ndarray
    signatures: np.ndarray
    loops: list[np.ndarray]


@dataclass(frozen=True)
class SurfaceLoop:
    """A simple closed loop of edges.

    Attributes:
        vertices: (L,) int64, in order; the last is connected with the first.
        length: Sum of the lengths of the edges, scene units.
        signature: Exclusive or of the signatures of the edges.
    """

    vertices: np.ndarray
    length: float
    signature: int


@dataclass(frozen=True)
class _SpanningForest:
    """Spanning trees of the components of a graph.

    Attributes:
        order: (N,) nodes; each follows its parent.
        parents: (N,) parent of each node, -1 for roots.
        edges: (N,) edge to the parent, -1 for roots.
    """

    order: np.ndarray
    parents: np.ndarray
    edges: np.ndarray


def edge_signatures(faces: np.ndarray) -> EdgeSignatures:
    """Homology signatures of the edges of the faces (F, 3) of a closed 2-manifold.

    The edges of a spanning tree of the vertices have signature 0. Each of the 2g edges that belong neither to it nor to
    a spanning tree of the faces has a code. The loop that it closes in the tree of faces crosses edges, and the
    signature of an edge combines the codes of the loops that cross it.
    """
    found = edge_faces(torch.from_numpy(np.ascontiguousarray(faces)))
    edges, sides = found.edges.numpy(), found.faces.numpy()
    tree = _spanning_forest(edges, int(faces.max()) + 1)
    others = np.setdiff1d(np.arange(len(edges)), tree.edges)
    cotree = _spanning_forest(sides[others], len(faces))
    rest = np.delete(others, cotree.edges[cotree.edges >= 0])
    codes = _codes(len(rest))
    at_faces = np.zeros(len(faces), dtype=np.uint64)
    for side in sides[rest].T:
        np.bitwise_xor.at(at_faces, side, codes)
    combined, parents = at_faces.tolist(), cotree.parents.tolist()
    for face in cotree.order[::-1].tolist():
        if parents[face] >= 0:
            combined[parents[face]] ^= combined[face]
    signatures = np.zeros(len(edges), dtype=np.uint64)
    signatures[rest] = codes
    inner = cotree.edges >= 0
    signatures[others[cotree.edges[inner]]] = np.array(combined, dtype=np.uint64)[inner]
    up = tree.parents.tolist()
    return EdgeSignatures(edges, signatures, [_tree_loop(up, *edges[edge].tolist()) for edge in rest])


def _codes(count: int) -> np.ndarray:
    """Linearly independent codes (count,) uint64: single bits, or random words if there are too few bits."""
    if count <= _BITS:
        return np.left_shift(np.uint64(1), np.arange(count, dtype=np.uint64))
    return np.random.default_rng(0).integers(1, 2**_BITS - 1, count, dtype=np.uint64, endpoint=True)


def _spanning_forest(ends: np.ndarray, size: int) -> _SpanningForest:
    """Breadth-first spanning forest of the graph of ``size`` nodes with edges between ``ends`` (E, 2)."""
    a, b = ends.T
    graph = coo_matrix((np.ones(len(ends), dtype=np.int8), (a, b)), shape=(size, size))
    roots = np.unique(connected_components(graph, directed=False)[1], return_index=True)[1]
    # One more node, connected with one node of each component, makes a tree of the forest.
    a, b = np.concatenate([a, roots]), np.concatenate([b, np.full(len(roots), size)])
    graph = coo_matrix((np.ones(len(a), dtype=np.int8), (a, b)), shape=(size + 1, size + 1)).tocsr()
    order, above = breadth_first_order(graph, size, directed=False)
    parents = np.where(above[:size] == size, -1, above[:size]).astype(np.int64)
    inner = np.flatnonzero(parents >= 0)
    edges = np.full(size, -1)
    edges[inner] = _edge_index(ends, size, np.stack([inner, parents[inner]], axis=1))
    return _SpanningForest(order[1:], parents, edges)


def _edge_index(edges: np.ndarray, size: int, wanted: np.ndarray) -> np.ndarray:
    """Indices (N,) of the edges between the nodes ``wanted`` (N, 2) among ``edges`` (E, 2), in any direction."""
    keys, search = (pairs.min(axis=1) * size + pairs.max(axis=1) for pairs in (edges, wanted))
    by_key = np.argsort(keys, kind="stable")
    found: np.ndarray = by_key[np.searchsorted(keys[by_key], search)]
    return found


def _tree_loop(parents: list[int], start: int, end: int) -> np.ndarray:
    """Loop (L,) of the edge between two nodes and their paths in a tree up to the first common node."""
    path = [start]
    while parents[path[-1]] >= 0:
        path.append(parents[path[-1]])
    places = {node: place for place, node in enumerate(path)}
    other = [end]
    while other[-1] not in places:
        other.append(parents[other[-1]])
    return np.array(path[: places[other[-1]]] + other[::-1])


def short_loops(mesh: Mesh, longest: float) -> list[SurfaceLoop]:
    """Non-separating loops of a closed mesh that are at most ``longest`` long, the shortest of each signature first.

    Loops are found from start points at a distance of ``longest / 16`` from each other, so a loop between two of them
    may be missed if it is nearly as long as ``longest``; otherwise, a loop that is longer by at most this distance is
    found in its place.

    Args:
        mesh: A closed 2-manifold.
        longest: Length in scene units.
    """
    labels = edge_signatures(mesh.faces)
    best: dict[int, SurfaceLoop] = {}
    if labels.loops:
        graph = _edge_graph(labels.edges, len(mesh.vertices))
        starts = _starts(labels.loops, mesh.vertices, longest / _SPACING)
        for first in range(0, len(starts), _BATCH):
            for loop in _loops_from(starts[first : first + _BATCH], mesh.vertices, graph, labels, longest):
                if loop.signature not in best or loop.length < best[loop.signature].length:
                    best[loop.signature] = loop
    return sorted(best.values(), key=lambda loop: loop.length)


def _edge_graph(edges: np.ndarray, size: int) -> csr_matrix:
    """Matrix (V, V) with the number of each of the edges (E, 2), counted from 1, in both directions."""
    numbers = np.tile(np.arange(1, len(edges) + 1), 2)
    ends = np.concatenate([edges, edges[:, ::-1]])
    return coo_matrix((numbers, ends.T), shape=(size, size)).tocsr()


def _starts(loops: list[np.ndarray], vertices: np.ndarray, spacing: float) -> np.ndarray:
    """Vertices (S,) of the loops, about ``spacing`` apart unless the edges are longer; each only once."""
    seen: set[int] = set()
    chosen: list[int] = []
    for loop in loops:
        points = vertices[loop].astype(np.float64)
        steps = np.linalg.norm(points - np.roll(points, 1, axis=0), axis=1).tolist()
        since = np.inf  # distance from the last chosen vertex
        for vertex, step in zip(loop.tolist(), steps, strict=True):
            since += step
            if vertex not in seen and since + step > spacing:
                chosen.append(vertex)
                since = 0.0
        seen.update(loop.tolist())
    return np.array(chosen)[:: -(-len(chosen) // _MOST_STARTS)]


def _loops_from(
    starts: np.ndarray, vertices: np.ndarray, graph: csr_matrix, labels: EdgeSignatures, longest: float
) -> Iterator[SurfaceLoop]:
    """Non-separating loops through ``starts`` (S,), at most ``longest`` long: the shortest one of each signature."""
    low, high = vertices[starts].min(axis=0) - longest / 2, vertices[starts].max(axis=0) + longest / 2
    nodes = np.flatnonzero(((vertices >= low) & (vertices <= high)).all(axis=1))
    part = graph[nodes][:, nodes].tocoo()
    once = part.row < part.col
    edges, number = np.stack([part.row, part.col], axis=1)[once].astype(np.int64), part.data[once] - 1
    codes = labels.signatures[number]
    ends = vertices[nodes[edges]].astype(np.float64)
    lengths = np.maximum(np.linalg.norm(ends[:, 0] - ends[:, 1], axis=1), 1e-12)
    distances, previous = dijkstra(
        coo_matrix((lengths, edges.T), shape=part.shape).tocsr(),
        directed=False,
        indices=np.searchsorted(nodes, starts),
        limit=longest / 2,
        return_predecessors=True,
    )
    paths = _path_signatures(previous, edges, codes)
    a, b = edges.T
    total = distances[:, a] + distances[:, b] + lengths
    closing = paths[:, a] ^ paths[:, b] ^ codes
    row, edge = np.nonzero((total <= longest) & (closing != 0))
    order = np.argsort(total[row, edge], kind="stable")
    row, edge = row[order], edge[order]
    firsts = np.sort(np.unique(closing[row, edge], return_index=True)[1])[:_MOST_CLASSES]
    for r, e in zip(row[firsts], edge[firsts], strict=True):
        loop = _tree_loop(previous[r].tolist(), *edges[e].tolist())
        # The paths to both ends of the edge may begin with the same edges, which are no part of the loop.
        length = total[r, e] - 2 * distances[r, loop].min()
        yield SurfaceLoop(nodes[loop], float(length), int(closing[r, e]))


def _path_signatures(previous: np.ndarray, edges: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Signatures (S, N) uint64 of the shortest paths to all nodes, 0 for unreached ones.

    Args:
        previous: (S, N) predecessor of each node on its path, negative for start points and unreached nodes.
        edges: (E, 2) edges.
        codes: (E,) their signatures.
    """
    starts, size = previous.shape
    row, node = np.nonzero(previous >= 0)
    found, up = np.zeros(starts * size, dtype=np.uint64), np.arange(starts * size)
    place = row * size + node
    up[place] = row * size + previous[row, node]
    found[place] = codes[_edge_index(edges, size, np.stack([node, previous[row, node]], axis=1))]
    # Each round doubles the length of the paths that are combined.
    while (up[place] != up[up[place]]).any():
        found[place] ^= found[up[place]]
        up[place] = up[up[place]]
    return found.reshape(starts, size)

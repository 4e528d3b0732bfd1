"""Signed distance to triangle meshes; the sign comes from the winding number.

The distance is exact. Its sign comes from the generalized winding number (Jacobson et al. 2013, "Robust inside-outside
segmentation using generalized winding numbers"): the signed solid angle of the mesh divided by 4 pi. It is 1 inside and
0 outside a closed mesh whose faces are counter-clockwise seen from outside. It is smooth across holes, so that open and
self-intersecting meshes also have a meaningful inside: the region where it exceeds 1/2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from scoredist3d.ops import backends, native
from scoredist3d.ops.mesh.topology import check_faces

BACKENDS = ("torch", "native")

# Maximum number of triangles in a leaf, MD_LEAF in native/mesh_distance.c.
_LEAF_SIZE = 8
# Number of point-triangle pairs that the torch backend processes at once.
_PAIRS = {"cpu": 2**19}
_PAIRS_ON_DEVICE = 2**24


@dataclass(frozen=True)
class ClosestPoints:
    """Closest points on a mesh.

    Attributes:
        points: (N, 3).
        faces: (N,) int64, face that contains each point (any one if several do).
        barycentric: (N, 3), weights of the vertices of the face, non-negative, with sum 1.
    """

    points: Tensor
    faces: Tensor
    barycentric: Tensor


def signed_distance(points: Tensor, vertices: Tensor, faces: Tensor, *, backend: str = "auto") -> Tensor:
    """Signed distance (N,) from ``points`` to a mesh, negative inside.

    Differentiable in points and vertices. (The motion of the closest point along the mesh does not contribute, since
    the distance is minimal there.)
    The gradient has length 1, except on the surface itself, where it is 0.

    Args:
        points: (N, 3) float.
        vertices: (V, 3) float, finite.
        faces: (F, 3) integer, counter-clockwise seen from outside; at least one.
        backend: auto, native (CPU, float32; searches a tree) or torch (tests every triangle for every point).

    Raises:
        ValueError: A shape is wrong, a value is not finite, or the backend is not usable.
    """
    closest = closest_point(points, vertices, faces, backend=backend)
    squared = (points - closest.points).square().sum(dim=1)
    apart = squared > 0
    distance = torch.where(apart, torch.where(apart, squared, 1.0).sqrt(), 0.0)
    return torch.where(winding_number(points, vertices, faces, backend=backend) > 0.5, -distance, distance)


def closest_point(points: Tensor, vertices: Tensor, faces: Tensor, *, backend: str = "auto") -> ClosestPoints:
    """Point of a mesh closest to each of ``points`` (N, 3); arguments and errors as for :func:`signed_distance`.

    Differentiable in ``vertices`` with the barycentric coordinates held fixed.
    """
    name = _checked_backend("closest point", backend, points, vertices, faces)
    with torch.no_grad():
        triangles = vertices[faces.long()]
        search = _closest_native if name == "native" else _closest_torch
        found, barycentric = search(points.detach(), triangles)
    corners = vertices[faces[found].long()]
    return ClosestPoints((barycentric[:, :, None] * corners).sum(dim=1), found, barycentric)


@torch.no_grad()
def winding_number(
    points: Tensor, vertices: Tensor, faces: Tensor, *, accuracy: float = 2.0, backend: str = "auto"
) -> Tensor:
    """Generalized winding number (N,) of a mesh at ``points``; not differentiable.

    The native backend approximates distant groups of triangles by the first two terms of their expansion (Barill et al.
    2018, "Fast winding numbers for soups and clouds"); the torch backend sums all solid angles.

    Args:
        points: (N, 3) float.
        vertices: (V, 3) float, finite.
        faces: (F, 3) integer; at least one.
        accuracy: A group is distant if its distance exceeds this multiple of its radius. 2 gives errors up to about
            0.05, 4 up to 0.01; the sign requires an error below 0.5.
        backend: auto, native or torch.

    Raises:
        ValueError: A shape is wrong, a value is not finite, or the backend is not usable.
    """
    name = _checked_backend("winding number", backend, points, vertices, faces)
    if not accuracy > 1:
        raise ValueError(f"winding number: accuracy must be above 1, got {accuracy}")
    triangles = vertices[faces.long()]
    if name == "torch":
        parts = points.split(_chunk(triangles))
        return torch.cat([_solid_angles(part[:, None], triangles).sum(dim=1) for part in parts]) / (4 * math.pi)
    tree = _build_tree(triangles)
    out = points.new_empty(len(points))
    mesh = (tree.triangles, tree.blocks, tree.moments, len(triangles), tree.depth)
    native.call("sd3d_mesh_winding", points.contiguous(), len(points), *mesh, float(accuracy), out)
    return out


def _checked_backend(name: str, backend: str, points: Tensor, vertices: Tensor, faces: Tensor) -> str:
    check_faces(faces)
    if points.ndim != 2 or points.shape[1] != 3 or vertices.ndim != 2 or vertices.shape[1] != 3:
        shapes = f"{tuple(points.shape)} and {tuple(vertices.shape)}"
        raise ValueError(f"{name}: points and vertices must be (N, 3) and (V, 3), got {shapes}")
    if points.dtype != vertices.dtype or points.device != vertices.device or faces.device != vertices.device:
        raise ValueError(
            f"{name}: points are {points.dtype} on {points.device}, vertices {vertices.dtype} on {vertices.device} and "
            f"faces on {faces.device}; all must be on the same device, points and vertices of the same dtype"
        )
    if not len(faces):
        raise ValueError(f"{name}: the mesh has no faces")
    if int(faces.min()) < 0 or int(faces.max()) >= len(vertices):
        found = f"{int(faces.min())} to {int(faces.max())}"
        raise ValueError(f"{name}: faces refer to vertices {found}, but there are only {len(vertices)}")
    if not bool(torch.isfinite(vertices.detach()).all()) or not bool(torch.isfinite(points.detach()).all()):
        raise ValueError(f"{name}: points and vertices must be finite")
    return backends.choose(name, backend, points.device, BACKENDS, points.dtype)


@dataclass(frozen=True)
class _Tree:
    """Bounding volume hierarchy with moments, for ``native/mesh_distance.c``."""

    order: Tensor  # (F,) face at each position
    triangles: Tensor  # (F, 3, 3) in that order
    blocks: Tensor
    boxes: Tensor
    moments: Tensor
    depth: int


def _build_tree(triangles: Tensor) -> _Tree:
    triangles = triangles.contiguous()
    count = len(triangles)
    depth = max(0, math.ceil(math.log2(count / _LEAF_SIZE)))
    nodes = 2 ** (depth + 1) - 1
    order = torch.empty(count, dtype=torch.int64)
    boxes, moments = triangles.new_empty(nodes, 6), triangles.new_empty(nodes, 16)
    blocks = triangles.new_empty(2**depth, 9, _LEAF_SIZE)
    native.call("sd3d_mesh_tree", triangles, triangles.mean(dim=1), count, depth, order, boxes, moments, blocks)
    return _Tree(order, triangles[order], blocks, boxes, moments, depth)


def _closest_native(points: Tensor, triangles: Tensor) -> tuple[Tensor, Tensor]:
    tree = _build_tree(triangles)
    places = torch.empty(len(points), dtype=torch.int64)
    barycentric = points.new_empty(len(points), 3)
    mesh = (tree.triangles, tree.blocks, tree.boxes, len(triangles), tree.depth)
    native.call("sd3d_mesh_closest", points.contiguous(), len(points), *mesh, places, barycentric)
    return tree.order[places], barycentric


def _closest_torch(points: Tensor, triangles: Tensor) -> tuple[Tensor, Tensor]:
    faces, coordinates = [], []
    for part in points.split(_chunk(triangles)):
        barycentric, squared = _project(part[:, None], triangles)
        face = squared.argmin(dim=1)
        faces.append(face)
        coordinates.append(barycentric[torch.arange(len(part), device=part.device), face])
    return torch.cat(faces), torch.cat(coordinates)


def _chunk(triangles: Tensor) -> int:
    return max(1, _PAIRS.get(triangles.device.type, _PAIRS_ON_DEVICE) // len(triangles))


def _project(points: Tensor, triangles: Tensor) -> tuple[Tensor, Tensor]:
    """Barycentric coordinates (..., 3) of the closest points of ``triangles`` (..., 3, 3), and squared distances (...).

    There are four candidates: the perpendicular projection, if it is inside the triangle, and the closest points on the
    three sides. All are points of the triangle, so rounding errors in slivers only affect the accuracy.
    """
    corners = triangles - points.unsqueeze(-2)
    a, b, c = corners.unbind(-2)
    normal = torch.linalg.cross(b - a, c - a)
    area = normal.square().sum(dim=-1)
    safe = torch.where(area > 0, area, 1.0)
    beta = (torch.linalg.cross(c - a, a) * normal).sum(dim=-1) / safe
    gamma = (torch.linalg.cross(a, b - a) * normal).sum(dim=-1) / safe
    best = torch.stack((1 - beta - gamma, beta, gamma), dim=-1)
    squared = (best.unsqueeze(-1) * corners).sum(dim=-2).square().sum(dim=-1)
    squared = torch.where((area > 0) & (best >= 0).all(dim=-1), squared, torch.inf)
    for k in range(3):
        start, edge = corners[..., k, :], corners[..., (k + 1) % 3, :] - corners[..., k, :]
        length = edge.square().sum(dim=-1)
        along = (-(start * edge).sum(dim=-1) / torch.where(length > 0, length, 1.0)).clamp(0, 1)
        candidate = (start + along.unsqueeze(-1) * edge).square().sum(dim=-1)
        coordinates = torch.stack((1 - along, along, torch.zeros_like(along)), dim=-1).roll(k, dims=-1)
        best = torch.where((candidate < squared).unsqueeze(-1), coordinates, best)
        squared = torch.minimum(candidate, squared)
    return best, squared


def _solid_angles(points: Tensor, triangles: Tensor) -> Tensor:
    """Signed solid angles (...), steradians, of triangles (..., 3, 3) seen from points (..., 3).

    Van Oosterom and Strackee 1983, "The solid angle of a plane triangle", eq. 8.
    """
    a, b, c = (triangles - points.unsqueeze(-2)).unbind(-2)
    x, y, z = a.norm(dim=-1), b.norm(dim=-1), c.norm(dim=-1)
    above = (a * torch.linalg.cross(b, c)).sum(dim=-1)
    below = x * y * z + (a * b).sum(dim=-1) * z + (b * c).sum(dim=-1) * x + (c * a).sum(dim=-1) * y
    return 2 * torch.atan2(above, below)

"""Trilinear interpolation on a regular grid, and signed distances to a mesh on such a grid."""

from __future__ import annotations

import torch
from torch import Tensor

from scoredist3d.meshes.mesh import Mesh
from scoredist3d.ops.mesh.distance import signed_distance


def trilinear(grid: Tensor, points: Tensor, radius: float) -> Tensor:
    """(N,) values at (N, 3) points, interpolated on a grid (G, G, G) of vertices that spans [-radius, radius]^3.

    The result can be differentiated any number of times. Points outside the cube get the value at the closest point of
    the cube.
    """
    resolution = grid.shape[0]
    position = ((points / radius + 1.0) * (0.5 * (resolution - 1))).clamp(0.0, resolution - 1.0)
    cell = position.detach().long().clamp_max(resolution - 2)
    x, y, z = (position - cell).unbind(-1)
    first = (cell[:, 0] * resolution + cell[:, 1]) * resolution + cell[:, 2]
    flat = grid.reshape(-1)

    def along_z(offset: int) -> Tensor:
        low = flat[first + offset]
        return low + z * (flat[first + offset + 1] - low)

    def along_yz(offset: int) -> Tensor:
        low = along_z(offset)
        return low + y * (along_z(offset + resolution) - low)

    low = along_yz(0)
    return low + x * (along_yz(resolution**2) - low)


def distance_grid(mesh: Mesh, radius: float, resolution: int) -> Tensor:
    """(G, G, G) float32 signed distances to a mesh, indexed [x, y, z], for :func:`trilinear` in the ball of ``radius``.

    Grid vertices that are not used for interpolation inside the ball get a lower bound instead: the distance to the
    smallest ball around the origin that contains the mesh. Nearly half of the vertices are of this kind, and their
    distances would be the most expensive to compute.
    """
    axis = torch.linspace(-radius, radius, resolution)
    points = torch.cartesian_prod(axis, axis, axis)
    vertices, faces = torch.from_numpy(mesh.vertices), torch.from_numpy(mesh.faces)
    reach = points.norm(dim=-1)
    distances = reach - vertices.norm(dim=-1).max()
    used = reach <= radius * (1.0 + 2.0 * 3.0**0.5 / (resolution - 1))
    distances[used] = signed_distance(points[used], vertices, faces)
    return distances.view(resolution, resolution, resolution)

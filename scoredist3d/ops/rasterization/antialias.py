"""Silhouette antialiasing, which makes the visibility of rasterized triangles differentiable.

The method is that of Laine et al. 2020 (https://arxiv.org/abs/2011.03277, section 3.6). If two adjacent pixels show
different surfaces and the silhouette of the nearer surface passes between their centers, the color of one pixel is
blended into the other, depending on the position of the silhouette. Let A be the pixel of the nearer surface, B the
other one, c_A and c_B their colors, t the fraction of the distance from A to B at which the silhouette crosses, and
``s = t - 1/2``. If s > 0, then ``s (c_A - c_B)`` is added to pixel B, otherwise to pixel A. Edges closer to vertical
affect only horizontal pairs, the others only vertical pairs, so that moving a straight edge by d along its normal
changes the covered area by exactly d times its length.

The paper considers only the edges of the two visible triangles. Here a walk over the mesh goes from A towards B until
the surface ends or folds back: in a fine mesh the triangle with the silhouette edge is thin and seldom covers a pixel
center (of the 617 crossings of a sphere of 20,480 triangles at 256 x 256 pixels, only 8 are edges of the triangle at
A).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from scoredist3d.ops import backends
from scoredist3d.ops.gather import gather_rows
from scoredist3d.ops.rasterization.fragments import Fragments
from scoredist3d.ops.rasterization.kernels import BACKENDS, kernels, prepared_faces


@dataclass(frozen=True)
class EdgeTopology:
    """Adjacency of triangles across edges; it depends only on the faces, so compute it once per mesh.

    Attributes:
        across: (F, 3) int32. Half-edge 3 f + e is the edge of triangle f opposite to its corner e; entry (f, e) is the
            half-edge of the adjacent triangle at the same edge, or -1 if there is none. Edges of three or more
            triangles count as boundary edges.
    """

    across: Tensor


def mesh_edges(faces: Tensor) -> EdgeTopology:
    """Adjacency of the triangles ``faces`` (F, 3) across their edges."""
    # Half-edges of the same two vertices have the same key, so that sorting makes them adjacent. No shape depends on
    # the data, so the host does not synchronize with the device.
    first, second = faces.roll(-1, 1).reshape(-1).long(), faces.roll(-2, 1).reshape(-1).long()
    key, order = ((torch.minimum(first, second) << 32) | torch.maximum(first, second)).sort()
    same = torch.nn.functional.pad(key[1:] == key[:-1], (2, 2))  # same[p + 2]: positions p and p + 1 have the same key
    with_next = same[2:-1] & ~same[1:-2] & ~same[3:] if len(key) else same[:0]
    partner = torch.where(with_next, order.roll(-1), torch.where(with_next.roll(1), order.roll(1), -1))
    across = torch.empty(faces.shape, dtype=torch.int32, device=faces.device)
    return EdgeTopology(across.view(-1).scatter_(0, order, partner.int()).view(faces.shape))


def antialias(
    image: Tensor,
    fragments: Fragments,
    clip: Tensor,
    faces: Tensor,
    *,
    topology: EdgeTopology | None = None,
    backend: str = "auto",
) -> Tensor:
    """Blend the colors of adjacent pixels across silhouettes; differentiable in ``image`` and ``clip``.

    Args:
        image: (B, H, W, C), arbitrary values per pixel.
        fragments: Result of the rasterization.
        clip: (B, V, 4), rasterized vertices in clip space.
        faces: (F, 3), rasterized faces. Vertices must not be duplicated at texture seams, which would become
            boundaries.
        topology: ``mesh_edges(faces)``; computed if not given.
        backend: auto, torch, native (CPU) or triton (CUDA). With triton the result is differentiable once, otherwise
            any number of times.

    Returns:
        (B, H, W, C).

    Raises:
        ValueError: Shapes do not match, or the backend is not usable.
    """
    if image.ndim != 4 or image.shape[:3] != fragments.triangle.shape:
        expected = tuple(fragments.triangle.shape)
        raise ValueError(
            f"antialias: the image must be (B, H, W, C) with (B, H, W) = {expected}, got {tuple(image.shape)}"
        )
    faces = prepared_faces("antialias", clip, faces)
    topology = mesh_edges(faces) if topology is None else topology
    if topology.across.shape != faces.shape:
        raise ValueError(
            f"antialias: the topology belongs to {len(topology.across)} faces, but the mesh has {len(faces)}; "
            "recompute it with mesh_edges(faces)"
        )
    name = backends.choose("antialias", backend, clip.device, BACKENDS, clip.dtype)
    if name == "triton":
        from scoredist3d.ops.rasterization import antialias_triton

        found = (fragments.triangle, fragments.depth)
        return antialias_triton.antialias(image.float(), clip, faces, topology.across, *found).to(image.dtype)
    with torch.no_grad():
        codes = kernels(name).silhouettes(clip, faces, topology.across, fragments.triangle, fragments.depth)
    return _blend(image, _crossings(codes, clip, faces))


@dataclass(frozen=True)
class _Crossings:
    """K silhouettes between pixels, (K,) each: flat indices of near and far pixel, position between them (0 to 1)."""

    near: Tensor
    far: Tensor
    way: Tensor


def _crossings(codes: Tensor, clip: Tensor, faces: Tensor) -> _Crossings:
    """Crossings of the encoded silhouettes ``codes`` (B, 2, H, W), differentiable in ``clip``."""
    height, width = codes.shape[2:]
    place = codes.reshape(-1).nonzero()[:, 0]
    code = codes.reshape(-1)[place] - 1
    image, pixel = place // (2 * height * width), place % (height * width)
    vertical = place // (height * width) % 2 == 1
    swapped, edge = code % 2 == 1, code // 2
    first = image * height * width + pixel
    second = first + torch.where(vertical, width, 1)
    near, far = torch.where(swapped, second, first), torch.where(swapped, first, second)
    corner, face = edge % 3, edge // 3
    ends = torch.stack((faces[face, (corner + 1) % 3], faces[face, (corner + 2) % 3]), dim=1).long()
    points = gather_rows(clip.reshape(-1, 4), ends + (image * clip.shape[1])[:, None])  # (K, 2, 4)
    return _Crossings(near, far, _way(points, near, vertical, swapped, height, width))


def _way(points: Tensor, near: Tensor, vertical: Tensor, swapped: Tensor, height: int, width: int) -> Tensor:
    """Distances, in pixels from the center of the near pixel, at which edges (K, 2, 4) cross its row or column.

    With the origin at the pixel center and (u, v) along and across the pair, the line through the end points p and q
    is ``p x q`` in (u, v, w), and crosses v = 0 at ``u = (u_p v_q - v_p u_q) / (w_p v_q - v_p w_q)``.
    """
    row, column = near // width % height, near % width
    x = (2 * column + 1).to(points.dtype) / width - 1
    y = 1 - (2 * row + 1).to(points.dtype) / height
    w = points[..., 3]
    right = (points[..., 0] - x[:, None] * w) * (0.5 * width)
    down = (y[:, None] * w - points[..., 1]) * (0.5 * height)
    u = torch.where(vertical[:, None], down, right) * torch.where(swapped, -1.0, 1.0).to(w.dtype)[:, None]
    v = torch.where(vertical[:, None], right, down)
    return (u[:, 0] * v[:, 1] - v[:, 0] * u[:, 1]) / (w[:, 0] * v[:, 1] - v[:, 0] * w[:, 1])


def _blend(image: Tensor, crossings: _Crossings) -> Tensor:
    """Add ``s (c_A - c_B)`` (see the module docstring) at each crossing to pixel A or B."""
    flat = image.reshape(-1, image.shape[-1])
    share = crossings.way.to(image.dtype) - 0.5
    colors = gather_rows(flat, torch.stack((crossings.near, crossings.far), dim=1))  # (K, 2, C)
    change = share[:, None] * (colors[:, 0] - colors[:, 1])
    target = torch.where(share > 0, crossings.far, crossings.near)
    return flat.index_add(0, target, change).reshape(image.shape)

"""Silhouette antialiasing, which gives a rasterised image its gradient with respect to visibility.

After Laine et al. 2020 (https://arxiv.org/abs/2011.03277, section 3.6): where two adjacent pixels show different
surfaces and the silhouette of the nearer one runs between their centres, the silhouette's position between the centres
blends the colour of one pixel into the other. With t the fraction of the way from the near surface's pixel A to the
other, B, at which the silhouette crosses, ``s = t - 1/2`` and colours c_A, c_B: pixel B gains ``s (c_A - c_B)`` if
s > 0, else pixel A does. A straight edge that moves by d along its normal then changes the covered area by exactly d
times its length, because edges nearer to the vertical count for horizontal pairs only, the others for vertical ones.

Where that paper looks at the edges of the two visible triangles alone, we walk over the mesh from A towards B until the
surface ends or turns back: on a fine mesh the triangle with the silhouette edge is thin and seldom covers a centre (of
the 617 crossings of a sphere of 20,480 triangles at 256 x 256 pixels, only 8 have it in the triangle at A).
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
    """Which triangles share an edge; depends on the faces alone, so compute it once for a fixed mesh.

    Attributes:
        across: (F, 3) int32. Half-edge 3 f + e is the edge of triangle f opposite to its corner e; the entry is the
            half-edge of the triangle on the other side (whose opposite corner is that triangle's third vertex), or -1
            if there is none. Edges of three triangles and more count as open.
    """

    across: Tensor


def mesh_edges(faces: Tensor) -> EdgeTopology:
    """Pair the half-edges of ``faces`` (F, 3)."""
    # Half-edges of the same two vertices have the same key and become neighbours by sorting; nothing here depends on
    # how many there are, so that a GPU need not be waited for.
    first, second = faces.roll(-1, 1).reshape(-1).long(), faces.roll(-2, 1).reshape(-1).long()
    key, order = ((torch.minimum(first, second) << 32) | torch.maximum(first, second)).sort()
    same = torch.nn.functional.pad(key[1:] == key[:-1], (2, 2))  # place p is like p + 1: same[p + 2]
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
    """Blend pixels across silhouettes; differentiable in ``image`` and ``clip``.

    Args:
        image: (B, H, W, C), any values per pixel.
        fragments: What was rasterised.
        clip: (B, V, 4), the clip-space vertices that were rasterised.
        faces: (F, 3), the faces that were rasterised; vertices doubled at texture seams would look like open edges.
        topology: ``mesh_edges(faces)``, computed here if not given.
        backend: auto, torch, native (CPU) or triton (CUDA); with triton it is differentiable once, else any number of
            times.

    Returns:
        (B, H, W, C).

    Raises:
        ValueError: On shapes that disagree, or a backend that cannot be used.
    """
    if image.ndim != 4 or image.shape[:3] != fragments.triangle.shape:
        expected = tuple(fragments.triangle.shape)
        raise ValueError(f"antialias: the image must be (B, H, W, C) with {expected} first, got {tuple(image.shape)}")
    faces = prepared_faces("antialias", clip, faces)
    topology = mesh_edges(faces) if topology is None else topology
    if topology.across.shape != faces.shape:
        raise ValueError(
            f"antialias: the topology is of {len(topology.across)} faces and there are {len(faces)};"
            " compute it anew with mesh_edges(faces)"
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
    """(K,) silhouettes between two pixels: flat indices of the near and the far one, way from near to far."""

    near: Tensor
    far: Tensor
    way: Tensor


def _crossings(codes: Tensor, clip: Tensor, faces: Tensor) -> _Crossings:
    """Where the silhouettes found (B, 2, H, W) cross, differentiable with respect to ``clip``."""
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
    """Position, in pixels from the near one's centre, at which the edges (K, 2, 4) cross the rows or columns.

    With the pixel's centre moved to the origin and (u, v) along and across the pair, the line through the end points
    p and q is ``p x q`` in (u, v, w), and meets v = 0 at ``u = (u_p v_q - v_p u_q) / (w_p v_q - v_p w_q)``.
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
    """Add each crossing's share of the colour difference to the pixel that it reaches into."""
    flat = image.reshape(-1, image.shape[-1])
    share = crossings.way.to(image.dtype) - 0.5
    colours = gather_rows(flat, torch.stack((crossings.near, crossings.far), dim=1))  # (K, 2, C)
    change = share[:, None] * (colours[:, 0] - colours[:, 1])
    target = torch.where(share > 0, crossings.far, crossings.near)
    return flat.index_add(0, target, change).reshape(image.shape)

"""Differentiable triangle rasterization: visibility, interpolation, textures and silhouette antialiasing.

The layout is that of nvdiffrast (Laine et al. 2020, https://arxiv.org/abs/2011.03277), except that images start with
the top row. ``rasterize`` finds the visible triangles, which has no gradient; their barycentric coordinates are
differentiable functions of the clip positions, and :func:`antialias` makes coverage differentiable. Clip positions are
``(vertices, 1) @ (projection @ w2c)^T``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from scoredist3d.ops import backends
from scoredist3d.ops.gather import blend_rows, gather_rows
from scoredist3d.ops.rasterization.antialias import EdgeTopology, antialias, mesh_edges
from scoredist3d.ops.rasterization.fragments import BACKENDS as FRAGMENT_BACKENDS
from scoredist3d.ops.rasterization.fragments import Fragments, put_rows, shade_hits
from scoredist3d.ops.rasterization.kernels import BACKENDS, kernels, prepared_faces
from scoredist3d.ops.rasterization.texture import sample_texture

__all__ = ["EdgeTopology", "Fragments", "antialias", "interpolate", "mesh_edges", "rasterize", "sample_texture"]


def rasterize(clip: Tensor, faces: Tensor, height: int, width: int, *, backend: str = "auto") -> Fragments:
    """Find the nearest triangle at every pixel center, with differentiable barycentric coordinates and depth.

    Both sides of a triangle are drawn. A pixel center on an edge that two triangles share belongs to exactly one of
    them (top-left rule); of triangles with equal depth, the first is visible. Triangles may cross the plane of the
    camera: parts with w <= 0 or z outside [-w, w] are discarded per pixel. Triangles with a non-finite corner are not
    drawn.

    Args:
        clip: (B, V, 4), OpenGL clip space: y up, visible z in [-w, w].
        faces: (F, 3), integers.
        height, width: Pixels.
        backend: auto, torch, native (CPU), triton or nvdiffrast (CUDA). All but the last give exactly the same
            triangles. nvdiffrast only finds triangles; the other steps then use the backend that auto selects.

    Raises:
        ValueError: A shape is wrong, a vertex index is out of range (checked on the CPU), or the backend is not usable.
    """
    if height < 1 or width < 1:
        raise ValueError(f"rasterize: height and width must be 1 or more, got {height} and {width}")
    faces = prepared_faces("rasterize", clip, faces)
    name = backends.choose("rasterize", backend, clip.device, (*BACKENDS, "nvdiffrast"), clip.dtype)
    with torch.no_grad():
        triangle = kernels(name).visible_triangles(clip, faces, height, width)
    return shade_hits(clip, faces, triangle, backend="auto" if name == "nvdiffrast" else name)


def interpolate(
    attributes: Tensor,
    fragments: Fragments,
    faces: Tensor,
    *,
    attribute_faces: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Interpolate vertex attributes at every pixel, with perspective correction; 0 where there is no triangle.

    Differentiable in the attributes and, through the barycentric coordinates, in the clip positions.

    Args:
        attributes: (V, C), or (B, V, C) with one set per image.
        fragments: Result of the rasterization.
        faces: (F, 3), rasterized faces.
        attribute_faces: (F, 3), row of ``attributes`` for each corner, if it differs from the vertex index (for example
            for texture coordinates).
        backend: auto, torch, native (CPU) or triton (CUDA); all but torch are differentiable once.

    Returns:
        (B, H, W, C).

    Raises:
        ValueError: Shapes do not match.
    """
    corners = faces if attribute_faces is None else attribute_faces
    batch = fragments.triangle.shape[0]
    if corners.shape != faces.shape:
        raise ValueError(
            f"interpolate: attribute_faces {tuple(corners.shape)} must have the shape of faces {tuple(faces.shape)}"
        )
    if attributes.ndim not in (2, 3) or (attributes.ndim == 3 and attributes.shape[0] != batch):
        shape = tuple(attributes.shape)
        raise ValueError(f"interpolate: attributes must be (V, C) or ({batch}, V, C), got {shape}")
    name = backends.choose("interpolation", backend, attributes.device, FRAGMENT_BACKENDS, attributes.dtype)
    if name == "triton":
        from scoredist3d.ops.rasterization import fragments_triton

        weights = fragments.barycentric.to(attributes.dtype)
        return fragments_triton.interpolate(attributes, weights, fragments.triangle, corners)
    index = corners.long()[fragments.hit_triangles]
    if attributes.ndim == 3:
        index = index + (fragments.hit_images * attributes.shape[1])[:, None]
    uv = gather_rows(fragments.barycentric.reshape(-1, 2), fragments.hit_pixels)
    weights = torch.cat((uv, 1 - uv.sum(dim=1, keepdim=True)), dim=1).to(attributes.dtype)
    rows = blend_rows(attributes.reshape(-1, attributes.shape[-1]), index, weights, backend=name)
    shape = (*fragments.triangle.shape, attributes.shape[-1])
    return put_rows(rows, fragments.hit_pixels, fragments.triangle.numel()).reshape(shape)

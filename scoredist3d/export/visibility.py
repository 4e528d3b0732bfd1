"""How well the training cameras see the surface of a mesh."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from scoredist3d.cameras import Cameras
from scoredist3d.meshes.lattice import Lattice
from scoredist3d.meshes.mesh import Mesh
from scoredist3d.ops.rasterization.rasterize import rasterize
from scoredist3d.renderers.mesh_rasterizer import clip_positions

_SIZE = 256  # pixels, height of the depth images
_LEAST_COSINE = 0.15  # of the angle between normal and view; views at larger angles give no reliable color
_USUAL = 0.2  # exposure of well seen parts of most objects
_LIFT = 2.0  # pixels; offset along the normal, so that the surface does not occlude itself
_CREASE = 0.87  # least cosine between the normals of a face and of its vertices on a smooth surface


@torch.no_grad()
def exposure(mesh: Mesh, lattice: Lattice, cameras: Cameras, *, both_sides: bool = False) -> np.ndarray:
    """Mean over all cameras of the cosine at which they see each corner of the lattice; 0 for hidden ones.

    Views with a cosine below 0.15 are not counted. A flat area that all cameras face directly has 1.

    Args:
        mesh: The mesh.
        lattice: Its subdivision.
        cameras: (B), all with the same image size.
        both_sides: Whether views from behind a face count too, as for an open surface.

    Returns:
        (T, 3) float32 in [0, 1], for each corner of each triangle of the lattice.
    """
    device = cameras.c2w.device
    vertices, faces = torch.from_numpy(mesh.vertices).to(device), torch.from_numpy(mesh.faces).to(device, torch.int32)
    corners = mesh.vertices[mesh.faces[lattice.face]]
    points = torch.from_numpy(np.einsum("tkc,tcx->tkx", lattice.barycentric, corners).reshape(-1, 3)).to(device)
    normals = torch.from_numpy(_corner_normals(mesh, lattice).reshape(-1, 3)).to(device)
    radius = float(np.linalg.norm(mesh.vertices, axis=1).max())
    cameras = cameras.with_size(_SIZE, max(1, round(_SIZE * cameras.width / cameras.height)))
    total = torch.zeros(len(points), device=device)
    for index in range(len(cameras)):
        camera = cameras[index]
        cosine = torch.nn.functional.cosine_similarity(normals, camera.origins - points, dim=1)
        outward = normals * cosine.sign()[:, None] if both_sides else normals
        cosine = cosine.abs() if both_sides else cosine
        facing = (cosine > _LEAST_COSINE).nonzero()[:, 0]
        pixel_size = 2.0 * torch.tan(camera.fovy / 2) / camera.height * camera.origins.norm()
        lifted = points[facing] + _LIFT * pixel_size * outward[facing]
        depth = rasterize(clip_positions(vertices, camera, radius), faces, camera.height, camera.width).depth[0]
        visible = _in_front(clip_positions(lifted, camera, radius)[0], depth)
        total[facing] += cosine[facing] * visible
    return (total / len(cameras)).reshape(-1, 3).cpu().numpy()


def relative_exposure(found: np.ndarray) -> np.ndarray:
    """Exposures, some of them positive, scaled so that well seen parts have 0.2 or more; close-ups have less."""
    scaled: np.ndarray = found / min(1.0, float(np.quantile(found[found > 0], 0.9)) / _USUAL)
    return scaled


def _in_front(clip: Tensor, depth: Tensor) -> Tensor:
    """(P,) bool: which points, (P, 4) in clip space, are in the image (H, W) and not behind its depth."""
    height, width = depth.shape
    w = clip[:, 3]
    ahead = w > 1e-6
    x, y, z = (clip[:, :3] / torch.where(ahead, w, 1.0)[:, None]).unbind(dim=1)
    column, row = ((x + 1) * width / 2).floor(), ((1 - y) * height / 2).floor()
    inside = ahead & (column >= 0) & (column < width) & (row >= 0) & (row < height)
    pixel = torch.where(inside, row * width + column, 0.0).long()
    return inside & (z <= depth.reshape(-1)[pixel])


def _corner_normals(mesh: Mesh, lattice: Lattice) -> np.ndarray:
    """(T, 3, 3) float32 unit normals at the corners of the lattice: smooth ones, but not across creases."""
    a, b, c = (mesh.vertices[mesh.faces[:, k]] for k in range(3))
    flat = _unit(np.cross(b - a, c - a))[:, None]
    smooth = mesh.vertex_normals()[mesh.faces]
    corners = np.where((smooth * flat).sum(axis=2, keepdims=True) > _CREASE, smooth, flat)
    return _unit(np.einsum("tkc,tcx->tkx", lattice.barycentric, corners[lattice.face])).astype(np.float32)


def _unit(vectors: np.ndarray) -> np.ndarray:
    unit: np.ndarray = vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-20)
    return unit

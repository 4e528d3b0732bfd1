"""Images of an exported mesh, drawn with the rasterizer of the package."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from scoredist3d.cameras import Cameras
from scoredist3d.export.bake import Textures
from scoredist3d.meshes.mesh import Mesh
from scoredist3d.meshes.tangents import corner_tangents
from scoredist3d.ops.gather import gather_rows
from scoredist3d.ops.mesh.regularizers import face_normals
from scoredist3d.ops.rasterization.fragments import Fragments
from scoredist3d.ops.rasterization.rasterize import interpolate, rasterize, sample_texture
from scoredist3d.ops.shading.color import linear_to_srgb, srgb_to_linear
from scoredist3d.renderers.base import over
from scoredist3d.renderers.mesh_rasterizer import clip_positions

_SAMPLES = 2  # per pixel along each axis
_GRAY = 0.75  # display sRGB of the untextured mesh
# The neutral light: a white light up and to the left of the camera, in camera axes, and an ambient light.
_TO_LIGHT = (-0.4, 0.6, 1.0)
_AMBIENT = 0.2


@dataclass(frozen=True)
class MeshViews:
    """``B`` images of a mesh over a white background; colors are display sRGB in [0, 1].

    Attributes:
        base_color: (B, H, W, 3), colors without lighting; None for a mesh without colors.
        lit: (B, H, W, 3), the colors under the neutral light with the shading normals; None for a mesh without colors,
            or if not requested.
        gray: (B, H, W, 3), a gray surface under the neutral light with one normal per face, which shows every crease.
        normals: (B, H, W, 3), shading normals n in world axes as colors (n + 1) / 2.
        opacity: (B, H, W, 1), covered share of each pixel.
        depth: (B, H, W, 1), mean distance from the camera, scene units; 0 where the opacity is 0.
    """

    base_color: Tensor | None
    lit: Tensor | None
    gray: Tensor
    normals: Tensor
    opacity: Tensor
    depth: Tensor


@torch.no_grad()
def draw_mesh(mesh: Mesh, textures: Textures | None, cameras: Cameras, radius: float, *, lit: bool = True) -> MeshViews:
    """Draw a mesh from ``B`` cameras, on their device.

    Args:
        mesh: Mesh with the texture coordinates of ``textures``. Without textures, it is drawn in its vertex colors, if
            it has any.
        textures: Base color and normal map.
        cameras: (B), outside the ball of ``radius``.
        radius: Radius of the ball that contains the mesh, scene units.
        lit: Whether to draw the colors under the neutral light as well.
    """
    drawing = _Drawing(mesh, textures, cameras.c2w.device)
    views = [drawing.view(cameras[index], radius, lit=lit) for index in range(len(cameras))]
    whole = {name: torch.cat([view[name] for view in views]) for name in views[0]}
    opacity = whole.pop("opacity")
    depth = whole.pop("depth") / opacity.clamp_min(1e-6)
    white = opacity.new_ones(3)
    images = {name: over(values, opacity, white).clamp(0.0, 1.0) for name, values in whole.items()}
    return MeshViews(
        base_color=images.get("base_color"),
        lit=images.get("lit"),
        gray=images["gray"],
        normals=images["normals"],
        opacity=opacity,
        depth=depth,
    )


class _Drawing:
    """A mesh with its textures as tensors.

    Args:
        mesh, textures: See :func:`draw_mesh`.
        device: Device of all tensors.
    """

    def __init__(self, mesh: Mesh, textures: Textures | None, device: torch.device) -> None:
        def tensor(values: np.ndarray) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(values)).to(device)

        self.vertices, self.faces = tensor(mesh.vertices), tensor(mesh.faces)
        self.normals, self.face_normals = tensor(mesh.vertex_normals()), face_normals(self.vertices, self.faces)
        self.color_map = self.normal_map = self.vertex_colors = None
        if textures is not None and mesh.uvs is not None and mesh.uv_faces is not None:
            self.uvs, self.uv_faces = tensor(mesh.uvs), tensor(mesh.uv_faces)
            self.color_map = tensor(textures.base_color).float() / 255.0
            if textures.normal is not None:
                self.normal_map = tensor(textures.normal).float() / 127.5 - 1.0
                self.tangents = tensor(corner_tangents(mesh)).flatten(0, 1)
        elif mesh.vertex_colors is not None:
            self.vertex_colors = tensor(mesh.vertex_colors).float() / 255.0

    def view(self, camera: Cameras, radius: float, *, lit: bool) -> dict[str, Tensor]:
        """(1, H, W, C) maps from one camera, premultiplied by the opacity."""
        height, width = _SAMPLES * camera.height, _SAMPLES * camera.width
        clip = clip_positions(self.vertices, camera.with_size(height, width), radius)
        fragments = rasterize(clip, self.faces.to(torch.int32), height, width)
        uv = None if self.color_map is None else self._at_hits(self.uvs, fragments, self.uv_faces)
        shading, flat = self._shading_normals(fragments, uv), self.face_normals[fragments.hit_triangles]
        points = self._at_hits(self.vertices, fragments, self.faces)
        values = {
            "opacity": torch.ones_like(points[:, :1]),
            "depth": (points - camera.origins).norm(dim=-1, keepdim=True),
            "gray": _lit(torch.full_like(flat, _GRAY), flat, camera),
            "normals": 0.5 + 0.5 * shading,
        }
        color = self._colors(fragments, uv)
        if color is not None:
            values["base_color"] = color
            if lit:
                values["lit"] = _lit(color, shading, camera)
        joined = torch.cat(list(values.values()), dim=-1)
        image = joined.new_zeros(height * width, joined.shape[1]).index_copy(0, fragments.hit_pixels, joined)
        averaged = F.avg_pool2d(image.T.reshape(1, -1, height, width), _SAMPLES).movedim(1, -1)
        parts = averaged.split([part.shape[1] for part in values.values()], dim=-1)
        return dict(zip(values, parts, strict=True))

    def _at_hits(self, attributes: Tensor, fragments: Fragments, corners: Tensor) -> Tensor:
        """(P, C) attributes at the covered samples; ``corners`` (F, 3) are indices into (V, C) ``attributes``."""
        image = interpolate(attributes, fragments, self.faces, attribute_faces=corners)
        return gather_rows(image.reshape(-1, image.shape[-1]), fragments.hit_pixels)

    def _colors(self, fragments: Fragments, uv: Tensor | None) -> Tensor | None:
        """(P, 3) base colors of the covered samples; None for a mesh without colors."""
        if self.color_map is not None and uv is not None:
            return sample_texture(self.color_map, uv)
        return None if self.vertex_colors is None else self._at_hits(self.vertex_colors, fragments, self.faces)

    def _shading_normals(self, fragments: Fragments, uv: Tensor | None) -> Tensor:
        """(P, 3) unit normals of the covered samples in world axes, with the normal map if there is one."""
        normals = F.normalize(self._at_hits(self.normals, fragments, self.faces), dim=-1)
        if self.normal_map is None or uv is None:
            return normals
        corners = torch.arange(3 * len(self.faces), device=normals.device).view(-1, 3)
        frame = self._at_hits(self.tangents, fragments, corners)
        tangent = F.normalize(frame[:, :3] - (frame[:, :3] * normals).sum(-1, keepdim=True) * normals, dim=-1)
        bitangent = frame[:, 3:].sign() * torch.linalg.cross(normals, tangent, dim=-1)
        x, y, z = sample_texture(self.normal_map, uv).split(1, dim=-1)
        return F.normalize(x * tangent + y * bitangent + z * normals, dim=-1)


def _lit(color: Tensor, normals: Tensor, camera: Cameras) -> Tensor:
    """(P, 3) display colors under the neutral light, for unit world ``normals`` (P, 3)."""
    to_light = camera.c2w[0, :3, :3] @ F.normalize(color.new_tensor(_TO_LIGHT), dim=0)
    strength = _AMBIENT + (1.0 - _AMBIENT) * (normals * to_light).sum(-1, keepdim=True).clamp_min(0.0)
    return linear_to_srgb(srgb_to_linear(color) * strength)

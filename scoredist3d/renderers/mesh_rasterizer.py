"""Rasterization of triangle meshes with antialiased silhouettes (nvdiffrast, arXiv 2011.03277)."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from scoredist3d.backgrounds.base import Background
from scoredist3d.cameras import Cameras
from scoredist3d.config import option
from scoredist3d.geometry.base import Surface, SurfaceMesh, SurfacePoints
from scoredist3d.geometry.face_cache import FaceCache
from scoredist3d.geometry.protocols import HasSurface
from scoredist3d.limits import MAX_BATCH
from scoredist3d.materials.base import Light, Material, ShadingInputs
from scoredist3d.ops.gather import gather_rows
from scoredist3d.ops.mesh.regularizers import face_normals, vertex_normals
from scoredist3d.ops.rasterization.fragments import Fragments
from scoredist3d.ops.rasterization.rasterize import antialias, interpolate, mesh_edges, rasterize
from scoredist3d.registry import register
from scoredist3d.renderers.base import Render, Renderer, over
from scoredist3d.seeding import Rng

_edges_of = FaceCache(mesh_edges)


@dataclass(frozen=True)
class _VisiblePoints:
    """The P pixels covered by the mesh, and the surface points visible in them."""

    pixels: Tensor  # (P,) flat indices into (B, H, W)
    images: Tensor  # (P,) image indices
    points: Tensor  # (P, 3)
    normals: Tensor | None  # (P, 3)
    uv: Tensor | None  # (P, 2)


@register(
    "renderer",
    "mesh-rasterizer",
    summary="Rasterization of triangle meshes with antialiased silhouettes.",
    arxiv="2011.03277",
)
class MeshRasterizer(Renderer):
    """Renderer of triangle meshes, which shades the nearest triangle at each pixel center and antialiases silhouettes.

    The shaded point is a differentiable function of the vertices. Visibility is not differentiable, but antialiasing
    is: where a silhouette passes between two pixel centers, the colors and opacities of both pixels are blended
    according to the position of the silhouette, so silhouettes receive gradients from the images.
    """

    @dataclass
    class Config(Renderer.Config):
        """Options of the mesh rasterizer."""

        normals: Literal["smooth", "flat"] = option(
            "smooth", "Shading normals: interpolated vertex normals (smooth) or face normals (flat)."
        )
        antialias: bool = option(True, "Antialias silhouettes; without antialiasing, silhouettes receive no gradient.")
        supersample: Literal[1, 2] = option(1, "Samples per pixel along each axis; their mean is the pixel value.")
        evaluation_chunk: int = option(4, "Images per chunk in evaluation; limits memory use.", ge=1, le=MAX_BATCH)
        backend: Literal["auto", "torch", "native", "triton", "nvdiffrast"] = option(
            "auto", "Implementation of the rasterizer."
        )

    supports = HasSurface
    outputs = frozenset({"normal", "position"})

    def __init__(
        self,
        config: Config,
        *,
        geometry: Surface,
        material: Material,
        background: Background,
        rng: Rng | None = None,
    ) -> None:
        super().__init__(config, geometry=geometry, material=material, background=background)
        self.config = config

    def forward(self, cameras: Cameras, *, step: int, rng: Rng | None = None, needs: Set[str] = frozenset()) -> Render:
        """Render ``B`` images. Evaluation renders in chunks of images, with the same result."""
        # Half precision is too coarse for positions in the image.
        with torch.autocast(cameras.c2w.device.type, enabled=False):
            return self._render(cameras, step, rng, needs)

    def _render(self, cameras: Cameras, step: int, rng: Rng | None, needs: Set[str]) -> Render:
        """:meth:`forward` in full precision."""
        with_normal = "normal" in needs
        directions = cameras.rays().directions
        device = directions.device
        light = self.material.sample_light(cameras, step, None if rng is None else rng("light", step, device))
        background = self.background(directions, generator=None if rng is None else rng("background", step, device))
        mesh = self.geometry()
        chunk = len(cameras) if torch.is_grad_enabled() else self.config.evaluation_chunk
        images = torch.cat(
            [
                self._draw(mesh, cameras[part], None if light is None else light[part], with_normal)
                for part in (slice(first, first + chunk) for first in range(0, len(cameras), chunk))
            ]
        )
        rgb, opacity, depth, normal = images.split([self.material.num_channels, 1, 1, 3 if with_normal else 0], dim=-1)
        rgb = over(rgb, opacity, background)
        depth = depth / opacity.clamp_min(1e-6)
        origins = cameras.origins[:, None, None]
        return Render(
            # In a pixel with several silhouettes, the antialiased color can exceed 1.
            rgb=rgb if self.material.outputs_latents else rgb.clamp(0.0, 1.0),
            opacity=opacity,
            depth=depth,
            background=background,
            normal=F.normalize(normal, dim=-1) if with_normal else None,
            position=origins + depth.detach() * directions if "position" in needs else None,
            mesh=mesh,
        )

    def _draw(self, mesh: SurfaceMesh, cameras: Cameras, light: Light | None, with_normal: bool) -> Tensor:
        """(B, H, W, K): color, opacity, depth and, if requested, normal; all premultiplied by the opacity."""
        factor = self.config.supersample
        cameras = cameras.with_size(factor * cameras.height, factor * cameras.width)
        clip = clip_positions(mesh.vertices, cameras, self.geometry.radius)
        faces = mesh.faces.to(torch.int32)
        fragments = self._find(clip, faces, cameras)
        needs_normal = with_normal or light is not None or self.material.needs_normal
        hits = self._hits(mesh, fragments, needs_normal)
        towards = hits.points - cameras.origins[hits.images]
        distance = towards.norm(dim=-1, keepdim=True)
        features = cast(Surface, self.geometry).features(SurfacePoints(hits.points, hits.uv))
        inputs = ShadingInputs(
            features=features,
            points=hits.points,
            normals=hits.normals,
            view_dirs=towards / distance if self.material.needs_view_dirs else None,
            light=None if light is None else light[hits.images],
        )
        values = [self.material(inputs), torch.ones_like(distance), distance]
        if with_normal and hits.normals is not None:
            values.append(hits.normals)
        flat = torch.cat(values, dim=-1)
        images = flat.new_zeros(fragments.triangle.numel(), flat.shape[1]).index_copy(0, hits.pixels, flat)
        images = images.view(*fragments.triangle.shape, -1)
        if self.config.antialias and len(mesh.faces):
            # nvdiffrast stores images bottom-up, so its antialiasing cannot be used here; use a built-in backend.
            backend = "auto" if self.config.backend == "nvdiffrast" else self.config.backend
            topology = _edges_of(mesh.faces)
            images = antialias(images, fragments, clip, faces, topology=topology, backend=backend)
            images = _covered_once(images, self.material.num_channels)
        return _average(images, factor)

    def _find(self, clip: Tensor, faces: Tensor, cameras: Cameras) -> Fragments:
        """The visible triangles; empty for a mesh without faces."""
        height, width = cameras.height, cameras.width
        if len(faces):
            return rasterize(clip, faces, height, width, backend=self.config.backend)
        nothing = torch.zeros(len(cameras), height, width, dtype=torch.int32, device=clip.device)
        return Fragments(nothing, clip.new_zeros(*nothing.shape, 2), torch.ones_like(nothing, dtype=clip.dtype))

    def _hits(self, mesh: SurfaceMesh, fragments: Fragments, needs_normal: bool) -> _VisiblePoints:
        """The visible surface points. Counting the covered pixels is the only GPU synchronization."""
        smooth = needs_normal and self.config.normals == "smooth"
        attributes = [mesh.vertices, vertex_normals(mesh.vertices, mesh.faces)] if smooth else [mesh.vertices]
        at_hits = self._at_hits(torch.cat(attributes, dim=-1), fragments, mesh.faces)
        normals = uv = None
        if smooth:
            normals = F.normalize(at_hits[:, 3:], dim=-1)
        elif needs_normal:
            normals = gather_rows(face_normals(mesh.vertices, mesh.faces), fragments.hit_triangles)
        if mesh.uvs is not None and mesh.uv_faces is not None:
            uv = self._at_hits(mesh.uvs, fragments, mesh.uv_faces)
        return _VisiblePoints(fragments.hit_pixels, fragments.hit_images, at_hits[:, :3], normals, uv)

    def _at_hits(self, attributes: Tensor, fragments: Fragments, corners: Tensor) -> Tensor:
        """(P, C) attributes at the covered pixels, from (V, C) vertex attributes and (F, 3) indices ``corners``."""
        backend = "auto" if self.config.backend == "nvdiffrast" else self.config.backend
        image = interpolate(attributes, fragments, corners, backend=backend)
        return gather_rows(image.reshape(-1, image.shape[-1]), fragments.hit_pixels)


def clip_positions(vertices: Tensor, cameras: Cameras, radius: float) -> Tensor:
    """(B, V, 4) OpenGL clip-space positions of (V, 3) world points.

    The clip planes enclose the visible part of a ball of twice the ``radius``. The near plane is at a tenth of the
    distance from the camera to the ball of ``radius``: clip planes bound the depth along the viewing axis, and for
    points at the side of a wide image this depth is much smaller than the distance along the ray.
    """
    nearest, furthest = cameras.origins.norm(dim=-1).aminmax()
    near, far = (0.1 * (nearest - radius)).clamp_min(0.01 * radius), furthest + 2 * radius
    projection = cameras.projection()
    projection[:, 2, 2:] = torch.stack([-(far + near), -2 * far * near]) / (
        far - near
    )  # without a device synchronization
    matrix = projection @ cameras.w2c
    return vertices @ matrix[:, :, :3].transpose(1, 2) + matrix[:, None, :, 3]


def _covered_once(images: Tensor, channel: int) -> Tensor:
    """Limit the opacity of (B, H, W, K) pixels, at index ``channel``, to [0, 1] by scaling all channels.

    Antialiasing adds the contributions of all silhouettes in a pixel, so its opacity can leave the range.
    """
    opacity = images[..., channel : channel + 1]
    proper = (opacity >= 0) & (opacity <= 1)
    return torch.where(proper, images, images * (opacity > 1) / torch.where(proper, 1.0, opacity))


def _average(images: Tensor, factor: int) -> Tensor:
    """(B, H / factor, W / factor, K) means over blocks of (B, H, W, K) pixels."""
    if factor == 1:
        return images
    batch, height, width, channels = images.shape
    return images.view(batch, height // factor, factor, width // factor, factor, channels).mean(dim=(2, 4))

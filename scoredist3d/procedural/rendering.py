"""Anti-aliased rendering of procedural objects."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from scoredist3d.cameras import Cameras
from scoredist3d.ops.shading.directional import DEFAULT_LIGHT
from scoredist3d.procedural.objects import Objects
from scoredist3d.procedural.primitives import Hits, cast_rays
from scoredist3d.procedural.shading import shade

STANDARD_DISTANCE, STANDARD_FOVY_DEG = 3.2, 40.0
"""Distance and field of view of a camera from which an object nearly fills the image."""
_CPU_CHUNK, _DEVICE_CHUNK = 1 << 14, 1 << 22


@dataclass(frozen=True)
class ShapeRender:
    """Images of ``N`` objects.

    Attributes:
        rgba: (N, H, W, 4), straight alpha, display sRGB in [0, 1]; the color is zero where alpha is zero.
        depth: (N, H, W), mean distance along the ray over the covered part of the pixel; 0 where alpha is zero.
        normal: (N, H, W, 3), mean outward normal, unit length; zero where alpha is zero.
    """

    rgba: Tensor
    depth: Tensor
    normal: Tensor

    def over(self, background: Tensor) -> Tensor:
        """Composite the images over a background of shape (3,), (N, 3) or (N, H, W, 3); the result is (N, H, W, 3)."""
        if background.ndim == 2:
            background = background[:, None, None, :]
        rgb, alpha = self.rgba[..., :3], self.rgba[..., 3:]
        return rgb * alpha + background * (1.0 - alpha)


def render_objects(
    objects: Objects,
    cameras: Cameras,
    *,
    antialias: int = 2,
    light: Tensor | None = None,
    chunk_rays: int | None = None,
    cast: Callable[..., Hits] = cast_rays,
    shader: Callable[..., Tensor] | None = None,
) -> ShapeRender:
    """Render object i with camera i.

    A pixel is the mean over ``antialias``^2 rays; colors are weighted by coverage. The lighting is fixed in the world.
    Except on shiny and metal objects, it is diffuse, so a view-independent color field can represent it.

    Args:
        objects: N objects; repeat them for several views.
        cameras: N cameras, on the same device.
        antialias: Rays per pixel along each axis.
        light: (N, 3), directions towards the light; by default DEFAULT_LIGHT.
        chunk_rays: Rays per chunk; by default 2^14 on a CPU, which keeps temporaries in its cache, and 2^22 elsewhere.
        cast: Replacement for :func:`cast_rays`, e.g. a compiled version.
        shader: Replacement for :func:`shade`, e.g. a compiled version.

    Raises:
        ValueError: The numbers of objects and cameras differ.
    """
    if len(objects) != len(cameras):
        raise ValueError(
            f"cameras: {len(objects)} objects need one camera each, got {len(cameras)}; repeat objects or cameras"
        )
    if light is None:
        light = torch.tensor(DEFAULT_LIGHT, device=objects.device).expand(len(objects), 3)
    fine = cameras.with_size(cameras.height * antialias, cameras.width * antialias)
    on_cpu = objects.device.type == "cpu"
    if chunk_rays is None:
        chunk_rays = _CPU_CHUNK if on_cpu else _DEVICE_CHUNK
    step = max(1, chunk_rays // (fine.height * fine.width))
    parts = []
    for start in range(0, len(objects), step):
        chunk = slice(start, start + step)
        # Trimming depends on values and changes shapes: on a GPU it would cost a synchronization and a new graph.
        part = objects[chunk].trimmed() if on_cpu else objects[chunk]
        parts.append(_render(part, fine[chunk], light[chunk], antialias, cast, shader or shade))
    rgba, depth, normal = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return ShapeRender(rgba, depth, normal)


def _render(
    objects: Objects,
    fine: Cameras,
    light: Tensor,
    antialias: int,
    cast: Callable[..., Hits],
    shader: Callable[..., Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    directions = fine.rays().directions.flatten(1, 2)
    hits = cast(objects.geometry, fine.origins[:, None, :], directions)
    rgb = shader(objects.surface, objects.geometry, hits, light, directions)
    hit = torch.isfinite(hits.t)
    values = torch.cat([rgb, hit[..., None], torch.where(hit, hits.t, 0.0)[..., None], hits.normal], -1)
    values = values * hit[..., None]
    height, width = fine.height // antialias, fine.width // antialias
    mean = values.unflatten(1, (height, antialias, width, antialias)).mean((2, 4))
    alpha = mean[..., 3:4]
    covered = mean / alpha.clamp_min(1e-6)
    normal = torch.nn.functional.normalize(mean[..., 5:8], dim=-1)
    return torch.cat([covered[..., :3], alpha], -1), covered[..., 4], normal

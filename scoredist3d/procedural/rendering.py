"""Shading and anti-aliased rendering of procedural objects."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from scoredist3d.cameras import Cameras
from scoredist3d.procedural.attributes import BRICK, CHECKERED, DOTTED, STRIPED, WOODEN
from scoredist3d.procedural.objects import Objects
from scoredist3d.procedural.primitives import Hits, cast_rays, take_rows

# Direction towards the light: from above, slightly in front and to one side, so that top, front and both sides differ.
DEFAULT_LIGHT: tuple[float, float, float] = (0.45, 0.40, 0.80)
_AMBIENT, _SKY, _DIFFUSE = 0.45, 0.15, 0.45
_CPU_CHUNK, _DEVICE_CHUNK = 1 << 14, 1 << 22
_STRIPE_PERIOD = 0.38  # scene units
_CHECK_PERIOD = 0.44
_DOT_PERIOD = 0.30
_GRAIN_PERIOD = 0.17
_BRICK_PERIOD = 0.40


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

    A pixel is the mean over ``antialias``^2 rays; colors are weighted by coverage. The lighting is Lambertian with
    hemispheric ambient light and fixed in the world, so a view-independent color field can represent it.

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
    rgb = shader(objects.surface, objects.geometry, hits, light)
    hit = torch.isfinite(hits.t)
    values = torch.cat([rgb, hit[..., None], torch.where(hit, hits.t, 0.0)[..., None], hits.normal], -1)
    values = values * hit[..., None]
    height, width = fine.height // antialias, fine.width // antialias
    mean = values.unflatten(1, (height, antialias, width, antialias)).mean((2, 4))
    alpha = mean[..., 3:4]
    covered = mean / alpha.clamp_min(1e-6)
    normal = torch.nn.functional.normalize(mean[..., 5:8], dim=-1)
    return torch.cat([covered[..., :3], alpha], -1), covered[..., 4], normal


def shade(surface: Tensor, geometry: Tensor, hits: Hits, light: Tensor) -> Tensor:
    """Shaded colors of hits, (N, R, 3) in [0, 1]; a pure function without host synchronization.

    Args:
        surface: (N, E, 8), as in :class:`Objects`.
        geometry: (N, E, 21).
        hits: Result of :func:`cast_rays`.
        light: (N, 3), directions towards the light.
    """
    rows = take_rows(surface, hits.primitive)
    shape = take_rows(geometry[..., 0:14], hits.primitive)
    albedo = _pattern(rows, shape, hits)
    toward = torch.nn.functional.normalize(light, dim=-1)[:, None, :]
    lambert = (hits.normal * toward).sum(-1).clamp_min(0.0)
    sky = 0.5 * (1.0 + hits.normal[..., 2])
    return (albedo * (_AMBIENT + _SKY * sky + _DIFFUSE * lambert)[..., None]).clamp(0.0, 1.0)


def _pattern(rows: Tensor, shape: Tensor, hits: Hits) -> Tensor:
    """Unlit color, (N, R, 3), from the two colors, the pattern and the surface coordinates."""
    first, second, pattern, phase = rows[..., 0:3], rows[..., 3:6], rows[..., 6], rows[..., 7]
    u, v, rings, circumference = _surface_coordinates(shape, hits)
    stripes = _frac(rings / _STRIPE_PERIOD + phase) < 0.38
    # Checks of the second color are slightly smaller than their cells, so the main color covers most of the surface.
    cu, cv = _cells(u, circumference, _CHECK_PERIOD, 1), v / _CHECK_PERIOD + phase
    checks = _check(_frac(cu), _frac(cv)) | _check(_frac(cu + 0.5), _frac(cv + 0.5))
    row = torch.floor(v / _DOT_PERIOD + phase)
    du = _frac(_cells(u, circumference, _DOT_PERIOD, 1) + 0.5 * _frac(row / 2) * 2) - 0.5
    dv = _frac(v / _DOT_PERIOD + phase) - 0.5
    dots = du * du + dv * dv < 0.31**2
    two = ((pattern == STRIPED) & stripes) | ((pattern == CHECKERED) & checks) | ((pattern == DOTTED) & dots)
    color = torch.where(two[..., None], second, first)

    wave = 0.25 * torch.sin(5.0 * v + 6.0 * phase)
    grain = (pattern == WOODEN) & (_frac(_cells(u, circumference, _GRAIN_PERIOD, 1) + wave) < 0.4)
    color = torch.where(grain[..., None], 0.62 * color, color)
    course = v / (0.5 * _BRICK_PERIOD) + phase
    joint = _frac(_cells(u, circumference, _BRICK_PERIOD, 1) + 0.5 * _frac(torch.floor(course) / 2) * 2)
    mortar = (pattern == BRICK) & ((_frac(course) < 0.2) | (joint < 0.1))
    # Mortar contrasts with the bricks: it is darker for light colors and lighter for dark ones.
    joints = torch.where(color.mean(-1, keepdim=True) > 0.55, 0.62 * color, 0.5 * color + 0.36)
    return torch.where(mortar[..., None], joints, color)


def _surface_coordinates(shape: Tensor, hits: Hits) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Coordinates on the surface: lengths (u, v) in scene units, v for stripes, and the period of u.

    On round sides, u is the arc length and v the height. On flat faces, they are the two axes of the primitive that lie
    in the face, and the period of u is infinite. Near their poles, ellipsoids are mapped like flat faces, except that
    stripes remain rings.
    """
    half = 1.0 / shape[..., 0:9].unflatten(-1, (3, 3)).norm(dim=-1)
    x, y, z = (hits.local * half).unbind(-1)
    nx, ny, nz = hits.local_normal.abs().unbind(-1)
    round_side = (shape[..., 12] > 0) & (nz < 0.9)
    end = (nz >= nx) & (nz >= ny)
    radius = torch.maximum(half[..., 0], half[..., 1])
    angle = torch.atan2(hits.local[..., 1], hits.local[..., 0])
    u = torch.where(end, x, torch.where(nx >= ny, y, x))
    v = torch.where(end, y, z)
    u = torch.where(round_side, angle * radius, u)
    v = torch.where(round_side, z, v)
    rings = torch.where(shape[..., 13] > 0, z, v)
    return u, v, rings, torch.where(round_side, 2 * math.pi * radius, math.inf)


def _cells(u: Tensor, circumference: Tensor, period: float, minimum: int) -> Tensor:
    """``u`` in units of a period that is adapted so that a whole number of periods fits the circumference."""
    around = torch.isfinite(circumference)
    length = torch.where(around, circumference, 1.0)
    whole = torch.round(length / period).clamp_min(minimum)
    return torch.where(around, u * whole / length, u / period)


def _check(u: Tensor, v: Tensor) -> Tensor:
    return (u < 0.44) & (v < 0.44)


def _frac(x: Tensor) -> Tensor:
    return x - torch.floor(x)

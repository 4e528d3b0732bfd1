"""Lighting and finishes of procedural objects."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from scoredist3d.ops.shading.directional import directional_lighting
from scoredist3d.procedural.attributes import METAL, SHINY
from scoredist3d.procedural.builder import inverse_3x3
from scoredist3d.procedural.patterns import surface_color
from scoredist3d.procedural.primitives import Hits, take_rows

_EXPONENT, _HIGHLIGHT = 40.0, 0.9
_LIGHT_DISTANCE = 3.0  # of highlights; a near light moves over flat faces


def shade(
    surface: Tensor,
    geometry: Tensor,
    hits: Hits,
    light: Tensor,
    directions: Tensor,
    *,
    ink: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Shaded colors of hits, (N, R, 3) in [0, 1]; a pure function without host synchronization.

    Args:
        surface: (N, E, 8), as in :class:`Objects`.
        geometry: (N, E, 21).
        hits: Result of :func:`cast_rays`.
        light: (N, 3), directions towards the light.
        directions: (N, R, 3), directions of the rays; they need not be normalized.
        ink: Coverage (N, R) in [0, 1] and color (N, 3) of ink that is blended over the surface before lighting.
    """
    albedo, finish = surface_color(surface, geometry, hits)
    if ink is not None:
        coverage, color = ink
        albedo = torch.lerp(albedo, color[:, None, :].expand_as(albedo), coverage[..., None])
    toward = normalize(light, dim=-1)
    diffuse = albedo * directional_lighting(hits.normal, toward[:, None, :])[..., None]
    view = normalize(directions, dim=-1)
    point = _points(geometry, hits)
    facing = -(hits.normal * view).sum(-1)
    # The environment is near, so that its reflection varies over flat faces.
    mirrored = normalize(view + 2.0 * facing[..., None] * hits.normal + 0.8 * point, dim=-1)
    fresnel = ((1.0 - facing).clamp(0.0, 1.0) ** 5)[..., None]
    lamp = normalize(_LIGHT_DISTANCE * toward[:, None, :] - point, dim=-1)
    gloss = (hits.normal * normalize(lamp - view, dim=-1)).sum(-1).clamp_min(0.0)[..., None] ** _EXPONENT
    # A highlight replaces the color below it, so that it is white on every color.
    window = (_window(mirrored)[..., None] * (0.28 + 0.3 * fresnel) + 0.25 * fresnel).clamp(0.0, 1.0)
    shiny = torch.lerp(diffuse, torch.ones_like(diffuse), 1.0 - (1.0 - window) * (1.0 - _HIGHLIGHT * gloss))
    metal = albedo * _environment(mirrored)[..., None] + 0.12 * fresnel + 0.5 * gloss
    color = torch.where((finish == SHINY)[..., None], shiny, diffuse)
    return torch.where((finish == METAL)[..., None], metal, color).clamp(0.0, 1.0)


def _points(geometry: Tensor, hits: Hits) -> Tensor:
    """Hit points in the world, (N, R, 3)."""
    inverse = inverse_3x3(geometry[..., 0:9].unflatten(-1, (3, 3)))
    center = -(inverse * geometry[..., None, 9:12]).sum(-1, keepdim=True)
    rows = take_rows(torch.cat([inverse, center], -1).flatten(-2), hits.primitive).unflatten(-1, (3, 4))
    return (rows[..., 0:3] * hits.local[..., None, :]).sum(-1) + rows[..., 3]


def _environment(direction: Tensor) -> Tensor:
    """Brightness that a mirror sees in a direction, (N, R): a bright sky, a dark band at the horizon and the ground.

    Bright and dark panels alternate with the azimuth, so that vertical walls show reflections, too.
    """
    x, y, z = direction.unbind(-1)
    square = (x * x + y * y).clamp_min(1e-6)
    # cos(4 a) of the azimuth a, without a division by zero for vertical directions.
    cos2 = (x * x - y * y) / square
    panels = 2.0 * cos2 * cos2 - 1.0
    sky = 1.15 + 0.85 * _smooth(z, 0.05, 0.8)
    ground = 0.85 - 0.40 * _smooth(-z, 0.15, 0.9)
    above = _smooth(z, 0.0, 0.10)
    band = _smooth(z, -0.26, -0.14) * (1.0 - above)
    return torch.lerp(ground, sky, above) * (1.0 - 0.8 * band) * (1.0 + 0.35 * panels * square)


def _window(direction: Tensor) -> Tensor:
    """Coverage by a bright window above the horizon on every side, (N, R), which glossy paint reflects."""
    x, y, z = direction.unbind(-1)
    side = torch.maximum(x.abs(), y.abs()) * torch.rsqrt((x * x + y * y).clamp_min(1e-6))
    return _smooth(z, 0.10, 0.18) * (1.0 - _smooth(z, 0.55, 0.63)) * _smooth(side, 0.80, 0.84)


def _smooth(x: Tensor, low: float, high: float) -> Tensor:
    """Smooth step from 0 at ``low`` to 1 at ``high``."""
    t = ((x - low) / (high - low)).clamp(0.0, 1.0)
    return t * t * (3.0 - 2.0 * t)

"""Patterns of procedural objects: unlit colors from surface coordinates.

Every pattern lies at the same place on all objects of the same proportions. A whole number of stripes, rows and columns
fits each primitive, symmetric about its middle.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from scoredist3d.procedural.attributes import BRICK, CHECKERED, DOTTED, STRIPED, WOODEN
from scoredist3d.procedural.primitives import Hits, take_rows

# Sizes in scene units; objects are about 1.8 units large. The sizes of cells are targets, which are fitted to faces.
_STRIPES = 5.0  # stripes on a primitive, as far as the next two limits permit
_STRIPE_PERIOD = (0.20, 0.34)
_STRIPE_SHARE = 0.42
_CHECK = 0.22
_CHECK_SHARE = 0.88  # of the side of a cell, so that the main color covers most of the surface
_DOT = 0.31
_DOT_RADIUS = 0.33
_GRAIN = 0.20
_COURSE = 0.21
_BRICK_LENGTH = 0.42
_MORTAR = 0.042


class _Face(NamedTuple):
    """Centered coordinates (u, v) on the hit faces and the extents of the faces, each (N, R) in scene units.

    ``rings`` and ``ring_extent`` are the coordinate and the extent for stripes; ``around`` marks round sides.
    """

    u: Tensor
    v: Tensor
    width: Tensor
    height: Tensor
    rings: Tensor
    ring_extent: Tensor
    around: Tensor


def surface_color(surface: Tensor, geometry: Tensor, hits: Hits) -> tuple[Tensor, Tensor]:
    """Unlit color, (N, R, 3), and finish, (N, R), of hits.

    Args:
        surface: (N, E, 8), as in :class:`Objects`.
        geometry: (N, E, 21).
        hits: Result of :func:`cast_rays`.
    """
    rows = take_rows(torch.cat([surface, _layout(geometry)], -1), hits.primitive)
    first, second, pattern, finish = rows[..., 0:3], rows[..., 3:6], rows[..., 6], rows[..., 7]
    face = _face(rows[..., 8:], hits)
    two = (
        ((pattern == STRIPED) & _stripes(face))
        | ((pattern == CHECKERED) & _checks(face))
        | ((pattern == DOTTED) & _dots(face))
    )
    color = torch.where(two[..., None], second, first)
    color = torch.where((pattern == WOODEN)[..., None], color * _wood(face)[..., None], color)
    # Mortar contrasts with the bricks: it is darker for light colors and lighter for dark ones.
    joints = torch.where(color.mean(-1, keepdim=True) > 0.55, 0.62 * color, 0.5 * color + 0.36)
    return torch.where(((pattern == BRICK) & _mortar(face))[..., None], joints, color), finish


def _layout(geometry: Tensor) -> Tensor:
    """Sizes of primitives, (N, E, 9): half-sizes, width along x and y, height, middle height, and the quadric."""
    half = 1.0 / geometry[..., 0:9].unflatten(-1, (3, 3)).norm(dim=-1)
    low, high = geometry[..., 19], geometry[..., 20]
    wx = torch.maximum(geometry[..., 14] + geometry[..., 15] * low, geometry[..., 14] + geometry[..., 15] * high)
    wy = torch.maximum(geometry[..., 16] + geometry[..., 17] * low, geometry[..., 16] + geometry[..., 17] * high)
    height = ((high - low) * half[..., 2]).clamp_min(1e-3)
    middle = 0.5 * (high + low) * half[..., 2]
    width_x, width_y = (2 * half[..., 0] * wx).clamp_min(1e-3), (2 * half[..., 1] * wy).clamp_min(1e-3)
    sizes = torch.stack([width_x, width_y, height, middle], -1)
    return torch.cat([half, sizes, geometry[..., 12:14]], -1)


def _face(layout: Tensor, hits: Hits) -> _Face:
    """Coordinates on the surface.

    On round sides, u is the arc length and v the height. On flat faces, they are the two axes of the primitive that lie
    in the face. Near their poles, ellipsoids are mapped like flat faces. Stripes are rings on everything round.
    """
    x, y, z = (hits.local * layout[..., 0:3]).unbind(-1)
    width_x, width_y, height, middle, q_xy, q_z = layout[..., 3:].unbind(-1)
    z = z - middle
    nx, ny, nz = hits.local_normal.abs().unbind(-1)
    around = (q_xy > 0) & (nz < 0.9)
    end = (nz >= nx) & (nz >= ny)
    along_y = ~end & (nx >= ny)
    diameter = torch.maximum(width_x, width_y)
    # The half-sizes of an oval are made equal, so that its outline is a ring, too.
    px, py = x / width_x, y / width_y
    u = torch.where(around, torch.atan2(py, px) * diameter / 2, torch.where(along_y, y, x))
    width = torch.where(around, math.pi * diameter, torch.where(along_y, width_y, width_x))
    across = end & ~around
    v, extent = torch.where(across, y, z), torch.where(across, width_y, height)
    cap = across & (q_xy > 0) & (q_z == 0)
    radial = (px * px + py * py).sqrt() * diameter - diameter / 4
    rings = torch.where(cap, radial, torch.where(q_z > 0, z, v))
    ring_extent = torch.where(cap, diameter / 2, torch.where(q_z > 0, height, extent))
    return _Face(u, v, width, extent, rings, ring_extent, around)


def _stripes(face: _Face) -> Tensor:
    """A whole number of rings; parts that are too thin for one have none."""
    period = (face.ring_extent / _STRIPES).clamp(*_STRIPE_PERIOD)
    number = torch.round(face.ring_extent / period)
    offset = _frac((face.rings / face.ring_extent + 0.5) * number) - 0.5
    return offset.abs() < 0.5 * _STRIPE_SHARE


def _checks(face: _Face) -> Tensor:
    columns = torch.where(face.around, 2 * _count(face.width, 2 * _CHECK), _count(face.width, _CHECK))
    cu = (face.u / face.width + 0.5) * columns
    cv = (face.v / face.height + 0.5) * _count(face.height, _CHECK)
    odd = _frac((torch.floor(cu) + torch.floor(cv)) / 2) > 0.25
    near = torch.maximum((_frac(cu) - 0.5).abs(), (_frac(cv) - 0.5).abs()) < 0.5 * _CHECK_SHARE
    return odd & near


def _dots(face: _Face) -> Tensor:
    """Rows of dots; every other row is shifted by half a column."""
    columns, rows = _count(face.width, _DOT), _count(face.height, _DOT)
    cv = (face.v / face.height + 0.5) * rows
    shifted = (_frac(torch.floor(cv) / 2) > 0.25) & (face.around | (columns > 1))
    cu = (face.u / face.width + 0.5) * columns + 0.5 * shifted
    # On flat faces, shifted rows have one dot less, so that no dot is cut at an edge.
    whole = face.around | ~shifted | ((cu >= 1) & (cu < columns))
    step_u, step_v = face.width / columns, face.height / rows
    du, dv = (_frac(cu) - 0.5) * step_u, (_frac(cv) - 0.5) * step_v
    radius = _DOT_RADIUS * torch.minimum(step_u, step_v)
    return whole & (du * du + dv * dv < radius * radius)


def _wood(face: _Face) -> Tensor:
    """Brightness of wood: wavy dark grain along v, between boards of slightly different tones."""
    number = _count(face.width, _GRAIN)
    wave = 0.22 * torch.sin(5.0 * face.v) + 0.08 * torch.sin(13.0 * face.v + 1.0)
    cu = (face.u / face.width + 0.5) * number + wave
    tone = 1.0 - 0.08 * _frac(torch.floor(cu) * 0.618)
    grain = torch.where((_frac(cu) - 0.5).abs() < 0.14, 0.64, 1.0)
    fine = torch.where(_frac(2.0 * cu + 0.3 * torch.sin(9.0 * face.v)) < 0.2, 0.88, 1.0)
    return tone * torch.minimum(grain, fine)


def _mortar(face: _Face) -> Tensor:
    courses, columns = _count(face.height, _COURSE), _count(face.width, _BRICK_LENGTH)
    cv = (face.v / face.height + 0.5) * courses
    cu = (face.u / face.width + 0.5) * columns + 0.5 * (_frac(torch.floor(cv) / 2) > 0.25)
    horizontal = (0.5 - (_frac(cv) - 0.5).abs()) * face.height / courses
    vertical = (0.5 - (_frac(cu) - 0.5).abs()) * face.width / columns
    return torch.minimum(horizontal, vertical) < 0.5 * _MORTAR


def _count(extent: Tensor, size: float) -> Tensor:
    return torch.round(extent / size).clamp_min(1.0)


def _frac(x: Tensor) -> Tensor:
    return x - torch.floor(x)

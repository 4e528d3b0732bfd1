"""Clipped quadrics, optionally hollow, with closed-form ray casting and exact occupancy, batched over objects.

A primitive is a convex set. In its own frame ``L = M p + m``, where ``M`` and ``m`` are any affine map, it is

    { xlo wx(z) <= Lx <= wx(z),  |Ly| <= wy(z),  zlo <= Lz <= zhi,  q_xy (Lx^2 + Ly^2) + q_z Lz^2 <= wx(z)^2 }

with ``wx(z) = ax + bx z`` and ``wy(z) = ay + by z``. These are boxes, wedges and pyramids (q = 0), cylinders and cones
(q_xy = 1), ellipsoids and domes (q_xy = q_z = 1). A ray intersects a primitive in one interval. The table of an object
has ``NUM_SOLIDS`` solids followed by ``NUM_HOLES`` holes; hole ``i`` is subtracted from solid ``i`` only.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

NUM_SOLIDS = 16
NUM_HOLES = 4
NUM_COLUMNS = 21
# Columns of the geometry table: M (row-major), m, q_xy, q_z, ax, bx, ay, by, xlo, zlo, zhi.
_MATRIX, _OFFSET = slice(0, 9), slice(9, 12)
_Q_XY, _Q_Z, _AX, _BX, _AY, _BY, _XLO, _ZLO, _ZHI = range(12, 21)
_TINY = 1e-12
_FAR = 1e9


class Hits(NamedTuple):
    """First hits of R rays per object.

    Attributes:
        t: (N, R), distance in units of the direction's length; infinity for a miss.
        normal: (N, R, 3), outward unit normal in the world; zero for a miss.
        primitive: (N, R) int64, row of the geometry table whose surface was hit (holes come last); 0 for a miss.
        local: (N, R, 3), hit point in the frame of that primitive; zero for a miss.
        local_normal: (N, R, 3), outward unit normal along the axes of that frame, in world units; zero for a miss.
    """

    t: Tensor
    normal: Tensor
    primitive: Tensor
    local: Tensor
    local_normal: Tensor


def empty_geometry(count: int, device: torch.device | str) -> Tensor:
    """Primitives that contain no points, (count, NUM_COLUMNS)."""
    geometry = torch.zeros(count, NUM_COLUMNS, device=device)
    geometry[:, [0, 4, 8, _AX, _AY, _ZLO]] = 1.0
    geometry[:, [_XLO, _ZHI]] = -1.0
    return geometry


def num_solids(geometry: Tensor) -> int:
    """Number of solids in a table, which may be trimmed; the holes are always the last ``NUM_HOLES`` rows."""
    return geometry.shape[1] - NUM_HOLES


def _intervals(geometry: Tensor, origins: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
    """Interval of each ray inside each primitive; entry > exit for a miss.

    Args:
        geometry: (N, G, NUM_COLUMNS).
        origins: (N, R or 1, 3).
        directions: (N, R, 3).

    Returns:
        Entry and exit, (N, G, R).
    """
    column = [geometry[:, :, k, None] for k in range(NUM_COLUMNS)]
    px, py, pz = (origins[:, None, :, k] for k in range(3))
    vx, vy, vz = (directions[:, None, :, k] for k in range(3))
    m = column[_MATRIX]
    ox = m[0] * px + m[1] * py + m[2] * pz + column[9]
    oy = m[3] * px + m[4] * py + m[5] * pz + column[10]
    oz = m[6] * px + m[7] * py + m[8] * pz + column[11]
    dx = m[0] * vx + m[1] * vy + m[2] * vz
    dy = m[3] * vx + m[4] * vy + m[5] * vz
    dz = m[6] * vx + m[7] * vy + m[8] * vz
    q_xy, q_z, ax, bx, ay, by, xlo, zlo, zhi = column[12:21]

    wx, slope_x = ax + bx * oz, bx * dz
    wy, slope_y = ay + by * oz, by * dz
    # Half-spaces c1 t <= c0.
    planes = (
        (dx - slope_x, wx - ox),
        (xlo * slope_x - dx, ox - xlo * wx),
        (dy - slope_y, wy - oy),
        (-dy - slope_y, wy + oy),
        (dz, zhi - oz),
        (-dz, oz - zlo),
    )
    enter, leave = _half_space(*planes[0])
    for c1, c0 in planes[1:]:
        low, high = _half_space(c1, c0)
        enter, leave = torch.maximum(enter, low), torch.minimum(leave, high)

    # Quadric a t^2 + 2 b t + c <= 0; this form of the roots avoids cancellation.
    a = q_xy * (dx * dx + dy * dy) + q_z * dz * dz - slope_x * slope_x
    b = q_xy * (ox * dx + oy * dy) + q_z * oz * dz - wx * slope_x
    c = q_xy * (ox * ox + oy * oy) + q_z * oz * oz - wx * wx
    a = torch.where(a.abs() < _TINY, _TINY, a)
    discriminant = b * b - a * c
    root = discriminant.clamp_min(0.0).sqrt()
    q = -(b + torch.where(b < 0, -root, root))
    q = torch.where(q.abs() < _TINY, _TINY, q)
    r1, r2 = q / a, c / q
    near, far = torch.minimum(r1, r2), torch.maximum(r1, r2)
    # For a < 0 the ray is inside the double cone beyond either root; only the half of the cone with w > 0 counts.
    convex = a > 0
    miss = convex & (discriminant < 0)
    low = torch.where(convex, near, torch.where(slope_x > 0, far, -_FAR))
    high = torch.where(convex, far, torch.where(slope_x > 0, _FAR, near))
    curved = q_xy > 0
    low = torch.where(curved, torch.where(miss, _FAR, low), -_FAR)
    high = torch.where(curved, torch.where(miss, -_FAR, high), _FAR)
    return torch.maximum(enter, low), torch.minimum(leave, high)


def _half_space(c1: Tensor, c0: Tensor) -> tuple[Tensor, Tensor]:
    """Interval of t with c1 t <= c0.

    For a ray parallel to the plane, the interval is (almost) unbounded or empty, depending on the sign of c0.
    """
    t = c0 / torch.where(c1.abs() < _TINY, _TINY, c1)
    backwards = c1 <= -_TINY
    return torch.where(backwards, t, -_FAR), torch.where(backwards, _FAR, t)


def cast_rays(geometry: Tensor, origins: Tensor, directions: Tensor, *, group: int = 1) -> Hits:
    """First hit of each ray with each object's union of primitives.

    This is a pure function with fixed shapes and without host synchronization, suitable for ``torch.compile``. Rays
    must start outside the object.

    Args:
        geometry: (N, E, NUM_COLUMNS); see the module docstring.
        origins: (N, R, 3), or (N, 1, 3) if the rays of an object share their origin, which is faster.
        directions: (N, R, 3).
        group: Number of primitives processed at once; memory is proportional to it. 1 keeps temporaries in the cache of
            a CPU; the number of solids gives the smallest graph to compile.
    """
    solids = num_solids(geometry)
    best = torch.full(directions.shape[:2], float("inf"), device=directions.device, dtype=directions.dtype)
    index = torch.zeros(directions.shape[:2], device=directions.device, dtype=torch.int64)
    for start in range(0, solids, group):
        stop = min(start + group, solids)
        enter, leave = _intervals(geometry[:, start:stop], origins, directions)
        t = torch.where((enter <= leave) & (enter > 0), enter, float("inf"))
        row = torch.arange(start, stop, device=t.device)[None, :, None].expand_as(t)
        hollow = min(stop, NUM_HOLES) - start
        if hollow > 0:
            holes = geometry[:, solids + start : solids + start + hollow]
            inner, inside = _leave_holes(holes, origins, directions, enter[:, :hollow], leave[:, :hollow])
            t = torch.cat([torch.where(inside, inner, t[:, :hollow]), t[:, hollow:]], 1)
            row = torch.cat([row[:, :hollow] + solids * inside, row[:, hollow:]], 1)
        nearest, where = t.min(dim=1)
        closer = nearest < best
        index = torch.where(closer, row.gather(1, where[:, None])[:, 0], index)
        best = torch.where(closer, nearest, best)
    return _hits(geometry, origins, directions, best, index)


def _leave_holes(
    holes: Tensor, origins: Tensor, directions: Tensor, enter: Tensor, leave: Tensor
) -> tuple[Tensor, Tensor]:
    """Distance to the inner wall, (N, G, R), and whether the ray enters the solid through the hole."""
    hole_enter, hole_leave = _intervals(holes, origins, directions)
    inside = (hole_enter <= enter) & (enter <= hole_leave)
    reached = (enter <= leave) & (hole_leave < leave) & (hole_leave > 0)
    return torch.where(reached, hole_leave, float("inf")), inside


def take_rows(table: Tensor, rows: Tensor) -> Tensor:
    """Rows ``rows[n, r]`` of ``table[n]`` for a table (N, E, C); the result is (N, R, C)."""
    count, size = table.shape[:2]
    first = torch.arange(count, device=table.device)[:, None] * size
    return table.flatten(0, 1).index_select(0, (rows + first).flatten()).unflatten(0, rows.shape)


def _hits(geometry: Tensor, origins: Tensor, directions: Tensor, t: Tensor, index: Tensor) -> Hits:
    """Hits with their local positions and normals."""
    hit = torch.isfinite(t)
    point = origins + directions * torch.where(hit, t, 0.0)[..., None]
    rows = take_rows(geometry, index)
    matrix = rows[..., _MATRIX].unflatten(-1, (3, 3))
    local = (matrix * point[..., None, :]).sum(-1) + rows[..., _OFFSET]
    stretch = matrix.norm(dim=-1)  # 1 / half-size along each local axis
    sign = torch.where(index >= num_solids(geometry), -1.0, 1.0)
    gradient = _active_gradient(rows, local, stretch) * (sign * hit)[..., None]
    normal = torch.nn.functional.normalize((matrix * gradient[..., :, None]).sum(-2), dim=-1)
    local_normal = torch.nn.functional.normalize(gradient * stretch, dim=-1)
    return Hits(t, normal, index, local * hit[..., None], local_normal)


def _constraints(rows: Tensor, local: Tensor) -> list[tuple[Tensor, tuple[Tensor, Tensor, Tensor]]]:
    """Values and local gradients of all constraints, the quadric last.

    Values are negative inside; if a primitive has no quadric, the value of this constraint is -infinity.
    """
    x, y, z = local.unbind(-1)
    bx, by = rows[..., _BX], rows[..., _BY]
    wx, wy = rows[..., _AX] + bx * z, rows[..., _AY] + by * z
    q_xy, q_z, xlo = rows[..., _Q_XY], rows[..., _Q_Z], rows[..., _XLO]
    zero, one = torch.zeros_like(z), torch.ones_like(z)
    quadric = torch.where(q_xy > 0, q_xy * (x * x + y * y) + q_z * z * z - wx * wx, -math.inf)
    return [
        (x - wx, (one, zero, -bx)),
        (xlo * wx - x, (-one, zero, xlo * bx)),
        (y - wy, (zero, one, -by)),
        (-y - wy, (zero, -one, -by)),
        (z - rows[..., _ZHI], (zero, zero, one)),
        (rows[..., _ZLO] - z, (zero, zero, -one)),
        (quadric, (2 * q_xy * x, 2 * q_xy * y, 2 * (q_z * z - wx * bx))),
    ]


def _active_gradient(rows: Tensor, local: Tensor, stretch: Tensor) -> Tensor:
    """Local gradient (..., 3) of the constraint that is closest to being violated, by distance along the local axes."""
    sx, sy, sz = (stretch * stretch).unbind(-1)
    best = torch.full_like(sx, -math.inf)
    active: tuple[Tensor, ...] = (best, best, best)
    for value, (gx, gy, gz) in _constraints(rows, local):
        distance = value * torch.rsqrt((gx * gx * sx + gy * gy * sy + gz * gz * sz).clamp_min(1e-18))
        closer = distance > best
        best = torch.where(closer, distance, best)
        active = tuple(torch.where(closer, new, old) for new, old in zip((gx, gy, gz), active, strict=True))
    return torch.stack(active, -1)


def occupancy(geometry: Tensor, points: Tensor) -> Tensor:
    """Exact test of whether points lie inside the objects.

    Args:
        geometry: (N, E, NUM_COLUMNS).
        points: (N, M, 3), world.

    Returns:
        (N, M) bool.
    """
    solids = num_solids(geometry)
    result = torch.zeros(points.shape[:2], dtype=torch.bool, device=points.device)
    for i in range(solids):
        inside = _inside(geometry[:, i], points)
        if i < NUM_HOLES:
            inside = inside & ~_inside(geometry[:, solids + i], points)
        result = result | inside
    return result


def _inside(rows: Tensor, points: Tensor) -> Tensor:
    matrix = rows[:, _MATRIX].unflatten(-1, (3, 3))
    local = points @ matrix.transpose(1, 2) + rows[:, None, _OFFSET]
    inside = torch.ones(points.shape[:2], dtype=torch.bool, device=points.device)
    for value, _ in _constraints(rows[:, None], local):
        inside = inside & (value <= 0)
    return inside

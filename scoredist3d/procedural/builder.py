"""Builder that assembles the primitives of many objects of one family at once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scoredist3d.procedural.primitives import NUM_HOLES, NUM_SOLIDS, empty_geometry

Number = float | Tensor
Vector = tuple[Number, Number, Number]

# Columns of the surface table: first color, second color (equal without a pattern), pattern, finish.
NUM_SURFACE_COLUMNS = 8

# Brightness of successive pieces, so that neighboring parts of one color differ.
_TINTS = (1.0, 0.90, 1.06, 0.94, 1.03, 0.87)

# Frames of primitives whose own axis (local z) does not point up: columns are the local axes in the object's frame.
ALONG_X = ((0.0, 0.0, 1.0), (1.0, 0.0, 0.0), (0.0, 1.0, 0.0))  # local z -> x, x -> y, y -> z
ALONG_Y = ((0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (1.0, 0.0, 0.0))  # local z -> y, x -> z, y -> x
BELOW_X = ((0.0, 0.0, 1.0), (0.0, 1.0, 0.0), (-1.0, 0.0, 0.0))  # local z -> x, x -> -z, y -> y
BELOW_Y = ((0.0, -1.0, 0.0), (0.0, 0.0, 1.0), (-1.0, 0.0, 0.0))  # local z -> y, x -> -z, y -> -x


@dataclass(frozen=True)
class Paint:
    """Paint of one primitive of n objects.

    Attributes:
        first, second: (n, 3), colors.
        pattern: (n,), index into PATTERNS.
        finish: (n,), index into FINISHES.
        tinted: Whether the brightness may differ slightly between primitives.
    """

    first: Tensor
    second: Tensor
    pattern: Tensor
    finish: Tensor
    tinted: bool = True


@dataclass(frozen=True)
class Piece:
    """One primitive of n objects: its geometry (n, NUM_COLUMNS), its paint and the piece that is cut out of it."""

    geometry: Tensor
    paint: Paint
    hole: Piece | None = None


class Builder:
    """Builder of ``count`` objects of one family: draws their proportions and collects their pieces.

    Lengths are in arbitrary units, because the finished objects are centered and fitted into the unit ball.

    Attributes:
        mode: (count,) int64, structural variant of each object.
        main: Paint of the body: the object's color and pattern.
        plain: The object's color without the pattern, for parts that are too small for one.
        second: Paint of the parts that have the second color; the main color if the object has one color or a pattern.
    """

    def __init__(
        self,
        mode: Tensor,
        first: Tensor,
        second: Tensor,
        pattern: Tensor,
        two_tone: Tensor,
        generator: torch.Generator,
        finish: Tensor | None = None,
    ) -> None:
        self.count = len(mode)
        self.mode = mode
        self.generator = generator
        self.device = mode.device
        self._none = torch.zeros_like(pattern)
        self._two_tone = two_tone[:, None]
        self._second = second
        self._finish = self._none if finish is None else finish
        self.main = Paint(first, second, pattern, self._finish)
        self.plain = Paint(first, first, self._none, self._finish)
        part = torch.where(self._two_tone, second, first)
        self.second = Paint(part, part, self._none, self._finish)
        self._pieces: list[Piece] = []

    def uniform(self, low: float, high: float) -> Tensor:
        """Uniform random numbers, (count,)."""
        return low + (high - low) * torch.rand(self.count, generator=self.generator, device=self.device)

    def fixed(self, red: float, green: float, blue: float) -> Paint:
        """The same color for all objects, e.g. for tires, windows and eyes."""
        color = torch.tensor([red, green, blue], device=self.device).expand(self.count, 3)
        return Paint(color, color, self._none, self._none, tinted=False)

    def second_or(self, red: float, green: float, blue: float) -> Paint:
        """The second color if the object has two colors, else the natural color of the part."""
        natural = torch.tensor([red, green, blue], device=self.device)
        color = torch.where(self._two_tone, self._second, natural)
        finish = torch.where(self._two_tone[:, 0], self._finish, self._none)
        return Paint(color, color, self._none, finish, tinted=False)

    def number(self, value: Number) -> Tensor:
        """Convert a number or a (count,) tensor to a (count,) tensor."""
        if isinstance(value, Tensor):
            return value.expand(self.count)
        return torch.full((self.count,), float(value), device=self.device)

    def vector(self, value: Vector) -> Tensor:
        """Convert three numbers or (count,) tensors to a (count, 3) tensor."""
        return torch.stack([self.number(component) for component in value], -1)

    def select(self, condition: Tensor, yes: Number, no: Number) -> Tensor:
        """``yes`` where the condition holds, else ``no``, as a (count,) tensor."""
        return torch.where(condition, self.number(yes), self.number(no))

    # -- pieces ------------------------------------------------------------------------------------------------------

    def piece(
        self,
        center: Vector,
        half: Vector,
        *,
        quadric: tuple[float, float],
        taper: tuple[Number, Number] = (1.0, 1.0),
        frame: tuple[tuple[float, ...], ...] | Tensor | None = None,
        xlo: float = -1.0,
        zlo: Number = -1.0,
        zhi: Number = 1.0,
        paint: Paint | None = None,
        on: Tensor | None = None,
        hole: Piece | None = None,
    ) -> Piece:
        """A primitive with half-sizes ``half`` at its lower end; ``taper`` scales x and y at its upper end."""
        half_sizes = self.vector(half)
        rotation = self._rotation(frame)  # (count, 3, 3), columns are the local axes
        matrix = rotation.transpose(1, 2) / half_sizes[:, :, None]
        geometry = empty_geometry(self.count, self.device)
        geometry[:, 0:9] = matrix.flatten(1)
        geometry[:, 9:12] = -(matrix @ self.vector(center)[:, :, None])[..., 0]
        geometry[:, 12], geometry[:, 13] = quadric
        for axis in (0, 1):
            top = self.number(taper[axis])
            geometry[:, 14 + 2 * axis] = (1 + top) / 2
            geometry[:, 15 + 2 * axis] = (top - 1) / 2
        geometry[:, 18] = xlo
        geometry[:, 19], geometry[:, 20] = self.number(zlo), self.number(zhi)
        if on is not None:
            geometry = torch.where(on[:, None], geometry, empty_geometry(self.count, self.device))
        return Piece(geometry, paint or self.main, hole)

    def add(self, piece: Piece) -> None:
        """Add a piece to the object."""
        self._pieces.append(piece)

    def either(self, condition: Tensor, yes: Piece, no: Piece) -> Piece:
        """One piece that is ``yes`` where the condition holds, else ``no``; both share one row of the table."""
        rows = condition[:, None]
        paint = Paint(
            torch.where(rows, yes.paint.first, no.paint.first),
            torch.where(rows, yes.paint.second, no.paint.second),
            torch.where(condition, yes.paint.pattern, no.paint.pattern),
            torch.where(condition, yes.paint.finish, no.paint.finish),
            yes.paint.tinted and no.paint.tinted,
        )
        hole = None
        if yes.hole is not None and no.hole is not None:
            hole = self.either(condition, yes.hole, no.hole)
        elif yes.hole is not None or no.hole is not None:
            raise ValueError("either: the pieces yes and no must both be hollow or both be solid")
        return Piece(torch.where(rows, yes.geometry, no.geometry), paint, hole)

    def box_piece(self, center: Vector, half: Vector, **options: Any) -> Piece:
        """A :meth:`box` that is not yet part of the object."""
        return self.piece(center, half, quadric=(0.0, 0.0), **options)

    def ball_piece(self, center: Vector, half: Vector, **options: Any) -> Piece:
        """A :meth:`ball` that is not yet part of the object."""
        return self.piece(center, half, quadric=(1.0, 1.0), **options)

    def box(self, center: Vector, half: Vector, **options: Any) -> None:
        """Add a box, wedge, frustum or pyramid."""
        self.add(self.box_piece(center, half, **options))

    def round(self, center: Vector, radius: Number, half_height: Number, *, top: Number = 1.0, **options: Any) -> None:
        """Add a cylinder, frustum or cone: ``radius`` at the lower end, ``top * radius`` at the upper end."""
        self.add(self.round_piece(center, radius, half_height, top=top, **options))

    def round_piece(
        self, center: Vector, radius: Number, half_height: Number, *, top: Number = 1.0, **options: Any
    ) -> Piece:
        """A :meth:`round` that is not yet part of the object, e.g. to cut it out of another piece."""
        return self.piece(center, (radius, radius, half_height), quadric=(1.0, 0.0), taper=(top, top), **options)

    def ball(self, center: Vector, half: Vector, **options: Any) -> None:
        """Add an ellipsoid, or the part of it between ``zlo`` and ``zhi``, both in [-1, 1]."""
        self.add(self.ball_piece(center, half, **options))

    def rod(self, start: Vector, end: Vector, radius: Number, *, top: Number = 1.0, **options: Any) -> None:
        """Add a cylinder or cone from one point to another: ``top * radius`` at ``end``."""
        center, half, frame = self._span(start, end)
        self.round(center, radius, half, top=top, frame=frame, **options)

    def bar(self, start: Vector, end: Vector, depth: Number, width: Number, **options: Any) -> None:
        """Add a box from one point to another, with half-sizes ``depth`` and ``width`` across.

        ``width`` is along y, unless the bar itself is nearly parallel to y.
        """
        center, half, frame = self._span(start, end)
        self.box(center, (depth, width, half), frame=frame, **options)

    def _span(self, start: Vector, end: Vector) -> tuple[Vector, Tensor, Tensor]:
        """Middle, half of the length, and frame (local z from start to end) of a segment."""
        first, last = self.vector(start), self.vector(end)
        axis = torch.nn.functional.normalize(last - first, dim=-1)
        side = axis.new_tensor([0.0, 1.0, 0.0]).expand_as(axis)
        up = axis.new_tensor([0.0, 0.0, 1.0]).expand_as(axis)
        reference = torch.where(axis[:, 1:2].abs() < 0.95, side, up)
        across = torch.nn.functional.normalize(torch.linalg.cross(reference, axis), dim=-1)
        frame = torch.stack([across, torch.linalg.cross(axis, across), axis], -1)
        middle = (first + last) / 2
        return (middle[:, 0], middle[:, 1], middle[:, 2]), (last - first).norm(dim=-1) / 2, frame

    def _rotation(self, frame: tuple[tuple[float, ...], ...] | Tensor | None) -> Tensor:
        if frame is None:
            return torch.eye(3, device=self.device).expand(self.count, 3, 3)
        if isinstance(frame, Tensor):
            return frame.expand(self.count, 3, 3)
        return torch.tensor(frame, device=self.device).expand(self.count, 3, 3)

    # -- frames ------------------------------------------------------------------------------------------------------

    def turn(self, *, yaw: Number = 0.0, pitch: Number = 0.0, roll: Number = 0.0) -> Tensor:
        """Rotations (count, 3, 3): roll about x, then pitch about y (top towards +x), then yaw about z, in degrees."""
        return (
            _axis_rotation(self.number(yaw), 2)
            @ _axis_rotation(self.number(pitch), 1)
            @ _axis_rotation(self.number(roll), 0)
        )

    def toward(self, frame: tuple[tuple[float, ...], ...], *, yaw: Number = 0.0) -> Tensor:
        """Frames (count, 3, 3): a fixed frame rotated about the object's z axis by ``yaw`` degrees."""
        return _axis_rotation(self.number(yaw), 2) @ self._rotation(frame)

    # -- result ------------------------------------------------------------------------------------------------------

    @property
    def num_pieces(self) -> int:
        """Number of pieces added so far."""
        return len(self._pieces)

    def tables(self) -> tuple[Tensor, Tensor]:
        """Geometry and surface tables of the objects, hollow pieces first.

        Their shapes are (count, NUM_SOLIDS + NUM_HOLES, NUM_COLUMNS) and (..., NUM_SURFACE_COLUMNS).
        """
        hollow = [piece for piece in self._pieces if piece.hole is not None]
        full = [piece for piece in self._pieces if piece.hole is None]
        if len(hollow) > NUM_HOLES or len(self._pieces) > NUM_SOLIDS:
            raise ValueError(
                f"the family has {len(self._pieces)} pieces, {len(hollow)} of them hollow; use at most "
                f"{NUM_SOLIDS} pieces, {NUM_HOLES} of them hollow"
            )
        rows = NUM_SOLIDS + NUM_HOLES
        geometry = empty_geometry(self.count, self.device)[:, None].repeat(1, rows, 1)
        surface = torch.zeros(self.count, rows, NUM_SURFACE_COLUMNS, device=self.device)
        placed = list(enumerate(hollow + full))
        placed += [(NUM_SOLIDS + i, piece.hole) for i, piece in enumerate(hollow) if piece.hole is not None]
        for row, piece in placed:
            geometry[:, row] = piece.geometry
            tint = _TINTS[row % len(_TINTS)] if piece.paint.tinted else 1.0
            surface[:, row, 0:3] = _tinted(piece.paint.first, tint)
            surface[:, row, 3:6] = _tinted(piece.paint.second, tint)
            surface[:, row, 6] = piece.paint.pattern.float()
            surface[:, row, 7] = piece.paint.finish.float()
        return geometry, surface


def _tinted(color: Tensor, factor: float) -> Tensor:
    """Colors (n, 3) with another brightness: white ones never become lighter, and black ones never darker."""
    darkest, lightest = min(_TINTS), max(_TINTS)
    white, black = color.amin(-1, keepdim=True) > 0.75, color.amax(-1, keepdim=True) < 0.28
    factors = torch.where(white & (factor != 1.0), factor / lightest, factor)
    return torch.where(black, color + 0.35 * (factor - darkest), color * factors).clamp(0.0, 1.0)


def _axis_rotation(degrees: Tensor, axis: int) -> Tensor:
    """Right-handed rotations (n, 3, 3) about a coordinate axis."""
    angle = degrees * (math.pi / 180)
    cos, sin = angle.cos(), angle.sin()
    i, j = [(1, 2), (2, 0), (0, 1)][axis]
    rotation = torch.zeros(len(angle), 3, 3, device=angle.device)
    rotation[:, axis, axis] = 1.0
    rotation[:, i, i] = rotation[:, j, j] = cos
    rotation[:, i, j], rotation[:, j, i] = -sin, sin
    return rotation


def fit(geometry: Tensor, num_pieces: int, factors: Tensor, radius: Tensor, *, axial: bool = False) -> Tensor:
    """Stretch objects along the world axes, center their bounding boxes and scale them to a given extent.

    Args:
        geometry: (N, E, NUM_COLUMNS).
        num_pieces: Number of solids in use; they are the first rows.
        factors: (N, 3), scale factors along x, y and z.
        radius: (N,), target distance of the farthest point from the origin.
        axial: Center along z only, because the z axis is an axis of symmetry.
    """
    matrix = geometry[..., 0:9].unflatten(-1, (3, 3)) / factors[:, None, None, :]
    offset = geometry[..., 9:12]
    solids = slice(0, num_pieces)
    points = extreme_points(geometry[:, solids], matrix[:, solids], offset[:, solids])
    real = (geometry[:, solids, 20] > geometry[:, solids, 19])[:, None, :, None]
    low = torch.where(real, points, math.inf).amin((2, 3))
    high = torch.where(real, points, -math.inf).amax((2, 3))
    center = (low + high) / 2
    if axial:
        center = center * torch.tensor([0.0, 0.0, 1.0], device=center.device)
    reach = torch.where(real, points - center[:, :, None, None], 0.0).square().sum(1).amax((1, 2)).sqrt()
    scale = (radius / reach)[:, None, None]
    # p_new = scale (p - center), so M_new = M / scale and m_new = m + M center.
    result = geometry.clone()
    result[..., 0:9] = matrix.flatten(-2) / scale
    result[..., 9:12] = offset + (matrix @ center[:, None, :, None])[..., 0]
    return result


def extreme_points(geometry: Tensor, matrix: Tensor, offset: Tensor, *, levels: int = 5, turns: int = 12) -> Tensor:
    """Points in the world whose convex hull approximates each primitive, (N, 3, E, levels * turns)."""
    q_xy, q_z, ax, bx, ay, by, xlo, zlo, zhi = (geometry[..., k, None] for k in range(12, 21))
    fractions = torch.arange(levels, device=geometry.device) / (levels - 1)
    angles = torch.arange(turns, device=geometry.device) * (2 * math.pi / turns) + math.pi / turns
    z = (zlo + (zhi - zlo) * fractions)[..., None]  # (N, E, levels, 1)
    q_xy, q_z, ax, bx, ay, by, xlo = (column[..., None] for column in (q_xy, q_z, ax, bx, ay, by, xlo))
    wx, wy = ax + bx * z, ay + by * z
    # The ring of an ellipsoid at height z has radius sqrt(w^2 - z^2).
    ring = torch.where(q_z > 0, (wx * wx - z * z).clamp_min(0.0).sqrt(), wx)
    x = torch.where(q_xy > 0, ring * angles.cos(), wx * angles.cos().sign())
    y = torch.where(q_xy > 0, ring * angles.sin(), wy * angles.sin().sign())
    x = torch.maximum(x, xlo * wx)
    local = [(c.expand_as(x) - offset[..., k, None, None]).flatten(-2) for k, c in enumerate((x, y, z))]
    inverse = inverse_3x3(matrix)
    return torch.stack([sum(inverse[..., i, k, None] * local[k] for k in range(3)) for i in range(3)], 1)  # type: ignore[misc]


def inverse_3x3(matrix: Tensor) -> Tensor:
    """Inverse of (..., 3, 3) matrices by cross products of their rows, much faster than a batched factorization."""
    a, b, c = matrix.unbind(-2)
    columns = torch.stack([torch.linalg.cross(b, c), torch.linalg.cross(c, a), torch.linalg.cross(a, b)], -1)
    return columns / (a * torch.linalg.cross(b, c)).sum(-1)[..., None, None]

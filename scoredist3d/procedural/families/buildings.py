"""House, castle tower and lighthouse; doors face +x."""

from __future__ import annotations

import math

from scoredist3d.procedural.builder import ALONG_X, Builder

_WINDOW = (0.66, 0.86, 0.96)
_DOOR = (0.36, 0.22, 0.12)


def house(b: Builder) -> None:
    """Walls with a gable roof (ridge along x) or a pyramid roof, a door, windows and a chimney."""
    depth, width, height = b.uniform(0.5, 0.6), b.uniform(0.52, 0.64), b.uniform(0.38, 0.48)
    peak = b.uniform(0.22, 0.28)
    b.box((0, 0, 0), (depth, width, height))
    gable = b.mode == 0
    b.box((0, 0, height + peak), (depth * 1.12, width * 1.14, peak), taper=(1.0, 0.02), on=gable, paint=b.second)
    b.box((0, 0, height + peak), (depth * 1.14, width * 1.14, peak), taper=(0.03, 0.03), on=~gable, paint=b.second)
    b.box((depth, 0.0, -height * 0.42), (0.035, 0.13, height * 0.58), paint=b.fixed(*_DOOR))
    window, bars = b.fixed(*_WINDOW), b.fixed(0.3, 0.24, 0.2)
    for side in (-1, 1):
        b.box((depth, side * width * 0.6, height * 0.2), (0.035, 0.11, 0.12), paint=window)
        b.box((0, side * width, height * 0.2), (0.14, 0.035, 0.12), paint=window)
        # Thin crosses divide the front windows into panes.
        b.box((depth, side * width * 0.6, height * 0.2), (0.045, 0.012, 0.12), paint=bars)
        b.box((depth, side * width * 0.6, height * 0.2), (0.045, 0.11, 0.012), paint=bars)
    b.box((-depth * 0.45, width * 0.5, height + peak * 1.35), (0.09, 0.09, peak * 0.7), paint=b.fixed(0.5, 0.3, 0.25))


def castle_tower(b: Builder) -> None:
    """A round or square tower with battlements, a door in front and a flag."""
    radius, half = b.uniform(0.38, 0.44), b.uniform(0.6, 0.7)
    circular = b.mode == 0
    cylinder = b.round_piece((0, 0, 0), radius * 1.08, half, top=0.92)
    b.add(b.either(circular, cylinder, b.box_piece((0, 0, 0), (radius, radius, half))))
    wide = radius * 1.22
    pit = b.round_piece((0, 0, half + 0.16), wide * 0.76, 0.15, paint=b.plain)
    crown = b.round_piece((0, 0, half + 0.06), wide, 0.12, hole=pit, paint=b.plain)
    yard = b.box_piece((0, 0, half + 0.16), (wide * 0.74, wide * 0.74, 0.15), paint=b.plain)
    walls = b.box_piece((0, 0, half + 0.06), (wide * 0.95, wide * 0.95, 0.12), hole=yard, paint=b.plain)
    b.add(b.either(circular, crown, walls))
    for k in range(8):
        angle = math.radians(45 * k)
        # On the square tower the merlons sit on the corners and the middles of the walls.
        cos, sin = math.cos(angle), math.sin(angle)
        edge = 1.0 / max(abs(cos), abs(sin))
        ring = b.select(circular, wide * 0.87, wide * 0.83 * edge)
        yaw = b.select(circular, 45.0 * k, 0.0)
        b.box((ring * cos, ring * sin, half + 0.26), (0.115, 0.125, 0.1), frame=b.turn(yaw=yaw), paint=b.plain)
    b.box((radius, 0, -half * 0.62), (0.06, 0.15, half * 0.38), paint=b.fixed(*_DOOR))
    b.box((radius * 0.98, 0, half * 0.4), (0.05, 0.075, 0.13), paint=b.fixed(0.15, 0.15, 0.17))
    b.round((0, 0, half + 0.5), 0.024, 0.42, paint=b.fixed(0.5, 0.35, 0.2))
    b.box((0, 0.22, half + 0.76), (0.03, 0.22, 0.15), paint=b.second)


def lighthouse(b: Builder) -> None:
    """A tall tapered tower with a gallery, a glowing lantern, a roof (cone or dome) and a door in front."""
    radius, half = b.uniform(0.32, 0.38), b.uniform(0.68, 0.78)
    b.round((0, 0, 0), radius, half, top=0.58)
    b.round((0, 0, -half - 0.06), radius * 1.5, 0.09, top=0.8, paint=b.plain)
    b.round((0, 0, half + 0.03), radius * 0.86, 0.05, paint=b.fixed(0.25, 0.25, 0.28))
    b.round((0, 0, half + 0.16), radius * 0.48, 0.11, paint=b.fixed(1.0, 0.93, 0.5))
    pointed = b.mode == 0
    b.round((0, 0, half + 0.41), radius * 0.72, 0.14, top=0.05, on=pointed, paint=b.second)
    b.ball((0, 0, half + 0.26), (radius * 0.66, radius * 0.66, 0.2), zlo=0.0, on=~pointed, paint=b.second)
    for k, z in enumerate((-0.02, 0.45)):
        b.box((radius * (0.8 - 0.11 * k), 0, half * z), (0.07, 0.055, 0.09), paint=b.fixed(0.15, 0.2, 0.28))
    b.round((radius, 0, -half * 0.72), 0.11, 0.04, frame=ALONG_X, paint=b.fixed(*_DOOR))
    b.box((radius * 0.96, 0, -half * 0.82), (0.06, 0.11, half * 0.16), paint=b.fixed(*_DOOR))

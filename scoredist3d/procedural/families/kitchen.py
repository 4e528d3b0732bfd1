"""Mug, bottle, wine glass, bowl, teapot and ice cream cone."""

from __future__ import annotations

from scoredist3d.procedural.builder import ALONG_X, Builder, Number


def mug(b: Builder) -> None:
    """A cup open at the top; the handle, round or square, is on the right (+y)."""
    radius, half, top = b.uniform(0.55, 0.68), b.uniform(0.58, 0.72), b.uniform(0.98, 1.08)
    cavity = b.round_piece((0, 0, 0.1), radius * 0.86, half, top=top, paint=b.plain)
    b.round((0, 0, 0), radius, half, top=top, hole=cavity)
    outer, thick = b.uniform(0.40, 0.48), b.uniform(0.09, 0.12)
    mug_handle(b, radius * 0.94, outer, thick)


def mug_handle(b: Builder, wall: Number, outer: Number, thick: Number) -> None:
    """A round or square handle (by the mode) at y = ``wall``, with the half-sizes ``outer`` and ``thick``."""
    inner = b.round_piece((0, wall, 0), outer * 0.6, thick * 1.2, frame=ALONG_X, paint=b.second)
    ring = b.round_piece((0, wall, 0), outer, thick, frame=ALONG_X, xlo=0.0, hole=inner, paint=b.second)
    cut = b.box_piece((0, wall, 0), (thick * 1.2, outer * 0.62, outer * 0.62), paint=b.second)
    frame = b.box_piece((0, wall + outer / 2, 0), (thick, outer / 2, outer), hole=cut, paint=b.second)
    b.add(b.either(b.mode == 0, ring, frame))


def bottle(b: Builder) -> None:
    """A cylinder with a shoulder (dome or cone), a neck, a cap and a label."""
    radius, half = b.uniform(0.34, 0.44), b.uniform(0.5, 0.68)
    shoulder, neck = b.uniform(0.24, 0.36), b.uniform(0.2, 0.28)
    thin = radius * b.uniform(0.34, 0.42)
    b.round((0, 0, 0), radius, half)
    dome = b.ball_piece((0, 0, half), (radius, radius, shoulder), zlo=0.0)
    cone = b.round_piece((0, 0, half + shoulder / 2), radius, shoulder / 2, top=thin / radius)
    b.add(b.either(b.mode == 0, dome, cone))
    b.round((0, 0, half + shoulder * 0.7 + neck), thin, neck)
    b.round((0, 0, half + shoulder * 0.7 + 2 * neck + 0.08), thin * 1.25, 0.1, paint=b.second_or(0.25, 0.25, 0.27))
    b.round((0, 0, -half * 0.15), radius * 1.03, half * 0.3, paint=b.second_or(0.94, 0.92, 0.86))


def wine_glass(b: Builder) -> None:
    """A bowl (egg or cone) open at the top on a thin stem with a flat foot."""
    width, height, stem = b.uniform(0.5, 0.6), b.uniform(0.55, 0.7), b.uniform(0.26, 0.36)
    egg = b.mode == 0
    oval = b.ball_piece((0, 0, 0.04), (width * 0.88, width * 0.88, height * 0.92), zhi=0.7, paint=b.plain)
    rounded = b.ball_piece((0, 0, 0), (width, width, height), zhi=0.55, hole=oval)
    funnel = b.round_piece((0, 0, 0.14), 0.01, height * 0.75, top=width * 1.15 / 0.01, paint=b.plain)
    pointed = b.round_piece((0, 0, 0), 0.05, height * 0.75, top=width * 1.2 / 0.05, hole=funnel)
    b.add(b.either(egg, rounded, pointed))
    bottom = b.select(egg, height * 0.97, height * 0.73)
    b.round((0, 0, -bottom - stem), 0.036, stem + 0.04, paint=b.second)
    b.round((0, 0, -bottom - 2 * stem), width * 0.78, 0.05, top=0.12, paint=b.second)


def bowl(b: Builder) -> None:
    """A wide, hollow half-ball or frustum with a rim and a foot."""
    radius, depth, cut = b.uniform(0.8, 0.9), b.uniform(0.55, 0.72), b.uniform(-0.05, 0.1)
    curved = b.mode == 0
    inner = b.ball_piece((0, 0, 0.05), (radius * 0.92, radius * 0.92, depth * 0.95), zhi=0.4, paint=b.plain)
    half_ball = b.ball_piece((0, 0, 0), (radius, radius, depth), zhi=cut, hole=inner)
    pit = b.round_piece((0, 0, -depth * 0.4), radius * 0.42, depth * 0.5, top=2.0, paint=b.plain)
    frustum = b.round_piece((0, 0, -depth * 0.5), radius * 0.5, depth * 0.5, top=1.9, hole=pit)
    b.add(b.either(curved, half_ball, frustum))
    rim = b.select(curved, depth * cut, -0.02)
    edge = b.select(curved, radius, radius * 0.97)
    opening = b.round_piece((0, 0, rim), edge * 0.9, 0.2, paint=b.second)
    b.round((0, 0, rim), edge * 1.04, 0.055, hole=opening, paint=b.second)
    b.round((0, 0, -depth), radius * 0.45, 0.1, top=0.85, paint=b.second)


def teapot(b: Builder) -> None:
    """A round or straight pot with the spout in front (+x), the handle behind and a lid with a knob."""
    radius, half = b.uniform(0.58, 0.66), b.uniform(0.48, 0.56)
    ball = b.mode == 0
    b.ball((0, 0, 0), (radius, radius, half), zlo=-0.8, on=ball)
    b.round((0, 0, 0), radius * 1.02, half * 0.9, top=0.72, on=~ball)
    outer = half * 0.8
    back = -b.select(ball, radius * 0.9, radius * 0.84)
    hole = b.round_piece((back, 0, 0.04), outer * 0.66, 0.2, frame=b.toward(ALONG_X, yaw=90.0), paint=b.second)
    b.round((back, 0, 0.04), outer, 0.085, frame=b.toward(ALONG_X, yaw=90.0), xlo=-0.1, hole=hole, paint=b.second)
    tilt = b.uniform(42.0, 52.0)
    b.round((radius * 1.08, 0, 0.08), 0.2, 0.42, top=0.5, frame=b.turn(pitch=tilt), paint=b.plain)
    lid = half * 0.9
    b.ball((0, 0, lid - 0.08), (radius * 0.56, radius * 0.56, 0.2), zlo=0.0, paint=b.second)
    b.ball((0, 0, lid + 0.17), (0.1, 0.1, 0.1), paint=b.second)


def ice_cream_cone(b: Builder) -> None:
    """A wafer cone with one large scoop or two stacked scoops."""
    radius, length = b.uniform(0.52, 0.6), b.uniform(0.5, 0.62)
    wafer = b.second_or(0.86, 0.62, 0.32)
    b.round((0, 0, -length), 0.04, length, top=(radius * 0.8) / 0.04, paint=wafer)
    b.round((0, 0, -0.03), radius * 0.86, 0.07, paint=wafer)
    two = b.mode == 1
    b.ball((0, 0, radius * 0.62), (radius, radius, radius * 0.95), zlo=-0.62)
    b.round((0, 0, radius * 0.1), radius * 1.06, 0.07, paint=b.plain)
    b.ball((0, 0, radius * 1.75), (radius * 0.82, radius * 0.82, radius * 0.8), on=two)
    b.round((0, 0, radius * 1.42), radius * 0.88, 0.06, on=two, paint=b.plain)

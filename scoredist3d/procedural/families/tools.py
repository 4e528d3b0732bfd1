"""Things held in the hand, and a ladder: ladder, umbrella, fork, key, sword, hammer, broom, racket and guitar."""

from __future__ import annotations

import math

from scoredist3d.procedural.builder import ALONG_X, BELOW_X, BELOW_Y, Builder

_WOOD = (0.55, 0.36, 0.18)


def ladder(b: Builder) -> None:
    """A folding ladder whose rungs face forward (+x), with a rear frame and a top step, or a single straight ladder."""
    folding = b.mode == 0
    foot, wide, narrow = b.uniform(0.38, 0.46), b.uniform(0.34, 0.4), b.uniform(0.24, 0.28)
    reach, slope = b.select(folding, foot, 0.0), b.select(folding, 0.07, 0.0)
    low, high = wide, b.select(folding, narrow, wide)
    for side in (-1, 1):
        b.bar((reach, side * low, 0), (slope, side * high, 2.0), 0.045, 0.03)
        b.bar((-reach, side * low, 0), (-slope, side * high, 2.0), 0.03, 0.026, on=folding, paint=b.plain)
    b.box((0, 0, 2.0), (0.15, narrow * 1.15, 0.03), on=folding, paint=b.second)
    for k in range(8):
        t = b.select(folding, (k + 1) / 7, (k + 0.6) / 8)
        x, y = reach + (slope - reach) * t, low + (high - low) * t
        on = ~folding if k >= 6 else None
        b.bar((x, -y, 2 * t), (x, y, 2 * t), 0.022, b.select(folding, 0.05, 0.024), on=on, paint=b.second)
    x, y = reach + (slope - reach) * 0.3, low + (high - low) * 0.3
    b.rod((-x, -y, 0.6), (-x, y, 0.6), 0.022, on=folding, paint=b.plain)


def umbrella(b: Builder) -> None:
    """An open umbrella: a canopy with a tip on a thin pole, with a curved or a straight handle."""
    radius, height, length = b.uniform(0.84, 0.94), b.uniform(0.46, 0.54), b.uniform(1.1, 1.2)
    metal = b.fixed(0.32, 0.32, 0.34)
    inner = b.ball_piece((0, 0, -0.03), (radius * 0.97, radius * 0.97, height * 0.97), paint=b.plain)
    b.ball((0, 0, 0), (radius, radius, height), zlo=0.0, hole=inner)
    for k in range(4):
        # The edges of four thin discs are the eight ribs on the canopy.
        rib = b.toward(BELOW_Y, yaw=45.0 * k) @ b.turn(yaw=180.0)
        disc = b.piece(
            (0, 0, 0), (height * 1.015, radius * 1.015, 0.011), quadric=(1.0, 0.0), frame=rib, xlo=0.0, paint=metal
        )
        b.add(disc)
    b.round((0, 0, height + 0.06), 0.045, 0.09, top=0.3, paint=metal)
    b.round((0, 0, (height - length) / 2), 0.026, (height + length) / 2, paint=metal)
    curved = b.mode == 0
    handle = b.second_or(0.36, 0.22, 0.12)
    bend = b.uniform(0.15, 0.18)
    core = b.round_piece((bend, 0, -length), bend - 0.045, 0.1, frame=BELOW_Y, paint=handle)
    b.round((bend, 0, -length), bend + 0.045, 0.04, frame=BELOW_Y, xlo=0.0, hole=core, on=curved, paint=handle)
    b.round((0, 0, -length + 0.06), 0.045, 0.09, on=curved, paint=handle)
    b.ball((2 * bend, 0, -length), (0.05, 0.05, 0.05), on=curved, paint=handle)
    b.round((0, 0, -length), 0.065, 0.2, top=0.75, on=~curved, paint=handle)


def fork(b: Builder) -> None:
    """An upright fork with three or four thin tines at the top."""
    handle, tine = b.uniform(0.5, 0.58), b.uniform(0.27, 0.31)
    four = b.mode == 1
    b.box((0, 0, -handle), (0.03, 0.11, handle), taper=(1.0, 0.45), paint=b.second)
    b.ball((0, 0, -2 * handle), (0.03, 0.11, 0.1), paint=b.second)
    b.bar((0, 0, -0.05), (0, 0, 0.28), 0.028, 0.048)
    width = b.uniform(0.22, 0.25)
    b.add(b.piece((0, 0, 0.42), (0.2, width + 0.028, 0.03), quadric=(1.0, 0.0), frame=BELOW_X, xlo=0.0))
    b.box((0, 0, 0.46), (0.03, width + 0.028, 0.05))
    for k in range(4):
        y = width * b.select(four, (2 * k - 3) / 3, float(k - 1))
        on = four if k == 3 else None
        b.box((0, y, 0.5 + tine), (0.026, 0.028, tine), taper=(0.7, 0.8), on=on)


def key(b: Builder) -> None:
    """An upright key: a ring on top, a shaft, and two or three teeth that point to the right (+y)."""
    ring, shaft = b.uniform(0.28, 0.34), b.uniform(0.55, 0.65)
    inner = b.round_piece((0, 0, ring), ring * 0.55, 0.12, frame=ALONG_X, paint=b.second)
    b.round((0, 0, ring), ring, 0.06, frame=ALONG_X, hole=inner, paint=b.second)
    b.round((0, 0, -shaft), 0.06, shaft + 0.04)
    b.round((0, 0, -0.08), 0.1, 0.035, paint=b.plain)
    b.round((0, 0, -0.2), 0.085, 0.025, paint=b.plain)
    three = b.mode == 1
    for k in range(3):
        z = -2 * shaft + 0.07 + k * b.select(three, 0.17, 0.25)
        width = b.uniform(0.13, 0.16)
        b.box((0, width, z), (0.045, width, 0.05), on=three if k == 2 else None)


def sword(b: Builder) -> None:
    """An upright sword: a thin, pointed blade, a straight or round guard, a grip and a pommel."""
    blade, width, grip = b.uniform(0.6, 0.68), b.uniform(0.085, 0.105), b.uniform(0.19, 0.23)
    b.box((0, 0, blade), (0.022, width, blade), taper=(0.9, 0.86))
    b.box((0, 0, 2 * blade + 0.13), (0.02, width * 0.86, 0.13), taper=(0.5, 0.04))
    b.box((0, 0, blade * 0.9), (0.032, 0.014, blade * 0.85), paint=b.plain)
    straight = b.mode == 0
    b.box((0, 0, 0), (0.06, 0.36, 0.04), on=straight, paint=b.second)
    for side in (-1, 1):
        b.ball((0, side * 0.36, 0.0), (0.06, 0.06, 0.06), on=straight, paint=b.second)
    b.ball((0, 0, 0), (0.27, 0.27, 0.09), on=~straight, paint=b.second)
    b.round((0, 0, -grip), 0.055, grip, paint=b.second_or(0.3, 0.18, 0.1))
    b.ball((0, 0, -2 * grip - 0.04), (0.085, 0.085, 0.085), paint=b.second)


def hammer(b: Builder) -> None:
    """An upright hammer: the head strikes forward (+x), with a claw behind or as a thick round mallet."""
    handle, half = b.uniform(0.62, 0.72), b.uniform(0.3, 0.36)
    claw = b.mode == 0
    b.round((0, 0, -handle), 0.075, handle + 0.1, top=0.8, paint=b.second)
    b.round((0, 0, -handle * 1.65), 0.095, handle * 0.34, paint=b.second)
    b.box((0.02, 0, 0.05), (0.15, 0.13, 0.14), on=claw)
    b.round((0.22, 0, 0.06), 0.1, 0.14, frame=ALONG_X, on=claw)
    b.round((0.44, 0, 0.06), 0.16, 0.1, frame=ALONG_X, on=claw)
    for side in (-1, 1):
        b.bar((-0.1, side * 0.06, 0.08), (-0.34, side * 0.1, 0.06), 0.08, 0.045, on=claw)
        b.bar((-0.3, side * 0.1, 0.07), (-0.52, side * 0.12, -0.12), 0.06, 0.045, taper=(0.3, 1.0), on=claw)
    b.round((0, 0, 0.1), 0.24, half + 0.1, frame=ALONG_X, on=~claw)
    for front in (-1, 1):
        b.round((front * (half + 0.06), 0, 0.1), 0.265, 0.07, frame=ALONG_X, on=~claw, paint=b.plain)


def broom(b: Builder) -> None:
    """A thin stick on a brush that points down: a round bundle of twigs, or a flat brush along y."""
    stick, brush = b.uniform(0.72, 0.82), b.uniform(0.3, 0.36)
    bundle = b.mode == 0
    b.round((0, 0, stick), 0.027, stick + 0.05, paint=b.second_or(*_WOOD))
    b.round((0, 0, -brush + 0.03), 0.36, brush, top=0.3, on=bundle)
    b.round((0, 0, 0.04), 0.13, 0.04, on=bundle, paint=b.plain)
    b.round((0, 0, -0.14), 0.19, 0.03, top=0.9, on=bundle, paint=b.fixed(0.25, 0.2, 0.16))
    b.round((0, 0, 0.12), 0.075, 0.1, top=0.5, on=bundle, paint=b.plain)
    b.box((0, 0, -brush), (0.14, 0.52, brush * 0.8), taper=(0.7, 0.8), on=~bundle)
    b.box((0, 0, -brush * 0.15), (0.12, 0.45, 0.07), on=~bundle, paint=b.plain)
    b.round((0, 0, 0.06), 0.065, 0.12, top=0.6, on=~bundle, paint=b.plain)


def racket(b: Builder) -> None:
    """An upright racket: a round or oval hoop with thin strings, a throat of two rods and a grip."""
    width = b.uniform(0.42, 0.46)
    height = b.select(b.mode == 0, width, width * 1.3)
    hoop = 0.055
    inner = b.piece((0, 0, 0), (width - hoop, height - hoop, 0.1), quadric=(1.0, 0.0), frame=ALONG_X, paint=b.plain)
    b.add(b.piece((0, 0, 0), (width, height, 0.05), quadric=(1.0, 0.0), frame=ALONG_X, hole=inner))
    for k in range(-2, 3):
        share = k / 3
        chord = math.sqrt(1 - share * share) * 0.96
        z, y = height * share, width * chord
        b.bar((0, -y, z), (0, y, z), 0.014, 0.014, paint=b.plain)
        y, z = width * share, height * chord
        b.bar((0, y, -z), (0, y, z), 0.014, 0.014, paint=b.plain)
    neck, grip = height + 0.34, b.uniform(0.24, 0.3)
    for side in (-1, 1):
        b.rod((0, side * width * 0.5, -height * 0.84), (0, side * 0.03, -neck), 0.04)
    b.round((0, 0, -neck - grip), 0.07, grip + 0.04, paint=b.second)
    b.round((0, 0, -neck - 2 * grip), 0.085, 0.04, paint=b.second)


def guitar(b: Builder) -> None:
    """An upright guitar that faces forward: acoustic with a sound hole, or electric with two horns and pickups."""
    lower, upper, depth = b.uniform(0.42, 0.46), b.uniform(0.3, 0.34), b.uniform(0.1, 0.12)
    acoustic = b.mode == 0
    thick = b.select(acoustic, depth, 0.06)
    b.round((0, 0, -0.5), lower, thick, frame=ALONG_X)
    b.round((0, 0, -0.02), upper, thick, frame=ALONG_X, on=acoustic)
    b.box((0, 0, -0.24), (thick, 0.26, 0.2))
    for side in (-1, 1):
        tip = 0.22 if side > 0 else 0.12
        b.bar((0, side * 0.17, -0.3), (0, side * 0.27, tip), thick * 0.98, 0.12, taper=(1.0, 0.5), on=~acoustic)
    dark, light = b.fixed(0.14, 0.1, 0.08), b.fixed(0.85, 0.82, 0.74)
    front = thick + 0.02
    b.round((front - 0.012, 0, -0.14), 0.125, 0.014, frame=ALONG_X, on=acoustic, paint=dark)
    b.box((front - 0.012, 0, -0.22), (0.02, 0.15, 0.045), on=~acoustic, paint=dark)
    b.box((front, 0, -0.6), (0.025, 0.16, 0.035), paint=dark)
    neck = b.second_or(0.3, 0.19, 0.11)
    b.box((thick * 0.8, 0, 0.5), (0.04, 0.058, 0.55), paint=neck)
    b.box((thick * 0.8 - 0.03, 0, 1.14), (0.03, 0.1, 0.15), taper=(1.0, 1.2), paint=b.second)
    for k in (-1, 1):
        z = 1.14 + k * 0.07
        b.rod((thick * 0.8 - 0.03, -0.17, z), (thick * 0.8 - 0.03, 0.17, z), 0.025, paint=light)
    string = b.select(acoustic, depth, 0.06) + 0.035
    for k in (-1, 0, 1):
        b.box((string, k * 0.036, 0.2), (0.011, 0.011, 0.82), paint=light)

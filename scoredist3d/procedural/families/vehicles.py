"""Rocket, car, airplane, sailboat, train engine, bicycle and helicopter; all face +x."""

from __future__ import annotations

import torch

from scoredist3d.procedural.builder import ALONG_X, ALONG_Y, Builder


def rocket(b: Builder) -> None:
    """A standing rocket with three or four fins, a nose and a round window in front (+x)."""
    radius, half, nose = b.uniform(0.3, 0.36), b.uniform(0.55, 0.68), b.uniform(0.4, 0.5)
    b.round((0, 0, 0), radius, half, top=0.9)
    b.round((0, 0, half + nose / 2), radius * 0.9, nose / 2, top=0.08, paint=b.second)
    b.round((0, 0, -half - 0.07), radius * 0.62, 0.09, top=1.1, paint=b.fixed(0.3, 0.3, 0.32))
    span, tall = b.uniform(0.3, 0.38), b.uniform(0.32, 0.4)
    three = b.mode == 0
    for k in range(4):
        # Of three fins, one is at the back (-x) and two point to the front; four fins are diagonal.
        yaw = b.select(three, 180.0 + 120.0 * k, 45.0 + 90.0 * k)
        cos, sin = torch.cos(torch.deg2rad(yaw)), torch.sin(torch.deg2rad(yaw))
        root = radius * 0.9
        b.box(
            (root * cos, root * sin, -half - 0.14 + tall),
            (span, 0.055, tall),
            taper=(0.12, 1.0),
            frame=b.turn(yaw=yaw),
            xlo=0.0,
            on=~three if k == 3 else None,
            paint=b.second,
        )
    b.round((radius * 0.9, 0, half * 0.35), 0.17, 0.09, frame=ALONG_X, paint=b.fixed(0.3, 0.3, 0.33))
    b.round((radius * 0.9, 0, half * 0.35), 0.12, 0.11, frame=ALONG_X, paint=b.fixed(0.62, 0.86, 0.96))


def car(b: Builder) -> None:
    """A body, a glazed cabin with a roof, four dark wheels and headlights; some cars have a spoiler."""
    length, width, height = b.uniform(0.85, 0.95), b.uniform(0.4, 0.48), b.uniform(0.16, 0.2)
    back, cabin = b.uniform(-0.22, -0.1), b.uniform(0.42, 0.5)
    b.box((0, 0, 0), (length, width, height))
    b.box((back, 0, height + 0.13), (cabin, width * 0.9, 0.15), taper=(0.7, 0.86), paint=b.fixed(0.55, 0.75, 0.85))
    b.box((back, 0, height + 0.3), (cabin * 0.74, width * 0.84, 0.06), paint=b.second)
    for front in (-1, 1):
        b.box(
            (back + front * cabin * 0.1, 0, height + 0.13), (0.05, width * 0.92, 0.15), taper=(1.0, 0.88), paint=b.plain
        )
    tyre = b.uniform(0.19, 0.23)
    for axle in (-0.58, 0.58):
        for side in (-1, 1):
            b.round(
                (axle * length, side * width * 0.95, -height),
                tyre,
                0.09,
                frame=ALONG_Y,
                paint=b.fixed(0.12, 0.12, 0.13),
            )
        hub = b.fixed(0.75, 0.76, 0.78)
        b.round((axle * length, 0, -height), tyre * 0.5, width * 0.95 + 0.1, frame=ALONG_Y, paint=hub)
    for side in (-1, 1):
        b.round((length, side * width * 0.66, 0.04), 0.08, 0.035, frame=ALONG_X, paint=b.fixed(1.0, 0.95, 0.6))
    b.box((length, 0, -height * 0.65), (0.04, width * 0.98, 0.055), paint=b.fixed(0.3, 0.3, 0.32))
    spoiler = b.mode == 1
    b.box((-length * 0.92, 0, height + 0.24), (0.1, width * 0.95, 0.04), on=spoiler, paint=b.plain)
    b.box((-length * 0.9, 0, height + 0.1), (0.05, width * 0.6, 0.14), on=spoiler, paint=b.plain)


def airplane(b: Builder) -> None:
    """A fuselage along x with wings, tail and fin, and with two engines or a propeller on the nose."""
    radius, length = b.uniform(0.17, 0.21), b.uniform(0.82, 0.92)
    b.ball((0, 0, 0), (length, radius, radius))
    b.round((-0.02, 0, 0), radius * 0.96, length * 0.5, frame=ALONG_X)
    span, chord = b.uniform(0.7, 0.85), b.uniform(0.2, 0.25)
    for side in (-1, 1):
        # Local z runs outwards along the wing, local x across its chord.
        outward = b.turn(roll=-90.0 * side)
        b.box((0.08, side * span / 2, -0.03), (chord, 0.04, span / 2), taper=(0.55, 0.7), frame=outward)
        b.box((-length * 0.86, side * 0.2, 0.03), (0.13, 0.03, 0.2), taper=(0.6, 0.8), frame=outward, paint=b.second)
    b.box((-length * 0.9, 0, 0.24), (0.17, 0.035, 0.24), taper=(0.55, 1.0), paint=b.second)
    b.ball((length * 0.56, 0, radius * 0.5), (0.16, radius * 0.6, radius * 0.5), paint=b.fixed(0.25, 0.35, 0.45))
    engines = b.mode == 0
    gray = b.fixed(0.3, 0.3, 0.33)
    for side in (-1, 1):
        b.round((0.2, side * span * 0.45, -0.13), 0.09, 0.17, frame=ALONG_X, on=engines, paint=b.plain)
        b.round((0.36, side * span * 0.45, -0.13), 0.07, 0.02, frame=ALONG_X, on=engines, paint=gray)
    b.box((length * 1.0, 0, 0), (0.025, 0.05, 0.38), frame=b.turn(roll=b.uniform(0.0, 90.0)), on=~engines, paint=gray)
    b.ball((length * 1.0, 0, 0), (0.09, 0.06, 0.06), on=~engines, paint=gray)


def sailboat(b: Builder) -> None:
    """A hull with a pointed bow (+x), a mast, a mainsail behind it and sometimes a foresail."""
    length, beam, draft = b.uniform(0.78, 0.88), b.uniform(0.32, 0.38), b.uniform(0.34, 0.42)
    height = b.uniform(0.56, 0.66)
    b.ball((0, 0, 0), (length, beam, draft), zhi=0.0, paint=b.second)
    b.box((-0.42 * length, 0, 0.06), (0.2, beam * 0.5, 0.1), paint=b.second)
    b.round((0.06, 0, height), 0.028, height + 0.05, paint=b.fixed(0.45, 0.3, 0.18))
    # The sails are swung out, as on a real boat, so they are visible from the front too.
    swing = b.uniform(18.0, 30.0)
    b.box(
        (0.0, 0, height + 0.1),
        (length * 0.85, 0.04, height * 0.94),
        taper=(0.04, 1.0),
        xlo=0.0,
        frame=b.turn(yaw=180.0 - swing),
    )
    fore = b.mode == 1
    b.box(
        (0.13, 0, height * 0.85),
        (length * 0.72, 0.04, height * 0.76),
        taper=(0.04, 1.0),
        xlo=0.0,
        frame=b.turn(yaw=0.4 * swing),
        on=fore,
    )


def train_engine(b: Builder) -> None:
    """A steam engine: a boiler along x with the cab behind it, a chimney, a dome, wheels and a buffer in front."""
    length, radius = b.uniform(0.5, 0.58), b.uniform(0.25, 0.3)
    dark = b.fixed(0.14, 0.14, 0.15)
    b.box((-0.05, 0, -radius - 0.04), (0.92, 0.33, 0.09), paint=b.plain)
    b.round((0.28, 0, 0.0), radius, length, frame=ALONG_X)
    b.round((0.28 + length, 0, 0.0), radius * 0.86, 0.04, frame=ALONG_X, paint=dark)
    cab = b.uniform(0.34, 0.4)
    b.box((-0.6, 0, 0.12), (0.32, 0.36, cab + 0.04))
    b.box((-0.6, 0, cab + 0.2), (0.4, 0.42, 0.06), paint=b.second)
    window = b.fixed(0.66, 0.86, 0.95)
    b.box((-0.58, 0, cab * 0.62), (0.13, 0.375, 0.11), paint=window)
    stack = b.uniform(0.18, 0.24)
    b.round((0.62, 0, radius + stack * 0.8), 0.085, stack, top=1.5, paint=b.second)
    b.ball((0.14, 0, radius), (0.12, 0.12, 0.15), paint=b.second)
    wheel, three = b.uniform(0.17, 0.2), b.mode == 1
    for k, x in enumerate((-0.6, 0.5, -0.05)):
        # Both wheels of an axle are one cylinder, whose middle is hidden by the frame.
        b.round((x, 0, -radius - 0.2), wheel, 0.37, frame=ALONG_Y, on=three if k == 2 else None, paint=dark)
    b.box((0.94, 0, -radius - 0.14), (0.2, 0.3, 0.14), taper=(0.1, 1.0), xlo=0.0, paint=b.plain)


def bicycle(b: Builder) -> None:
    """Two wheels with thin tires and spokes, a frame of tubes, a seat, a handlebar and sometimes a basket."""
    wheel, base, tube = b.uniform(0.35, 0.38), b.uniform(0.52, 0.58), 0.03
    dark = b.fixed(0.14, 0.14, 0.15)
    for front in (-1, 1):
        rim = b.round_piece((front * base, 0, 0), wheel - 0.055, 0.1, frame=ALONG_Y, paint=b.second)
        b.round((front * base, 0, 0), wheel, 0.035, frame=ALONG_Y, hole=rim, paint=b.second)
        for turn in (20.0, 110.0):
            spoke = b.turn(pitch=turn + 15.0 * front)
            b.box((front * base, 0, 0), (0.015, 0.015, wheel - 0.03), frame=spoke, paint=b.second)
    crank, post, head = (-0.08, 0.0, -0.04), (-0.2, 0.0, 0.4), (base - 0.14, 0.0, 0.42)
    b.rod(crank, (-0.24, 0, 0.54), tube)
    b.rod(post, head, tube)
    b.rod(crank, (base - 0.12, 0, 0.34), tube)
    b.rod((-base, 0, 0), crank, tube * 0.8)
    b.rod((-base, 0, 0), post, tube * 0.8)
    b.rod((base, 0, 0), (base - 0.2, 0, 0.62), tube)
    b.rod((base - 0.2, -0.24, 0.64), (base - 0.2, 0.24, 0.64), tube * 0.9, paint=dark)
    b.ball((-0.26, 0, 0.56), (0.16, 0.085, 0.045), paint=dark)
    b.rod((-0.19, -0.12, -0.12), (0.03, 0.12, 0.04), 0.028, paint=dark)
    b.box((base + 0.02, 0, 0.5), (0.14, 0.17, 0.11), taper=(1.2, 1.15), on=b.mode == 1, paint=b.plain)


def helicopter(b: Builder) -> None:
    """A round cabin with a glass front, a thin tail with fin and rotor, skids, and two or four thin rotor blades."""
    length, height = b.uniform(0.4, 0.46), b.uniform(0.28, 0.32)
    b.ball((0, 0, 0), (length, height * 0.98, height))
    b.ball((length * 0.36, 0, 0.03), (length * 0.68, height * 0.8, height * 0.82), paint=b.fixed(0.3, 0.45, 0.6))
    tail = b.uniform(0.95, 1.05)
    b.rod((-length * 0.5, 0, 0.08), (-tail, 0, 0.14), 0.12, top=0.35)
    b.box((-tail, 0, 0.22), (0.11, 0.025, 0.2), taper=(0.6, 1.0), paint=b.second)
    dark = b.fixed(0.22, 0.22, 0.24)
    b.box((-tail - 0.02, 0.05, 0.22), (0.02, 0.012, 0.17), frame=b.turn(pitch=b.uniform(0.0, 90.0)), paint=dark)
    b.round((0, 0, height + 0.08), 0.035, 0.12, paint=dark)
    b.round((0, 0, height + 0.02), 0.13, 0.06, top=0.6, paint=b.plain)
    turn = b.uniform(25.0, 65.0)
    b.box((0, 0, height + 0.18), (0.95, 0.05, 0.014), frame=b.turn(yaw=turn), paint=b.second)
    b.box((0, 0, height + 0.18), (0.95, 0.05, 0.014), frame=b.turn(yaw=turn + 90.0), on=b.mode == 1, paint=b.second)
    for side in (-1, 1):
        y = side * 0.27
        b.rod((-0.36, y, -height - 0.16), (0.42, y, -height - 0.16), 0.022, paint=dark)
        for x in (-0.18, 0.18):
            b.rod((x, y * 0.5, -height * 0.7), (x, y, -height - 0.16), 0.018, paint=dark)

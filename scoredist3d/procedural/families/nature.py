"""Mushroom, pine tree, flower, cactus and palm tree."""

from __future__ import annotations

import math

import torch

from scoredist3d.procedural.builder import ALONG_X, Builder


def mushroom(b: Builder) -> None:
    """A wide cap (dome or cone) on a thick stem."""
    cap, height, stem = b.uniform(0.78, 0.9), b.uniform(0.5, 0.62), b.uniform(0.34, 0.42)
    dome = b.mode == 0
    b.ball((0, 0, 0), (cap, cap, height), zlo=0.0, on=dome)
    b.ball((0, 0, 0.01), (cap, cap, 0.14), zhi=0.0, on=dome, paint=b.plain)
    b.round((0, 0, height * 0.6), cap, height * 0.6, top=0.1, on=~dome)
    b.ball((0, 0, 0.01), (cap, cap, 0.1), zhi=0.0, on=~dome, paint=b.plain)
    thick = b.uniform(0.22, 0.28)
    b.round((0, 0, -stem), thick * 1.2, stem + 0.05, top=0.78, paint=b.second_or(0.95, 0.9, 0.78))


def pine_tree(b: Builder) -> None:
    """Two or three stacked cones on a trunk."""
    width, tier = b.uniform(0.52, 0.62), b.uniform(0.56, 0.66)
    three = b.mode == 1
    b.round((0, 0, -tier / 2 - 0.14), 0.13, 0.22, paint=b.second_or(0.42, 0.26, 0.13))
    b.round((0, 0, 0), width, tier / 2, top=0.25)
    b.round((0, 0, tier * 0.58), width * 0.8, tier / 2, top=b.select(three, 0.25, 0.04))
    b.round((0, 0, tier * 1.14), width * 0.6, tier / 2, top=0.04, on=three)


def flower(b: Builder) -> None:
    """A flower head of five or eight petals that faces forward (+x), on a stem with two leaves."""
    petal, middle = b.uniform(0.36, 0.4), b.uniform(0.17, 0.2)
    eight = b.mode == 1
    green = b.fixed(0.18, 0.52, 0.16)
    tilt = b.uniform(10.0, 20.0)  # the head faces slightly upwards
    frame = b.turn(pitch=-tilt)
    for k in range(8):
        angle = b.select(eight, 45.0 * k, 72.0 * k + 0.0)
        turned = b.turn(roll=-angle)
        # Petal k points away from the center in the plane of the head.
        rotation = frame @ turned
        center = (rotation @ torch.tensor([0.0, 0.0, 1.0], device=b.device)) * (middle + petal * 0.75)[:, None]
        width = b.select(eight, petal * 0.56, petal * 0.78)
        b.ball(
            (center[:, 0], center[:, 1], center[:, 2]),
            (0.085, width, petal),
            frame=rotation,
            on=eight if k >= 5 else None,
        )
    b.ball((0, 0, 0), (0.15, middle, middle), frame=frame, paint=b.second_or(1.0, 0.82, 0.1))
    stem = b.uniform(0.5, 0.58)
    b.round((-0.08, 0, -stem - 0.14), 0.034, stem, paint=green)
    for side in (-1, 1):
        b.ball((-0.06, side * 0.2, -stem - 0.3), (0.09, 0.05, 0.22), frame=b.turn(roll=-52.0 * side), paint=green)


def cactus(b: Builder) -> None:
    """A column with one or two bent arms, at different heights on the right (+y) and left, in a pot."""
    radius, half = b.uniform(0.2, 0.24), b.uniform(0.55, 0.65)
    b.round((0, 0, 0), radius, half)
    b.ball((0, 0, half), (radius, radius, radius), zlo=0.0)
    arm, reach = radius * 0.72, radius + b.uniform(0.2, 0.26)
    for side, low, on in ((1, -0.12, None), (-1, 0.12, b.mode == 1)):
        tall = b.uniform(0.2, 0.26)
        z = low + b.uniform(-0.04, 0.04)
        b.round((0, side * reach / 2, z), arm, reach / 2, frame=b.turn(roll=-90.0 * side), on=on, paint=b.plain)
        b.round((0, side * reach, z + tall), arm, tall, on=on)
        b.ball((0, side * reach, z + 2 * tall), (arm, arm, arm), zlo=0.0, on=on, paint=b.plain)
        b.ball((0, side * reach, z), (arm, arm, arm), on=on, paint=b.plain)
    pot = b.second_or(0.76, 0.4, 0.24)
    b.round((0, 0, -half - 0.1), 0.27, 0.17, top=1.3, paint=pot)
    b.round((0, 0, -half + 0.08), 0.4, 0.055, paint=pot)
    b.round((radius, 0, half * 0.9), 0.05, 0.04, frame=ALONG_X, paint=b.fixed(1.0, 0.45, 0.65))


def palm_tree(b: Builder) -> None:
    """Six hanging leaves on a thin trunk, which is straight or curved towards the front (+x)."""
    height, leaf = b.uniform(1.25, 1.4), b.uniform(0.34, 0.38)
    trunk = b.second_or(0.5, 0.34, 0.18)
    curve = b.select(b.mode == 1, b.uniform(0.3, 0.38), 0.0)
    knots = [(curve * (k / 3) ** 2, b.number(0.0), height * k / 3) for k in range(4)]
    for k in range(3):
        b.rod(knots[k], knots[k + 1], 0.085 - 0.015 * k, top=0.86, paint=trunk)
    x, _, z = knots[3]
    for k in range(6):
        yaw = math.radians(60 * k + 20)
        cos, sin = math.cos(yaw), math.sin(yaw)
        elbow = (x + cos * leaf, sin * leaf, z + 0.12)
        tip = (x + cos * leaf * 1.9, sin * leaf * 1.9, z - 0.26)
        across = b.turn(yaw=60.0 * k + 20.0)
        for start, end, wide in (((x, b.number(0.0), z), elbow, 0.1), (elbow, tip, 0.13)):
            middle = [(p + q) / 2 for p, q in zip(start, end, strict=True)]
            run = ((end[0] - start[0]).square() + (b.number(end[1]) - b.number(start[1])).square()).sqrt()
            rise = end[2] - start[2]
            tilt = torch.rad2deg(torch.atan2(rise, run))
            frame = across @ b.turn(pitch=-tilt)
            long = (run.square() + rise.square()).sqrt() / 2
            b.ball((middle[0], middle[1], middle[2]), (long * 1.3, wide, 0.035), frame=frame)
    b.ball((x + 0.09, 0.04, z - 0.08), (0.08, 0.08, 0.08), paint=b.fixed(0.36, 0.2, 0.1))

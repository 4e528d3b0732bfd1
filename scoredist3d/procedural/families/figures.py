"""Snowman, robot and teddy bear; all face +x."""

from __future__ import annotations

from scoredist3d.procedural.builder import ALONG_X, Builder

_DARK = (0.07, 0.07, 0.08)


def snowman(b: Builder) -> None:
    """Two or three balls with a carrot nose, eyes, buttons, a scarf and sometimes a hat."""
    three, hat = b.mode % 2 == 1, b.mode >= 2
    large, middle, head = b.uniform(0.46, 0.54), b.uniform(0.36, 0.4), b.uniform(0.28, 0.32)
    b.ball((0, 0, 0), (large, large, large * 0.92))
    chest = large * 0.75 + middle * 0.7
    b.ball((0, 0, chest), (middle, middle, middle * 0.92), on=three)
    top = b.select(three, chest + middle * 0.75 + head * 0.7, large * 0.75 + head * 0.75)
    b.ball((0, 0, top), (head, head, head), paint=b.plain)
    dark = b.fixed(*_DARK)
    b.round((head + 0.12, 0, top), 0.085, 0.2, top=0.05, frame=ALONG_X, paint=b.fixed(1.0, 0.5, 0.05))
    for side in (-1, 1):
        b.ball((head * 0.86, side * head * 0.4, top + head * 0.34), (0.055, 0.055, 0.055), paint=dark)
    b.ball((large * 0.97, 0, large * 0.12), (0.06, 0.06, 0.06), paint=dark)
    button = b.select(three, chest, large * 0.45)
    b.ball((b.select(three, middle * 0.98, large * 0.85), 0, button), (0.06, 0.06, 0.06), paint=dark)
    b.round((0, 0, top - head * 0.8), head * 0.94, 0.075, top=0.92, paint=b.second)
    b.box((head * 0.82, 0.13, top - head * 1.15), (0.05, 0.07, 0.18), frame=b.turn(pitch=-14.0), paint=b.second)
    hat_paint = b.second_or(0.13, 0.13, 0.15)
    b.round((0, 0, top + head * 0.78), head * 1.25, 0.035, on=hat, paint=hat_paint)
    b.round((0, 0, top + head * 0.8 + 0.2), head * 0.8, 0.2, on=hat, paint=hat_paint)
    for side in (-1, 1):
        z = b.select(three, chest, large * 0.4)
        reach = b.select(three, middle, large * 0.85)
        b.round(
            (0, side * (reach + 0.14), z + 0.12),
            0.035,
            0.24,
            frame=b.turn(roll=-55.0 * side),
            paint=b.fixed(0.4, 0.25, 0.13),
        )


def robot(b: Builder) -> None:
    """A boxy body and limbs, and a square or domed head with two eyes and an antenna."""
    width, height = b.uniform(0.36, 0.42), b.uniform(0.36, 0.44)
    depth, head = b.uniform(0.24, 0.3), b.uniform(0.24, 0.28)
    b.box((0, 0, 0), (depth, width, height))
    square = b.mode == 0
    z = height + 0.03 + head
    block = b.box_piece((0, 0, z), (depth * 0.95, head * 1.2, head), paint=b.second)
    vault = b.ball_piece((0, 0, z - head), (head * 1.2, head * 1.2, head * 2.0), zlo=0.0, paint=b.second)
    b.add(b.either(square, block, vault))
    gray = b.fixed(0.35, 0.35, 0.38)
    face = b.select(square, depth * 0.95, head * 1.02)
    b.box((face, 0, z + 0.04), (0.06, head * 0.92, 0.11), paint=b.fixed(*_DARK))
    for side in (-1, 1):
        b.round((face + 0.05, side * head * 0.45, z + 0.04), 0.075, 0.03, frame=ALONG_X, paint=b.fixed(1.0, 0.97, 0.8))
        b.box((0, side * (width + 0.12), 0.02), (0.11, 0.1, height * 0.92), paint=b.plain)
        b.box((0, side * width * 0.52, -height - 0.22), (0.13, 0.13, 0.26), paint=b.plain)
        b.box((0.06, side * width * 0.52, -height - 0.46), (0.21, 0.15, 0.07), paint=gray)
    b.round((0, 0, z + head + 0.12), 0.03, 0.14, paint=gray)
    b.ball((0, 0, z + head + 0.28), (0.075, 0.075, 0.075), paint=b.second)
    b.box((depth, 0, 0.06), (0.03, width * 0.55, height * 0.4), paint=b.fixed(0.8, 0.85, 0.88))


def teddy_bear(b: Builder) -> None:
    """A round body and head with ears, snout and paws; sitting (legs forward) or standing."""
    body, head = b.uniform(0.4, 0.46), b.uniform(0.34, 0.38)
    sitting = b.mode == 0
    b.ball((0, 0, 0), (body * 0.9, body, body * 1.05))
    top = body + head * 0.72
    b.ball((0.03, 0, top), (head * 0.95, head * 1.06, head))
    dark = b.fixed(*_DARK)
    b.ball((body * 0.42, 0, -0.04), (body * 0.56, body * 0.66, body * 0.72), paint=b.second_or(0.93, 0.82, 0.62))
    b.ball((head * 0.9, 0, top - head * 0.2), (0.15, 0.17, 0.13), paint=b.second_or(0.93, 0.82, 0.62))
    b.ball((head * 0.9 + 0.13, 0, top - head * 0.12), (0.05, 0.065, 0.05), paint=dark)
    ear = b.uniform(0.14, 0.17)
    for side in (-1, 1):
        b.ball((0, side * head * 0.82, top + head * 0.76), (0.09, ear, ear), paint=b.plain)
        b.ball((head * 0.84, side * head * 0.42, top + head * 0.22), (0.055, 0.055, 0.055), paint=dark)
        b.ball(
            (0.1, side * (body + 0.04), body * 0.28), (0.15, 0.15, 0.3), frame=b.turn(roll=38.0 * side), paint=b.plain
        )
        x = b.select(sitting, body * 0.95, 0.03)
        z = b.select(sitting, -body * 0.78, -body * 1.2)
        half = (b.select(sitting, 0.32, 0.19), b.number(0.18), b.select(sitting, 0.18, 0.34))
        b.ball((x, side * body * 0.58, z), half, paint=b.plain)

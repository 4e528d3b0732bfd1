"""Duck, fish, dog, cat and spider; all face +x."""

from __future__ import annotations

import math

from scoredist3d.procedural.builder import ALONG_Y, Builder

_DARK = (0.07, 0.07, 0.08)


def duck(b: Builder) -> None:
    """A round body with a raised tail, a head with a flat beak, and wings; sitting, or standing on thin legs."""
    body, head = b.uniform(0.5, 0.56), b.uniform(0.24, 0.27)
    orange, dark = b.fixed(1.0, 0.55, 0.05), b.fixed(*_DARK)
    b.ball((0, 0, 0), (body, body * 0.68, body * 0.62))
    b.rod((-body * 0.55, 0, 0.06), (-body * 1.2, 0, 0.34), body * 0.42, top=0.15, paint=b.plain)
    b.rod((body * 0.6, 0, 0.1), (body * 0.72, 0, 0.46), body * 0.36, top=0.6, paint=b.plain)
    x, z = body * 0.78, b.uniform(0.52, 0.58)
    b.ball((x, 0, z), (head, head * 0.92, head))
    b.ball((x + head * 1.15, 0, z - 0.05), (0.2, 0.13, 0.045), paint=orange)
    standing = b.mode == 1
    for side in (-1, 1):
        b.ball((x + head * 0.62, side * head * 0.62, z + 0.08), (0.05, 0.05, 0.05), paint=dark)
        wing = b.turn(pitch=-14.0, yaw=-6.0 * side)
        b.ball((-0.1, side * body * 0.62, 0.06), (body * 0.62, 0.09, 0.2), frame=wing, paint=b.second)
        y = side * body * 0.3
        b.rod((0.0, y, -body * 0.5), (0.02, y, -body * 0.62 - 0.32), 0.02, on=standing, paint=orange)
        b.box((0.09, y, -body * 0.62 - 0.32), (0.15, 0.1, 0.022), on=standing, paint=orange)


def fish(b: Builder) -> None:
    """A flat body with fins and large eyes; the tail is a round fan or forked."""
    length, height, thick = b.uniform(0.6, 0.68), b.uniform(0.36, 0.42), b.uniform(0.17, 0.2)
    b.ball((0, 0, 0), (length, thick, height))
    forked = b.mode == 1
    tail = -length * 0.88
    b.round((tail - 0.24, 0, 0), 0.3, 0.03, frame=ALONG_Y, on=~forked, paint=b.second)
    for side in (-1, 1):
        tip = (tail - 0.42, 0.0, side * 0.4)
        b.bar((tail + 0.12, 0, 0), tip, 0.09, 0.035, taper=(1.7, 1.0), on=forked, paint=b.second)
        eye = (length * 0.62, side * thick * 0.66, height * 0.2)
        b.ball(eye, (0.085, 0.05, 0.085), paint=b.fixed(0.97, 0.97, 0.97))
        b.ball(
            (length * 0.65, side * (thick * 0.66 + 0.035), height * 0.2), (0.045, 0.03, 0.045), paint=b.fixed(*_DARK)
        )
        fin = b.turn(pitch=-62.0, yaw=-24.0 * side)
        b.ball((-0.02, side * thick * 1.05, -0.08), (0.1, 0.025, 0.22), frame=fin, paint=b.second)
    b.box((-0.1, 0, height * 0.98), (0.38, 0.028, 0.17), taper=(0.5, 1.0), paint=b.second)
    b.box((-0.16, 0, -height * 0.98), (0.22, 0.028, 0.13), taper=(1.5, 1.0), paint=b.second)
    b.ball((length * 0.95, 0, -0.06), (0.06, 0.1, 0.03), paint=b.fixed(0.45, 0.15, 0.15))


def dog(b: Builder) -> None:
    """A dog with a long snout, hanging ears and a raised tail; sitting or standing."""
    sitting = b.mode == 0
    head, floor = b.uniform(0.24, 0.27), -0.5
    dark = b.fixed(*_DARK)
    chest, back = b.select(sitting, 0.26, 0.06), b.select(sitting, -0.2, 0.0)
    rear = b.select(sitting, -0.26, -0.46)
    b.rod((rear, 0, back), (0.26, 0, chest + 0.04), 0.25)
    b.ball((rear, 0, back), (0.3, 0.29, b.select(sitting, 0.3, 0.26)))
    b.ball((0.26, 0, chest), (0.25, 0.26, 0.27), paint=b.plain)
    x, z = 0.44, chest + b.uniform(0.42, 0.46)
    b.rod((0.3, 0, chest + 0.06), (x, 0, z), 0.17, top=0.9, paint=b.plain)
    b.ball((x, 0, z), (head * 1.05, head, head * 0.95))
    b.rod((x + 0.08, 0, z - 0.06), (x + 0.42, 0, z - 0.1), 0.15, top=0.75, paint=b.plain)
    b.ball((x + 0.43, 0, z - 0.04), (0.06, 0.075, 0.06), paint=dark)
    hip, foot = b.select(sitting, -0.34, -0.54), b.select(sitting, 0.08, -0.56)
    knee, sole = b.select(sitting, floor + 0.11, 0.0), b.select(sitting, floor + 0.09, floor)
    for side in (-1, 1):
        b.ball((x + head * 0.82, side * 0.11, z + 0.08), (0.045, 0.045, 0.05), paint=dark)
        b.ball((x - 0.06, side * head * 0.98, z - 0.06), (0.11, 0.06, 0.23), paint=b.second)
        b.rod((0.3, side * 0.16, chest), (0.34, side * 0.17, floor), 0.08, paint=b.plain)
        thick = b.select(sitting, 0.105, 0.085)
        b.rod((hip, side * b.select(sitting, 0.2, 0.16), knee), (foot, side * 0.2, sole), thick, paint=b.plain)
    rump, root = b.select(sitting, -0.46, -0.66), b.select(sitting, -0.25, 0.12)
    b.rod((rump, 0, root), (rump - 0.26, 0, root + 0.37), 0.055, top=0.6, paint=b.plain)


def cat(b: Builder) -> None:
    """A cat with pointed ears, thin whiskers and a long raised tail; sitting or standing."""
    sitting = b.mode == 0
    head, floor = b.uniform(0.25, 0.28), -0.54
    low, long = b.select(sitting, -0.14, 0.02), b.select(sitting, 0.33, 0.56)
    rump = b.select(sitting, -0.12, -0.44)
    thick, tall = b.select(sitting, 0.3, 0.23), b.select(sitting, 0.42, 0.24)
    b.ball((b.select(sitting, -0.02, -0.1), 0, low), (long, thick, tall))
    x, z = b.select(sitting, 0.12, 0.46), b.select(sitting, 0.4, 0.37)
    b.ball((x, 0, z), (head * 0.9, head * 1.08, head * 0.92))
    nose = x + head * 0.78
    b.ball((nose, 0, z - 0.08), (0.09, 0.12, 0.075), paint=b.second)
    b.ball((nose + 0.08, 0, z - 0.04), (0.03, 0.04, 0.03), paint=b.fixed(0.95, 0.45, 0.5))
    front, hip = b.select(sitting, 0.2, 0.28), b.select(sitting, -0.08, -0.46)
    for side in (-1, 1):
        b.ball((x + head * 0.72, side * 0.12, z + 0.06), (0.05, 0.05, 0.06), paint=b.fixed(0.1, 0.14, 0.08))
        tip = (x, side * head * 0.78, z + head * 1.5)
        b.rod((x, side * head * 0.56, z + head * 0.5), tip, 0.13, top=0.06, paint=b.second)
        hair = b.fixed(0.3, 0.3, 0.3)
        b.rod((nose + 0.04, -side * 0.36, z - 0.17), (nose + 0.04, side * 0.36, z), 0.013, paint=hair)
        chest = b.select(sitting, 0.1, 0.03)
        b.rod((front - 0.02, side * 0.12, chest), (front + 0.02, side * 0.12, floor), 0.07, paint=b.plain)
        knee, sole = b.select(sitting, floor + 0.09, 0.0), b.select(sitting, floor + 0.07, floor)
        y = side * b.select(sitting, 0.22, 0.12)
        foot = b.select(sitting, 0.2, -0.48)
        b.rod((hip, y, knee), (foot, y, sole), b.select(sitting, 0.09, 0.07), paint=b.plain)
    bend = (rump - 0.32, 0.0, b.select(sitting, -0.2, 0.3))
    b.rod((rump, 0, b.select(sitting, -0.42, 0.08)), bend, 0.05, paint=b.plain)
    b.rod(bend, (rump - 0.26, 0, bend[2] + 0.42), 0.05, top=0.8, paint=b.plain)


def spider(b: Builder) -> None:
    """A large abdomen behind a small head, on eight thin legs; the body is round or long."""
    long = b.mode == 1
    body = b.uniform(0.25, 0.29)
    x = b.select(long, -0.38, -0.3)
    b.ball((x, 0, 0.16), (body * b.select(long, 1.5, 1.0), body * b.select(long, 0.8, 1.0), body * 0.85))
    b.ball((0.12, 0, 0.06), (0.2, 0.19, 0.16), paint=b.plain)
    for side in (-1, 1):
        b.ball((0.28, side * 0.08, 0.13), (0.05, 0.05, 0.05), paint=b.fixed(*_DARK))
        for angle, reach in ((24.0, 0.82), (62.0, 0.72), (108.0, 0.78), (145.0, 0.98)):
            cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
            start, end = (0.04 + 0.1 * cos, side * 0.1, 0.07), (0.04 + reach * cos, side * reach * sin, -0.36)
            b.rod(start, end, 0.03, top=0.6, paint=b.second)

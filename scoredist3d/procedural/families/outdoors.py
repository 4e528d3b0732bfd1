"""Street lamp, windmill, balloon, bench, swing, mailbox and barrel."""

from __future__ import annotations

from scoredist3d.procedural.builder import ALONG_X, ALONG_Y, Builder

_DARK = (0.2, 0.2, 0.22)


def street_lamp(b: Builder) -> None:
    """A thin post with one lantern that hangs in front of it (+x), or with two lanterns at its sides."""
    height, arm = b.uniform(1.7, 1.9), b.uniform(0.34, 0.4)
    one = b.mode == 0
    b.round((0, 0, 0.06), 0.2, 0.07, top=0.8, paint=b.second)
    b.round((0, 0, 0.24), 0.09, 0.14, top=0.6, paint=b.second)
    b.round((0, 0, height / 2), 0.032, height / 2)
    b.ball((0, 0, height + 0.02), (0.055, 0.055, 0.055))
    glass = b.fixed(1.0, 0.93, 0.55)
    for k, side in enumerate((-1, 1)):
        on = ~one if k else None
        x, y = b.select(one, arm, 0.0), b.select(one, 0.0, side * arm)
        top = height - 0.04
        b.rod((0, 0, height - 0.16), (x, y, top), 0.026, on=on)
        b.round((x, y, top - 0.08), 0.16, 0.08, top=0.2, on=on)
        b.round((x, y, top - 0.25), 0.07, 0.09, top=1.6, on=on, paint=glass)
        b.round((x, y, top - 0.35), 0.085, 0.025, on=on)


def windmill(b: Builder) -> None:
    """A tapered tower with a dome, a door in front (+x), and three or four lattice blades on thin beams."""
    radius, height, span = b.uniform(0.4, 0.46), b.uniform(0.6, 0.68), b.uniform(0.78, 0.86)
    b.round((0, 0, 0), radius, height, top=0.62)
    b.ball((0, 0, height), (radius * 0.7, radius * 0.7, 0.24), zlo=0.0, paint=b.plain)
    b.box((radius * 0.96, 0, -height * 0.74), (0.05, 0.1, height * 0.25), paint=b.fixed(0.36, 0.22, 0.12))
    b.box((radius * 0.8, 0, 0.0), (0.06, 0.06, 0.075), paint=b.fixed(0.2, 0.25, 0.32))
    hub, top = radius * 0.62 + 0.16, height * 0.92
    b.rod((0, 0, top), (hub + 0.05, 0, top), 0.075, paint=b.fixed(*_DARK))
    four = b.mode == 1
    start = b.uniform(10.0, 35.0)
    for k in range(4):
        angle = start + b.select(four, 90.0 * k, 120.0 * k)
        frame = b.turn(roll=-angle)
        along, across = frame[:, :, 2], frame[:, :, 1]
        on = four if k == 3 else None
        middle = along * (span / 2)[:, None]
        b.box(
            (hub, middle[:, 1], top + middle[:, 2]),
            (0.022, 0.022, span / 2),
            frame=frame,
            on=on,
            paint=b.fixed(0.25, 0.17, 0.1),
        )
        sail = along * (span * 0.6)[:, None] + across * 0.1
        b.box((hub, sail[:, 1], top + sail[:, 2]), (0.012, 0.085, span * 0.38), frame=frame, on=on, paint=b.second)


def balloon(b: Builder) -> None:
    """A toy balloon on a thin string, or a hot air balloon with a basket on four thin ropes."""
    toy = b.mode == 0
    radius = b.select(toy, b.uniform(0.5, 0.56), b.uniform(0.68, 0.74))
    height = radius * b.select(toy, 1.2, 1.05)
    b.ball((0, 0, 0), (radius, radius, height))
    b.round((0, 0, -height - 0.02), 0.1, 0.06, top=0.3, on=toy, paint=b.plain)
    string = b.uniform(0.5, 0.6)
    b.round((0, 0, -height - string), 0.02, string, on=toy, paint=b.second_or(0.3, 0.3, 0.32))
    neck = 0.24
    b.round((0, 0, -height * 0.86), neck, height * 0.24, top=radius * 0.72 / neck, on=~toy)
    rope, basket = b.fixed(0.35, 0.28, 0.2), b.second_or(0.55, 0.36, 0.18)
    floor = -height * 1.1 - 0.42
    for sx in (-1, 1):
        for sy in (-1, 1):
            b.rod(
                (sx * 0.15, sy * 0.15, floor + 0.1), (sx * 0.19, sy * 0.19, -height * 0.9), 0.016, on=~toy, paint=rope
            )
    b.box((0, 0, floor), (0.17, 0.17, 0.14), taper=(1.15, 1.15), on=~toy, paint=basket)
    b.box((0, 0, floor + 0.14), (0.215, 0.215, 0.025), on=~toy, paint=basket)


def bench(b: Builder) -> None:
    """A park bench of thin slats, the backrest behind (-x), with or without arms."""
    width, depth, lean = b.uniform(0.85, 0.95), b.uniform(0.24, 0.28), 0.1
    arms = b.mode == 1
    for k in range(4):
        x = depth * (k - 1.5) / 1.5
        b.box((x, 0, 0), (0.062, width, 0.013))
    for k in range(3):
        z = 0.17 + 0.17 * k
        b.box((-depth - 0.03 - lean * z * 1.6, 0, z), (0.013, width, 0.06), frame=b.turn(pitch=-9.0))
    for side in (-1, 1):
        y = side * width * 0.84
        b.bar((depth * 0.9, y, -0.44), (depth * 0.9, y, b.select(arms, 0.24, 0.0)), 0.035, 0.035, paint=b.second)
        b.bar((-depth - 0.02, y, -0.44), (-depth - 0.04, y, 0.0), 0.035, 0.035, paint=b.second)
        b.bar((-depth - 0.06, y, -0.04), (-depth - 0.16, y, 0.56), 0.022, 0.035, paint=b.second)
        b.box((0, y, 0.24), (depth + 0.06, 0.05, 0.022), on=arms, paint=b.second)


def swing(b: Builder) -> None:
    """A frame of thin poles with one or two seats that hang on thin ropes."""
    width, height, foot = b.uniform(0.7, 0.78), b.uniform(1.3, 1.4), b.uniform(0.42, 0.5)
    one = b.mode == 0
    b.rod((0, -width - 0.06, height), (0, width + 0.06, height), 0.04)
    for side in (-1, 1):
        for front in (-1, 1):
            b.rod((front * foot, side * (width + 0.08), 0), (0, side * width, height), 0.036)
        b.rod(
            (-foot * 0.62, side * (width + 0.05), height * 0.38),
            (foot * 0.62, side * (width + 0.05), height * 0.38),
            0.024,
        )
    seat = b.uniform(0.34, 0.42)
    rope = b.fixed(0.42, 0.36, 0.28)
    for k, side in enumerate((-1, 1)):
        y, on = b.select(one, 0.0, side * width * 0.46), ~one if k else None
        half = b.select(one, 0.26, 0.2)
        b.box((0, y, seat), (0.13, half + 0.03, 0.03), on=on, paint=b.second)
        for edge in (-1, 1):
            b.rod((0, y + edge * half, seat), (0, y + edge * half, height), 0.016, on=on, paint=rope)


def mailbox(b: Builder) -> None:
    """A box with a round or flat top on a thin post; the door is in front (+x), the flag on the right (+y)."""
    length, width, height = b.uniform(0.46, 0.54), b.uniform(0.27, 0.31), b.uniform(0.18, 0.22)
    b.round((0, 0, -height - 0.62), 0.05, 0.64, paint=b.fixed(0.45, 0.32, 0.2))
    b.round((0, 0, -height - 1.24), 0.2, 0.04, top=0.8, paint=b.fixed(0.45, 0.32, 0.2))
    domed = b.mode == 0
    b.box((0, 0, 0), (length, width, height))
    vault = b.round_piece((0, 0, height), width, length, frame=ALONG_X)
    lid = b.box_piece((0, 0, height + 0.06), (length * 1.06, width * 1.12, 0.05), paint=b.plain)
    b.add(b.either(domed, vault, lid))
    b.box((length + 0.01, 0, -0.02), (0.02, width * 0.82, height * 0.8), paint=b.plain)
    b.round((length, 0, height), width * 0.82, 0.03, frame=ALONG_X, on=domed, paint=b.plain)
    b.box((length + 0.03, 0, b.select(domed, height * 1.1, 0.1)), (0.03, 0.11, 0.022), paint=b.fixed(*_DARK))
    flag = b.second_or(0.86, 0.12, 0.1)
    b.box((0.1, width + 0.03, height + 0.16), (0.025, 0.02, 0.26), paint=flag)
    b.box((0.02, width + 0.03, height + 0.36), (0.13, 0.022, 0.08), paint=flag)


def barrel(b: Builder) -> None:
    """A bulging barrel with hoops; standing upright or lying along y."""
    radius, half = b.uniform(0.55, 0.62), b.uniform(0.68, 0.76)
    lying = (b.mode == 1)[:, None, None]
    frame = b.toward(ALONG_Y) * lying + b.turn() * ~lying
    hoop = b.second_or(0.3, 0.3, 0.33)
    b.ball((0, 0, 0), (radius, radius, half * 1.6), zlo=-0.625, zhi=0.625, frame=frame)
    for k in (-1, 1):
        for share, thick in ((0.4, 0.032), (0.88, 0.032)):
            width = radius * (1 - (share / 1.6) ** 2) ** 0.5 + 0.018
            middle = frame[:, :, 2] * (half * share * k)[:, None]
            b.round((middle[:, 0], middle[:, 1], middle[:, 2]), width, thick, frame=frame, paint=hoop)

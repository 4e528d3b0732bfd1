"""Chair, stool, table, bed, bookshelf, lamp, candle and clock."""

from __future__ import annotations

import math

import torch

from scoredist3d.procedural.builder import ALONG_X, Builder


def chair(b: Builder) -> None:
    """A seat on four legs with a backrest (-x); some chairs have arms."""
    half, depth = b.uniform(0.42, 0.5), b.uniform(0.42, 0.5)
    leg, back, thick = b.uniform(0.32, 0.42), b.uniform(0.45, 0.6), b.uniform(0.036, 0.05)
    b.box((0, 0, 0.04), (depth, half, 0.06), paint=b.second)
    b.box((-depth + 0.06, 0, back), (0.05, half, back))
    arms = b.mode == 1
    for side in (-1, 1):
        for front in (-1, 1):
            b.box((front * (depth - thick), side * (half - thick), -leg), (thick, thick, leg))
        b.box((0.0, side * (half - 0.01), 0.42), (depth * 0.95, 0.06, 0.04), on=arms, paint=b.plain)
        b.box((depth * 0.72, side * (half - 0.01), 0.22), (0.04, 0.04, 0.2), on=arms, paint=b.plain)


def stool(b: Builder) -> None:
    """A thick round seat on three or four splayed legs joined by a ring."""
    radius, leg, splay = b.uniform(0.38, 0.46), b.uniform(0.55, 0.7), b.uniform(8.0, 12.0)
    b.round((0, 0, 0.02), radius, 0.12, paint=b.second)
    three = b.mode == 0
    for k in range(4):
        azimuth = b.select(three, 120.0 * k, 45.0 + 90.0 * k)
        cos, sin = torch.cos(azimuth * math.pi / 180), torch.sin(azimuth * math.pi / 180)
        reach = radius * 0.72 + leg * 0.17
        on = ~three if k == 3 else None
        b.round((reach * cos, reach * sin, -leg), 0.05, leg, frame=b.turn(yaw=azimuth, pitch=-splay), on=on)
    ring = radius * 0.72 + leg * 0.22
    opening = b.round_piece((0, 0, -leg * 1.25), ring - 0.035, 0.1, paint=b.plain)
    b.round((0, 0, -leg * 1.25), ring + 0.035, 0.03, hole=opening, paint=b.plain)


def table(b: Builder) -> None:
    """A wide square top on four legs, or a round top on a pedestal."""
    width, depth = b.uniform(0.85, 1.0), b.uniform(0.6, 0.8)
    leg, thick = b.uniform(0.36, 0.48), b.uniform(0.045, 0.065)
    square = b.mode == 0
    b.box((0, 0, 0), (depth, width, 0.06), on=square)
    for side in (-1, 1):
        for front in (-1, 1):
            b.box((front * (depth - 0.1), side * (width - 0.1), -leg), (thick, thick, leg), on=square, paint=b.second)
    b.round((0, 0, 0), width * 0.9, 0.06, on=~square)
    b.round((0, 0, -leg), 0.09, leg, on=~square, paint=b.second)
    b.round((0, 0, -2 * leg), 0.42, 0.07, top=0.6, on=~square, paint=b.second)


def bed(b: Builder) -> None:
    """A blanket over a low frame, with headboard and pillows at the back (-x)."""
    length, width = b.uniform(0.85, 0.95), b.uniform(0.5, 0.66)
    height, head = b.uniform(0.16, 0.2), b.uniform(0.34, 0.46)
    b.box((0.04, 0, height * 0.75), (length * 0.98, width * 0.97, height))
    b.box((0, 0, -0.12), (length * 1.02, width * 1.02, 0.11), paint=b.second)
    b.box((-length, 0, head - 0.28), (0.06, width * 1.04, head), paint=b.second)
    b.box((length, 0, -0.06), (0.045, width * 1.04, 0.2), paint=b.second)
    for side in (-1, 1):
        for front in (-1, 1):
            b.box((front * (length - 0.02), side * (width - 0.05), -0.28), (0.065, 0.065, 0.12), paint=b.second)
    pillow, top = b.fixed(0.96, 0.96, 0.94), height * 1.75
    two = b.mode == 1
    b.ball((-length * 0.7, 0, top), (0.2, width * 0.6, 0.11), on=~two, paint=pillow)
    for side in (-1, 1):
        b.ball((-length * 0.7, side * width * 0.46, top), (0.2, width * 0.4, 0.11), on=two, paint=pillow)


def bookshelf(b: Builder) -> None:
    """A tall case, open at the front (+x), with two or three shelves and books of different heights."""
    depth, width, height = b.uniform(0.24, 0.3), b.uniform(0.55, 0.66), b.uniform(0.85, 1.0)
    wall = 0.075
    cavity = b.piece((0.12, 0, 0), (depth, width - wall, height - wall), quadric=(0.0, 0.0), paint=b.plain)
    b.box((0, 0, 0), (depth, width, height), hole=cavity)
    three = b.mode == 1
    rows = 4
    inner = 2 * (height - wall)
    for k in range(1, rows):
        # Two shelves make three rows, three shelves make four.
        z = -height + wall + b.select(three, inner * k / 4, inner * k / 3)
        b.box((0, 0, z), (depth * 0.98, width - 0.02, 0.035), on=three if k == 3 else None, paint=b.plain)
    books = b.second_or(0.93, 0.88, 0.74)
    for k in range(rows):
        pitch = b.select(three, inner / 4, inner / 3)
        floor = -height + wall + pitch * k + 0.03
        on = three if k == 3 else None
        for side in (-1, 1):
            tall = pitch * b.uniform(0.24, 0.38)
            broad = b.uniform(0.11, 0.17)
            shift = side * (width - wall - broad)
            b.box((0.02, shift, floor + tall), (depth * 0.6, broad, tall), on=on, paint=books)


def lamp(b: Builder) -> None:
    """A large shade (frustum or dome, open at the bottom) on a thin pole with a flat base."""
    shade, height, pole = b.uniform(0.54, 0.64), b.uniform(0.3, 0.36), b.uniform(0.5, 0.6)
    funnel = b.round_piece((0, 0, -0.03), shade * 0.92, height, top=0.5, paint=b.plain)
    cone = b.round_piece((0, 0, 0), shade, height, top=b.uniform(0.42, 0.56), hole=funnel)
    vault = b.ball_piece((0, 0, -height * 1.03), (shade * 0.9, shade * 0.9, height * 1.4), paint=b.plain)
    dome = b.ball_piece((0, 0, -height), (shade, shade, height * 1.6), zlo=0.0, hole=vault)
    b.add(b.either(b.mode == 0, cone, dome))
    b.ball((0, 0, -height * 0.4), (0.15, 0.15, 0.17), paint=b.fixed(1.0, 0.93, 0.6))
    b.round((0, 0, -height * 0.5 - pole), 0.036, pole + 0.1, paint=b.second)
    b.round((0, 0, -height * 0.5 - 2 * pole - 0.08), b.uniform(0.36, 0.44), 0.065, top=0.75, paint=b.second)


def candle(b: Builder) -> None:
    """A thick candle in a dish with a finger ring at the back (-x), or three thin candles on one dish; with flames."""
    radius, half = b.uniform(0.3, 0.36), b.uniform(0.55, 0.7)
    one = b.mode == 0
    flame, core, wick = b.fixed(1.0, 0.62, 0.1), b.fixed(1.0, 0.92, 0.45), b.fixed(0.12, 0.1, 0.1)
    dish = b.round_piece((0, 0, -half + 0.12), 0.6, 0.12, top=1.12, paint=b.second)
    b.round((0, 0, -half), 0.62, 0.1, top=1.15, hole=dish, paint=b.second)
    ring = b.round_piece((-0.84, 0, -half + 0.02), 0.11, 0.2, frame=b.toward(ALONG_X, yaw=90.0), paint=b.second)
    b.round((-0.84, 0, -half + 0.02), 0.2, 0.06, frame=b.toward(ALONG_X, yaw=90.0), hole=ring, on=one, paint=b.second)
    b.round((0, 0, 0), radius, half, on=one)
    b.round((0, 0, half + 0.06), 0.03, 0.1, on=one, paint=wick)
    b.ball((0, 0, half + 0.3), (0.13, 0.13, 0.23), on=one, paint=flame)
    heights = (1.0, 0.78, 0.62)
    for k, share in enumerate(heights):
        angle = math.radians(120 * k + 180)
        x, y = 0.32 * math.cos(angle), 0.32 * math.sin(angle)
        top = -half + 2 * half * share
        b.round((x, y, -half + half * share), 0.22, half * share, on=~one)
        b.ball((x, y, top + 0.2), (0.1, 0.1, 0.18), on=~one, paint=flame)
        b.round((x, y, top + 0.03), 0.025, 0.06, on=~one, paint=wick if k else core)


def clock(b: Builder) -> None:
    """An alarm clock that faces forward (+x): a round or square case, thin hands, two bells and two feet."""
    radius, half = b.uniform(0.56, 0.64), b.uniform(0.2, 0.25)
    disc = b.round_piece((0, 0, 0), radius, half, frame=ALONG_X)
    b.add(b.either(b.mode == 0, disc, b.box_piece((0, 0, 0), (half, radius * 0.92, radius * 0.92))))
    white, dark = b.fixed(0.97, 0.97, 0.94), b.fixed(0.1, 0.1, 0.12)
    b.round((half, 0, 0), radius * 0.78, 0.02, frame=ALONG_X, paint=white)
    front = half + 0.03
    for k in range(4):
        angle = math.radians(90 * k)
        y, z = radius * 0.66 * math.sin(angle), radius * 0.66 * math.cos(angle)
        b.bar((front, y * 0.86, z * 0.86), (front, y * 1.1, z * 1.1), 0.015, 0.024, paint=dark)
    hour = b.uniform(20.0, 340.0)
    minute = hour + b.uniform(60.0, 300.0)
    for turn, length, wide in ((hour, 0.36, 0.03), (minute, 0.6, 0.02)):
        y, z = torch.sin(torch.deg2rad(turn)) * radius * length, torch.cos(torch.deg2rad(turn)) * radius * length
        b.box((front, y / 2, z / 2), (0.02, wide, radius * length / 2), frame=b.turn(roll=-turn), paint=dark)
    for side in (-1, 1):
        tilt = b.turn(roll=-28.0 * side)
        y, z = side * radius * 0.52, radius * 0.96
        b.ball((0, y, z), (0.2, 0.2, 0.19), zlo=0.0, frame=tilt, paint=b.second)
        b.rod((0, side * radius * 0.5, -radius * 0.8), (0, side * radius * 0.74, -radius * 1.2), 0.05, paint=b.second)
    b.rod((0, 0, radius * 0.9), (0, 0, radius * 1.22), 0.03, paint=b.plain)
    b.box((0, 0, radius * 1.24), (0.05, 0.12, 0.035), paint=b.plain)

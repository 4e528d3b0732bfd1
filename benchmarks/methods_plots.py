"""Scatter plot and bar chart as SVG, without a plotting library."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

WIDTH, LEFT, RIGHT = 760, 70, 150
INK, FAINT, FIRST, SECOND = "#222", "#ddd", "#3b6ea5", "#e08a3c"


def scatter(points: Sequence[tuple[str, float, float]], x_label: str, y_label: str) -> str:
    """Scatter plot of named points on linear axes; lower and further right is better."""
    height, bottom, top = 420, 50, 20
    x_low, x_high = _range([x for _, x, _ in points] + [0.0, 1.0])
    y_low, y_high = _range([y for _, _, y in points] + [0.0])

    def place(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)
        return across, top + (y_high - y) / (y_high - y_low) * (height - top - bottom)

    parts = []
    for x in _ticks(x_low, x_high):
        across = place(x, y_low)[0]
        parts.append(_line(across, top, across, height - bottom, FAINT))
        parts.append(_text(across, height - bottom + 16, f"{x:g}", "middle"))
    for y in _ticks(y_low, y_high):
        down = place(x_low, y)[1]
        parts.append(_line(LEFT, down, WIDTH - RIGHT, down, FAINT))
        parts.append(_text(LEFT - 6, down + 4, f"{y:g}", "end"))
    taken: list[tuple[float, float]] = []
    for name, x, y in sorted(points, key=lambda point: point[2]):
        across, down = place(x, y)
        label = down + 4
        while any(abs(across - other) < 110 and abs(label - baseline) < 11 for other, baseline in taken):
            label -= 11
        taken.append((across, label))
        if label < down:  # the label was moved away from its point
            parts.append(_line(across, down, across + 6, label - 4, FIRST))
        parts.append(f'<circle cx="{across:.1f}" cy="{down:.1f}" r="4" fill="{FIRST}"/>')
        parts.append(_text(across + 7, label, name))
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, height - 12, x_label, "middle"))
    middle = (top + height - bottom) / 2
    parts.append(f'<g transform="rotate(-90 16 {middle})">{_text(16, middle, y_label, "middle")}</g>')
    return _svg(height, parts)


def bars(rows: Sequence[tuple[str, float, float]], title: str) -> str:
    """Bar chart with one bar of two stacked parts per row (name, first part, second part)."""
    line, top = 20, 34
    left = 170
    longest = max([first + second for _, first, second in rows], default=1.0) or 1.0
    parts = [_text(8, 18, title)]
    for index, (name, first, second) in enumerate(sorted(rows, key=lambda row: row[1] + row[2])):
        y = top + index * line
        scale = (WIDTH - left - 60) / longest
        parts.append(_text(left - 6, y + 12, name, "end"))
        parts.append(_bar(left, y, first * scale, FIRST))
        parts.append(_bar(left + first * scale, y, second * scale, SECOND))
        value = f"{first:.1f}" + (f" + {second:.1f}" if second else "")
        parts.append(_text(left + (first + second) * scale + 6, y + 12, value))
    return _svg(top + len(rows) * line + 10, parts)


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    margin = 0.06 * ((high - low) or 1.0)
    return low - margin, high + margin


def _ticks(low: float, high: float) -> list[float]:
    """About five round numbers between ``low`` and ``high``."""
    raw = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(raw))
    step = power * min((1, 2, 5, 10), key=lambda factor: abs(factor * power - raw))
    return [round(step * index, 10) for index in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{INK}">{escape(text)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, color: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{color}"/>'


def _bar(x: float, y: float, width: float, color: str) -> str:
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="15" fill="{color}"/>'


def _svg(height: float, parts: Sequence[str]) -> str:
    size = f'viewBox="0 0 {WIDTH} {height:g}" width="{WIDTH}" height="{height:g}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="11">'
    paper = f'<rect width="{WIDTH}" height="{height:g}" fill="white"/>'
    return "\n".join([head, paper, *parts, "</svg>\n"])

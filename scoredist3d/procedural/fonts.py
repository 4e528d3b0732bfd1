"""Fonts of capital letters and digits, and anti-aliased text, batched on any device.

Six fonts share one skeleton of pen strokes and differ in their pens, proportions and corners; the seventh is made of
5x7 squares. Glyphs are drawn once as bitmaps. Text is sampled from these bitmaps at arbitrary points, so it can be
drawn on a grid of pixels (:func:`draw_text`) or on the surface of an object (:class:`TextLayout`).

Text coordinates: the unit is the height of a capital letter (the cap height), x points to the right, y up, and the
origin is the center of the text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor

from scoredist3d.procedural.glyphs import CHARACTERS, PIXELS, SKELETONS, Stroke

_RESOLUTION = 56  # bitmap pixels per cap height, a multiple of the seven rows of the pixel font
_MARGIN = 2  # empty bitmap pixels around each glyph
_CELL_WIDTH = 80  # bitmap pixels, enough for the widest glyph
_SUPERSAMPLING = 3
_UNIT_X, _UNIT_Y = 0.1, 0.125  # cap heights per unit of the skeletons
_SPACING = 0.01  # distance of the points that represent a stroke, in cap heights


@dataclass(frozen=True)
class Font:
    """Style of a font; lengths are in cap heights.

    Attributes:
        name: Name.
        pen: Half-width of vertical and half-height of horizontal strokes.
        stretch: Horizontal scale of the skeleton.
        corner: Size of rounded corners; they are at most half as long as the strokes.
        chamfer: Whether rounded corners are cut off straight.
        square: Whether the pen is a rectangle instead of an ellipse.
        serif: Half-length of the serifs; 0 for none.
        slant: Shift of the top relative to the bottom.
        gap: Distance between letters.
    """

    name: str
    pen: tuple[float, float]
    stretch: float = 1.0
    corner: float = 0.5
    chamfer: bool = False
    square: bool = False
    serif: float = 0.0
    slant: float = 0.0
    gap: float = 0.17


FONTS: tuple[Font, ...] = (
    Font("sans", (0.068, 0.064)),
    Font("bold", (0.1, 0.08), stretch=1.15, gap=0.13),
    Font("condensed", (0.075, 0.07), stretch=0.72, corner=0.2, gap=0.16),
    Font("slab", (0.076, 0.046), stretch=1.04, square=True, serif=0.13, gap=0.12),
    Font("octagonal", (0.064, 0.064), stretch=0.98, corner=0.25, chamfer=True, square=True, gap=0.18),
    Font("italic", (0.076, 0.062), stretch=0.94, corner=0.34, slant=0.24, gap=0.15),
    Font("pixel", (0.0, 0.0), gap=1 / 7),
)
PIXEL_FONT = len(FONTS) - 1


@dataclass(frozen=True)
class _Atlas:
    """Bitmaps of all glyphs, (fonts * characters + 1, rows, columns), the last one empty, and their widths.

    ``slants`` and ``gaps`` are (fonts,), ``widths`` (fonts, characters), in cap heights.
    """

    bitmaps: Tensor
    widths: Tensor
    slants: Tensor
    gaps: Tensor


@dataclass(frozen=True)
class TextLayout:
    """Positions of the letters of ``N`` texts.

    Attributes:
        glyphs: (N, L) int64, index of each letter's bitmap.
        left: (N, L), left edge of each letter; infinity behind the last letter.
        width: (N,), width of the text.
        slant: (N,), horizontal shift per unit of height.
        bitmaps: (G, rows, columns), bitmaps of all glyphs.
    """

    glyphs: Tensor
    left: Tensor
    width: Tensor
    slant: Tensor
    bitmaps: Tensor

    def coverage(self, x: Tensor, y: Tensor) -> Tensor:
        """Ink at points (N, R) in text coordinates, in [0, 1], (N, R).

        This is a pure function with fixed shapes and without host synchronization.
        """
        x = x - self.slant[:, None] * y
        # The bitmap of a letter reaches to the middle of the gaps, where it is empty.
        letter = (x[:, :, None] >= self.left[:, None, :] - _MARGIN / _RESOLUTION).sum(-1) - 1
        letter = letter.clamp_min(0)
        glyph = self.glyphs.gather(1, letter)
        rows, columns = self.bitmaps.shape[1:]
        column = (x - self.left.gather(1, letter)) * _RESOLUTION + _MARGIN - 0.5
        row = (0.5 - y) * _RESOLUTION + _MARGIN - 0.5
        column, row = column.clamp(0, columns - 1), row.clamp(0, rows - 1)
        j, i = column.long().clamp_max(columns - 2), row.long().clamp_max(rows - 2)
        s, t = column - j, row - i
        flat = self.bitmaps.flatten()
        first = (glyph * rows + i) * columns + j
        upper = torch.lerp(flat[first], flat[first + 1], s)
        lower = torch.lerp(flat[first + columns], flat[first + columns + 1], s)
        return torch.lerp(upper, lower, t)


def layout_text(texts: Sequence[str], font: int | Tensor, device: torch.device | str) -> TextLayout:
    """Arrange the letters of texts; lower case is drawn as upper case.

    Args:
        texts: N texts of one letter or digit or more.
        font: Index into FONTS, or one for each text, (N,).
        device: Device of the result.

    Raises:
        ValueError: A text is empty or has other characters than letters and digits, or a font does not exist.
    """
    indices = [_character_indices(text) for text in texts]
    fonts = torch.as_tensor(font, dtype=torch.int64).cpu().expand(len(texts))
    if len(fonts) and not 0 <= int(fonts.min()) <= int(fonts.max()) < len(FONTS):
        raise ValueError(f"font must lie in [0, {len(FONTS)}), got {font}")
    atlas = _atlas("cpu")
    length = max((len(row) for row in indices), default=1)
    characters = torch.tensor([row + [-1] * (length - len(row)) for row in indices]).view(len(texts), length)
    real = characters >= 0
    known = characters.clamp_min(0)
    advance = torch.where(real, atlas.widths[fonts[:, None], known] + atlas.gaps[fonts, None], 0.0)
    width = advance.sum(1) - atlas.gaps[fonts]
    left = advance.cumsum(1) - advance - width[:, None] / 2
    glyphs = torch.where(real, fonts[:, None] * len(CHARACTERS) + known, len(atlas.bitmaps) - 1)
    left = torch.where(real, left, math.inf)
    # A slanted text is wider; its center stays where it is.
    slant = atlas.slants[fonts]
    glyphs, left, width, slant = (tensor.to(device) for tensor in (glyphs, left, width + slant, slant))
    return TextLayout(glyphs, left, width, slant, _atlas(str(torch.device(device))).bitmaps)


def draw_text(
    texts: Sequence[str],
    font: int | Tensor,
    height: int,
    width: int,
    *,
    margin: float = 0.08,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Draw texts, centered and as large as they fit: coverage (N, height, width) in [0, 1].

    Args:
        texts: N texts of letters and digits.
        font: Index into FONTS, or one for each text, (N,).
        height, width: Size of the images in pixels.
        margin: Free space on each side, as a fraction of the height.
        device: Device of the result, unless ``font`` is a tensor, whose device is used.

    Raises:
        ValueError: As for :func:`layout_text`, or the margin leaves no space.
    """
    if isinstance(font, Tensor):
        device = font.device
    space = (height - 2 * margin * height, width - 2 * margin * height)
    if min(space) <= 0:
        raise ValueError(f"margin: {margin} leaves no space in {height}x{width} pixels; choose a smaller one")
    layout = layout_text(texts, font, device)
    pixels = torch.minimum(torch.full_like(layout.width, space[0]), space[1] / layout.width)  # per cap height
    fine = _SUPERSAMPLING
    rows = (torch.arange(height * fine, device=device) + 0.5) / fine
    columns = (torch.arange(width * fine, device=device) + 0.5) / fine
    y, x = torch.meshgrid(height / 2 - rows, columns - width / 2, indexing="ij")
    ink = layout.coverage(x.flatten() / pixels[:, None], y.flatten() / pixels[:, None])
    return ink.view(-1, height, fine, width, fine).mean((2, 4))


def _character_indices(text: str) -> list[int]:
    indices = [CHARACTERS.find(character) for character in text.upper()]
    if not indices or min(indices) < 0:
        raise ValueError(f"texts: {text!r} must have one or more of the letters A-Z and digits 0-9, and nothing else")
    return indices


@cache
def _atlas(device: str) -> _Atlas:
    """Bitmaps of all glyphs of all fonts on a device."""
    if device != "cpu":
        atlas = _atlas("cpu")
        return _Atlas(*(t.to(device) for t in (atlas.bitmaps, atlas.widths, atlas.slants, atlas.gaps)))
    glyphs = []
    for font in FONTS:
        for character in CHARACTERS:
            glyphs.append(_pixel_glyph(character) if font.name == "pixel" else _stroke_glyph(font, character))
    bitmaps = torch.stack([bitmap for bitmap, _ in glyphs] + [torch.zeros_like(glyphs[0][0])])
    widths = torch.tensor([width for _, width in glyphs]).view(len(FONTS), len(CHARACTERS))
    return _Atlas(
        bitmaps, widths, torch.tensor([font.slant for font in FONTS]), torch.tensor([font.gap for font in FONTS])
    )


def _pixel_glyph(character: str) -> tuple[Tensor, float]:
    """Bitmap and width of a glyph of the pixel font."""
    cells = torch.tensor([[float(mark == "#") for mark in row] for row in PIXELS[character]])
    size = _RESOLUTION // len(cells)
    ink = cells.repeat_interleave(size, 0).repeat_interleave(size, 1)
    bitmap = torch.zeros(_RESOLUTION + 2 * _MARGIN, _CELL_WIDTH)
    bitmap[_MARGIN : _MARGIN + ink.shape[0], _MARGIN : _MARGIN + ink.shape[1]] = ink
    return bitmap, ink.shape[1] / _RESOLUTION


def _stroke_glyph(font: Font, character: str) -> tuple[Tensor, float]:
    """Bitmap and width of a glyph drawn with the pen of a font.

    The ink is the set of points within the pen around the strokes. The vertical scale is such that the ink of a letter
    is one cap height tall.
    """
    pen = torch.tensor(font.pen)
    scale = torch.tensor([_UNIT_X * font.stretch, _UNIT_Y * (1 - 2 * font.pen[1])])
    sx, sy = scale.tolist()
    strokes = SKELETONS[character]
    lines = [_path([(x * sx, y * sy, soft) for x, y, soft in s.points], s.closed, font) for s in strokes]
    if font.serif > 0:
        lines += _serifs(strokes, scale, font.serif)
    points = torch.cat([_dense(line) for line in lines])
    points = points - torch.stack([points[:, 0].min(), torch.tensor(0.0)]) + pen
    rows, columns = _RESOLUTION + 2 * _MARGIN, _CELL_WIDTH
    y = 1 - (torch.arange(rows) + 0.5 - _MARGIN) / _RESOLUTION
    x = (torch.arange(columns) + 0.5 - _MARGIN) / _RESOLUTION
    grid = torch.stack(torch.meshgrid(y, x, indexing="ij")[::-1], -1).view(-1, 2)
    # In units of the pen, the ink is the set of points at a distance below one.
    distance = torch.cdist(grid / pen, points / pen, p=math.inf if font.square else 2.0).amin(1).view(rows, columns)
    ink = (0.5 + (1 - distance) * float(pen.min()) * _RESOLUTION).clamp(0, 1)
    return ink, float(points[:, 0].max() + pen[0])


def _path(path: list[tuple[float, float, bool]], closed: bool, font: Font) -> Tensor:
    """Polyline (P, 2) of a stroke whose soft vertices are rounded or cut off."""
    count = len(path)
    result: list[tuple[float, float]] = []
    for k, (px, py, soft) in enumerate(path):
        if not soft:
            result.append((px, py))
            continue
        legs = []
        for other in (k - 1, (k + 1) % count):
            qx, qy, other_soft = path[other]
            terminal = not closed and other % count in (0, count - 1)
            length = math.hypot(qx - px, qy - py)
            share = 0.5 if other_soft else 1.0 if terminal else 0.6
            legs.append((qx - px, qy - py, length, min(share * length, font.corner)))
        reach = [min(leg[3], 1.7 * other[3]) for leg, other in zip(legs, legs[::-1], strict=True)]
        (ax, ay), (bx, by) = [(dx / n * r, dy / n * r) for (dx, dy, n, _), r in zip(legs, reach, strict=True)]
        steps = 1 if font.chamfer else 12
        for step in range(steps + 1):
            angle = 0.5 * math.pi * step / steps
            u, v = 1 - math.sin(angle), 1 - math.cos(angle)
            result.append((px + u * ax + v * bx, py + u * ay + v * by))
    if closed:
        result.append(result[0])
    return torch.tensor(result)


def _serifs(strokes: Sequence[Stroke], scale: Tensor, half: float) -> list[Tensor]:
    """Horizontal lines, each (2, 2), where strokes end at the baseline or at the cap height."""
    lines = []
    for stroke in strokes:
        count = len(stroke.points)
        for k, (x, y, soft) in enumerate(stroke.points):
            ends = not stroke.closed and k in (0, count - 1)
            neighbors = [k - 1, (k + 1) % count]
            if not stroke.closed:
                neighbors = [n for n in (k - 1, k + 1) if 0 <= n < count]
            vertical = any(stroke.points[n][0] == x for n in neighbors)
            level = any(stroke.points[n][1] == y for n in neighbors)
            if soft or y not in (0, 8) or not (vertical or (ends and not level)):
                continue
            cx, cy = x * float(scale[0]), y * float(scale[1])
            lines.append(torch.tensor([[cx - half, cy], [cx + half, cy]]))
    return lines


def _dense(line: Tensor) -> Tensor:
    """Points along a polyline (P, 2), at most ``_SPACING`` apart."""
    parts = []
    for start, end in pairwise(line):
        steps = max(1, math.ceil(float((end - start).norm()) / _SPACING))
        parts.append(torch.lerp(start, end, torch.linspace(0, 1, steps + 1)[:, None]))
    return torch.cat(parts)

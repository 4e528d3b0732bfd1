"""Shapes of the letters A-Z and the digits 0-9: skeletons of pen strokes, and marks on a 5x7 grid."""

from __future__ import annotations

from dataclasses import dataclass

CHARACTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"


@dataclass(frozen=True)
class Stroke:
    """A line drawn with the pen.

    Attributes:
        points: Vertices (x, y, soft); x is up to 8 units from the left, y is 0 at the baseline and 8 at the cap
            height. Soft vertices are rounded.
        closed: Whether the line returns to its first vertex.
    """

    points: tuple[tuple[int, int, bool], ...]
    closed: bool


# A vertex is written as its two coordinates, followed by "o" if it is soft; "z" closes a line, "/" starts a new one.
_LINES = {
    "A": "00 38 60 / 13 53",
    "B": "00 08 58o 54o 04 / 00 60o 64o 04",
    "C": "66 68o 08o 00o 60o 62",
    "D": "00 08 68o 60o z",
    "E": "60 00 08 68 / 04 54",
    "F": "00 08 68 / 04 54",
    "G": "66 68o 08o 00o 60o 64 34",
    "H": "00 08 / 60 68 / 04 64",
    "I": "20 28 / 00 40 / 08 48",
    "J": "28 58 50o 00o 02",
    "K": "00 08 / 68 03 / 25 60",
    "L": "08 00 60",
    "M": "00 08 43 88 80",
    "N": "00 08 60 68",
    "O": "00o 08o 68o 60o z",
    "P": "00 08 68o 64o 04",
    "Q": "00o 08o 68o 60o z / 33 60",
    "R": "00 08 68o 64o 04 / 34 60",
    "S": "66 68o 08o 04o 64o 60o 00o 02",
    "T": "08 68 / 38 30",
    "U": "08 00o 60o 68",
    "V": "08 30 68",
    "W": "08 20 46 60 88",
    "X": "00 68 / 08 60",
    "Y": "08 34 68 / 34 30",
    "Z": "08 68 00 60",
    "0": "00o 08o 58o 50o z / 12 46",
    "1": "06 28 20 / 00 40",
    "2": "06 08o 58o 55o 00 50",
    "3": "06 08o 58o 54o 24 54o 50o 00o 02",
    "4": "40 48 02 62",
    "5": "58 08 05 55o 50o 00o 01",
    "6": "57 58o 08o 00o 50o 55o 05o 02",
    "7": "08 58 20",
    "8": "04o 08o 58o 54o z / 04o 00o 50o 54o z",
    "9": "01 00o 50o 58o 08o 03o 53o 56",
}

_BANDS = (
    """
    .###. ####. .#### ####. ##### ##### .#### #...# ###
    #...# #...# #.... #...# #.... #.... #.... #...# .#.
    #...# #...# #.... #...# #.... #.... #.... #...# .#.
    ##### ####. #.... #...# ####. ####. #.### ##### .#.
    #...# #...# #.... #...# #.... #.... #...# #...# .#.
    #...# #...# #.... #...# #.... #.... #...# #...# .#.
    #...# ####. .#### ####. ##### #.... .#### #...# ###
    """,
    """
    ..### #...# #.... #...# #...# .###. ####. .###. ####.
    ....# #..#. #.... ##.## ##..# #...# #...# #...# #...#
    ....# #.#.. #.... #.#.# ##..# #...# #...# #...# #...#
    ....# ##... #.... #.#.# #.#.# #...# ####. #...# ####.
    ....# #.#.. #.... #...# #..## #...# #.... #.#.# #.#..
    #...# #..#. #.... #...# #..## #...# #.... #..#. #..#.
    .###. #...# ##### #...# #...# .###. #.... .##.# #...#
    """,
    """
    .#### ##### #...# #...# #...# #...# #...# ##### .###.
    #.... ..#.. #...# #...# #...# #...# #...# ....# #...#
    #.... ..#.. #...# #...# #...# .#.#. #...# ...#. #..##
    .###. ..#.. #...# #...# #.#.# ..#.. .#.#. ..#.. #.#.#
    ....# ..#.. #...# .#.#. #.#.# .#.#. ..#.. .#... ##..#
    ....# ..#.. #...# .#.#. ##.## #...# ..#.. #.... #...#
    ####. ..#.. .###. ..#.. #...# #...# ..#.. ##### .###.
    """,
    """
    .#. .###. ####. ...#. ##### ..##. ##### .###. .###.
    ##. #...# ....# ..##. #.... .#... ....# #...# #...#
    .#. ....# ....# .#.#. ####. #.... ...#. #...# #...#
    .#. ...#. .###. #..#. ....# ####. ...#. .###. .####
    .#. ..#.. ....# ##### ....# #...# ..#.. #...# ....#
    .#. .#... ....# ...#. #...# #...# ..#.. #...# ...#.
    ### ##### ####. ...#. .###. .###. ..#.. .###. .##..
    """,
)


def _parse(lines: str) -> tuple[Stroke, ...]:
    strokes = []
    for line in lines.split("/"):
        marks = line.split()
        closed = marks[-1] == "z"
        vertices = marks[:-1] if closed else marks
        strokes.append(Stroke(tuple((int(v[0]), int(v[1]), v.endswith("o")) for v in vertices), closed))
    return tuple(strokes)


def _columns() -> dict[str, tuple[str, ...]]:
    glyphs: list[tuple[str, ...]] = []
    for band in _BANDS:
        glyphs += zip(*(row.split() for row in band.split("\n") if row.strip()), strict=True)
    return dict(zip(CHARACTERS, glyphs, strict=True))


SKELETONS: dict[str, tuple[Stroke, ...]] = {character: _parse(lines) for character, lines in _LINES.items()}
PIXELS: dict[str, tuple[str, ...]] = _columns()
"""Rows of each character on the 5x7 grid, from top to bottom; "#" is ink."""

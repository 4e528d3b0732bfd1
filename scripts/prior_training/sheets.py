"""Sheets of samples of a prior, to look at."""

from __future__ import annotations

from pathlib import Path

from scoredist3d.export.images import image_grid, save_png
from scoredist3d.procedural import (
    CATEGORIES,
    COLORS,
    DEFECTS,
    FINISHES,
    PATTERNS,
    RELATIONS,
    scene_caption,
    simple_caption,
)
from scoredist3d.procedural.captions import with_article

from .evaluation import Sampler

_SURFACES = ("mug", "chair", "house", "car", "teddy bear", "bottle", "table", "rocket")
_PAIRS = (("mug", "table"), ("robot", "stool"), ("snowman", "pine tree"), ("car", "house"), ("bottle", "bowl"))


def category_captions(columns: int) -> list[str]:
    """One row of captions per category, in alternating colors."""
    return [simple_caption(c, COLORS[(i + j) % len(COLORS)]) for i, c in enumerate(CATEGORIES) for j in range(columns)]


def surface_captions() -> list[str]:
    """Captions of patterns, materials, finishes and defects, one row each."""
    words = [*PATTERNS[1:], *(finish for finish in FINISHES if finish), *DEFECTS]
    captions = []
    for row, word in enumerate(words):
        for column, noun in enumerate(_SURFACES):
            color = COLORS[(row + 5 * column) % len(COLORS)]
            kinds = {"wooden": f"wooden {noun}", "metal": f"metal {noun}"}
            if word in DEFECTS:
                captions.append(f"a {word} photo of {simple_caption(noun, color)}")
            else:
                captions.append(with_article(kinds.get(word, f"{word} {color} {noun}")))
    return captions


def scene_captions() -> list[str]:
    """Captions of two objects, one row per pair, in several colors."""
    captions = []
    for index, (first, second) in enumerate(_PAIRS):
        relation = RELATIONS[0] if index < 2 else RELATIONS[1]
        for column in range(8):
            colors = COLORS[(index + column) % len(COLORS)], COLORS[(index + column + 5) % len(COLORS)]
            captions.append(scene_caption(first, second, relation, *colors))
    return captions


def write_sheets(sampler: Sampler, out: Path, *, scale: float, limit: int) -> None:
    """Write ``samples.png``, ``surfaces.png`` and ``scenes.png``."""
    sheets = (
        ("samples", category_captions(8), 16),
        ("surfaces", surface_captions(), 16),
        ("scenes", scene_captions(), 8),
    )
    for seed, (name, captions, columns) in enumerate(sheets):
        texts = captions[:limit]
        images = sampler(texts, sampler.cameras(len(texts), 7 + seed), scale=scale, seed=7 + seed)
        save_png(image_grid(images.cpu(), columns=columns), out / f"{name}.png")

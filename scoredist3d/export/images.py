"""Images to files: conversion to 8 bit, PNG, labelled grids."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from scoredist3d.files import atomic_path

Image = Tensor | np.ndarray


def to_uint8(image: Image) -> np.ndarray:
    """(H, W, 3) uint8 from (H, W, 3) or (H, W, 1) or (H, W), uint8 or floating point in [0, 1] (clipped).

    Raises:
        ValueError: Another shape or type, or values that are not finite.
    """
    array = image.detach().float().cpu().numpy() if isinstance(image, Tensor) and image.is_floating_point() else image
    array = np.asarray(array.detach().cpu() if isinstance(array, Tensor) else array)
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[2] not in (1, 3) or 0 in array.shape:
        raise ValueError(f"an image has shape (H, W, 3), (H, W, 1) or (H, W), got {tuple(image.shape)}")
    if array.dtype != np.uint8:
        if not np.issubdtype(array.dtype, np.floating):
            raise ValueError(f"an image is uint8 or floating point, got {array.dtype}")
        if not np.isfinite(array).all():
            raise ValueError(f"the image holds {int((~np.isfinite(array)).sum())} values that are not finite")
        array = (array.clip(0.0, 1.0) * 255.0 + 0.5).astype(np.uint8)
    return np.ascontiguousarray(np.broadcast_to(array, (*array.shape[:2], 3)))


def save_png(image: Image, path: Path) -> Path:
    """Write an image (see :func:`to_uint8`) as PNG, atomically; the parent folder is made. Returns ``path``."""
    from PIL import Image as Pillow

    array = to_uint8(image)
    with atomic_path(Path(path)) as temporary:
        Pillow.fromarray(array).save(temporary, format="PNG")
    return Path(path)


def image_grid(
    images: Sequence[Image] | Tensor,
    columns: int | None = None,
    *,
    labels: Sequence[str] | None = None,
    gap: int = 2,
    background: int = 255,
) -> np.ndarray:
    """One uint8 image from many, row by row.

    Args:
        images: N images (see :func:`to_uint8`) or one (N, H, W, 3) tensor; smaller ones are centred in their cell.
        columns: The nearest to a square by default.
        labels: N captions written under the images.
        gap: Pixels between cells.
        background: Grey level of gaps and caption strips, 0 to 255.

    Raises:
        ValueError: No image, or another number of labels than images.
    """
    arrays = [to_uint8(image) for image in images]
    if not arrays:
        raise ValueError("an image grid needs at least one image")
    if labels is not None and len(labels) != len(arrays):
        raise ValueError(f"{len(labels)} labels for {len(arrays)} images")
    columns = min(len(arrays), columns or int(np.ceil(np.sqrt(len(arrays)))))
    rows = -(-len(arrays) // columns)
    strip = 14 if labels else 0
    height, width = max(a.shape[0] for a in arrays), max(a.shape[1] for a in arrays)
    cell = (height + strip + gap, width + gap)
    canvas = np.full((rows * cell[0] - gap, columns * cell[1] - gap, 3), background, dtype=np.uint8)
    for index, array in enumerate(arrays):
        top, left = index // columns * cell[0], index % columns * cell[1]
        if labels:
            below = slice(top + height, top + height + strip)
            canvas[below, left : left + width] = _caption(labels[index], width, strip, background)
        top, left = top + (height - array.shape[0]) // 2, left + (width - array.shape[1]) // 2
        canvas[top : top + array.shape[0], left : left + array.shape[1]] = array
    return canvas


def _caption(text: str, width: int, height: int, background: int) -> np.ndarray:
    from PIL import Image as Pillow
    from PIL import ImageDraw

    strip = Pillow.new("RGB", (width, height), (background,) * 3)
    ink = 0 if background > 127 else 255
    # Pillow's built-in font is Latin-1 only where FreeType is missing.
    printable = text.encode("latin-1", "replace").decode("latin-1")
    ImageDraw.Draw(strip).text((2, 1), printable, fill=(ink,) * 3)
    return np.asarray(strip)

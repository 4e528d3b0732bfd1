"""Image files: conversion to 8 bits, PNG, and labeled grids of images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from scoredist3d.files import atomic_path

Image = Tensor | np.ndarray


def to_uint8(image: Image) -> np.ndarray:
    """Convert an image to (H, W, 3) uint8.

    Args:
        image: (H, W, 3), (H, W, 1) or (H, W), uint8 or floating point; floating-point values are clipped to [0, 1].

    Raises:
        ValueError: The shape or type is not one of these, or some values are not finite.
    """
    array = image.detach().float().cpu().numpy() if isinstance(image, Tensor) and image.is_floating_point() else image
    array = np.asarray(array.detach().cpu() if isinstance(array, Tensor) else array)
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[2] not in (1, 3) or 0 in array.shape:
        raise ValueError(f"image: the shape must be (H, W, 3), (H, W, 1) or (H, W), got {tuple(image.shape)}")
    if array.dtype != np.uint8:
        if not np.issubdtype(array.dtype, np.floating):
            raise ValueError(f"image: the type must be uint8 or floating point, got {array.dtype}")
        if not np.isfinite(array).all():
            raise ValueError(
                f"image: {int((~np.isfinite(array)).sum())} values are not finite; remove NaN and infinity first"
            )
        array = (array.clip(0.0, 1.0) * 255.0 + 0.5).astype(np.uint8)
    return np.ascontiguousarray(np.broadcast_to(array, (*array.shape[:2], 3)))


def save_png(image: Image, path: Path) -> Path:
    """Write an image (see :func:`to_uint8`) to a PNG file atomically and return ``path``.

    The parent folder is created if absent.
    """
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
    labels_above: bool = False,
    gap: int = 2,
    background: int = 255,
) -> np.ndarray:
    """Arrange images in a grid, row by row, and return it as one uint8 image.

    Args:
        images: N images (see :func:`to_uint8`) or one (N, H, W, 3) tensor; smaller images are centered in their cells.
        columns: Number of columns; by default the grid is as square as possible.
        labels: N captions below the images.
        labels_above: Put the captions above the images instead.
        gap: Pixels between cells.
        background: Gray level of the gaps and caption backgrounds, 0 to 255.

    Raises:
        ValueError: There is no image, or the number of labels differs from that of the images.
    """
    arrays = [to_uint8(image) for image in images]
    if not arrays:
        raise ValueError("image_grid: at least one image is needed")
    if labels is not None and len(labels) != len(arrays):
        raise ValueError(f"image_grid: got {len(labels)} labels for {len(arrays)} images; give one label per image")
    columns = min(len(arrays), columns or int(np.ceil(np.sqrt(len(arrays)))))
    rows = -(-len(arrays) // columns)
    strip = 14 if labels else 0
    height, width = max(a.shape[0] for a in arrays), max(a.shape[1] for a in arrays)
    cell = (height + strip + gap, width + gap)
    canvas = np.full((rows * cell[0] - gap, columns * cell[1] - gap, 3), background, dtype=np.uint8)
    for index, array in enumerate(arrays):
        top, left = index // columns * cell[0], index % columns * cell[1]
        if labels:
            place = top if labels_above else top + height
            canvas[place : place + strip, left : left + width] = _caption(labels[index], width, strip, background)
            top += strip if labels_above else 0
        top, left = top + (height - array.shape[0]) // 2, left + (width - array.shape[1]) // 2
        canvas[top : top + array.shape[0], left : left + array.shape[1]] = array
    return canvas


def row_grid(rows: Mapping[str, Sequence[Image] | Tensor], *, labeled: bool = True) -> np.ndarray:
    """Arrange rows with equal numbers of images in a grid, an (H, W, 3) uint8 image.

    Args:
        rows: Images of each row (see :func:`to_uint8`) by the name of the row.
        labeled: Whether the name of each row is above its first image.
    """
    columns = len(next(iter(rows.values())))
    names = [name if column == 0 else "" for name in rows for column in range(columns)]
    images = [image for row in rows.values() for image in row]
    return image_grid(images, columns, labels=names if labeled else None, labels_above=True)


def _caption(text: str, width: int, height: int, background: int) -> np.ndarray:
    from PIL import Image as Pillow
    from PIL import ImageDraw

    strip = Pillow.new("RGB", (width, height), (background,) * 3)
    ink = 0 if background > 127 else 255
    # Without FreeType, Pillow's built-in font has only the characters of Latin-1.
    printable = text.encode("latin-1", "replace").decode("latin-1")
    ImageDraw.Draw(strip).text((2, 1), printable, fill=(ink,) * 3)
    return np.asarray(strip)

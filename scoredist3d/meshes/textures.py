"""Texture images: bilinear samples, colour curves, and several materials' images joined into one atlas."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

MAX_SIDE = 8192
_EDGE = 1e-3  # coordinates this far outside the image are rounding, not repetition
_MAX_REPEATS = 64


@dataclass(frozen=True)
class Images:
    """The texture images of one material, row 0 on top; ``None`` where there is none, 1 x 1 where it is constant.

    Attributes:
        base_color: (H, W, 3) uint8, display sRGB.
        roughness: (H, W) uint8, linear.
        metallic: (H, W) uint8, linear.
        normal: (H, W, 3) uint8, tangent space, linear.
    """

    base_color: np.ndarray | None = None
    roughness: np.ndarray | None = None
    metallic: np.ndarray | None = None
    normal: np.ndarray | None = None

    def named(self) -> dict[str, np.ndarray]:
        """The images that exist."""
        return {name: image for name, image in vars(self).items() if image is not None}

    @property
    def need_uvs(self) -> bool:
        """Whether any of them changes over the surface."""
        return any((image != image[:1, :1]).any() for image in self.named().values())


def to_linear(display: np.ndarray) -> np.ndarray:
    """Linear light of display sRGB values in [0, 1]."""
    return np.where(display <= 0.04045, display / 12.92, ((display + 0.055) / 1.055) ** 2.4)


def to_display(linear: np.ndarray) -> np.ndarray:
    """Display sRGB values of linear light in [0, 1]."""
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * np.maximum(linear, 0.0) ** (1 / 2.4) - 0.055)


def to_bytes(values: np.ndarray) -> np.ndarray:
    """[0, 1] to the nearest of 0..255."""
    return (np.clip(values, 0.0, 1.0) * 255.0 + 0.5).astype(np.uint8)


def sample_image(image: np.ndarray, uvs: Tensor) -> Tensor:
    """(N, C) bilinear samples in [0, 1] of a uint8 image (H, W, C) or (H, W) that repeats, at (N, 2) coordinates.

    (0, 0) is the bottom left corner of the image, row 0 its top.
    """
    texels = torch.from_numpy(np.ascontiguousarray(image.reshape(*image.shape[:2], -1))).to(uvs.device)
    height, width, channels = texels.shape
    texels = texels.reshape(-1, channels)
    x, y = uvs[:, 0] * width - 0.5, (1.0 - uvs[:, 1]) * height - 0.5
    column, row = x.floor(), y.floor()
    fx, fy = (x - column)[:, None], (y - row)[:, None]
    left, top = column.long() % width, row.long() % height
    right, below = (left + 1) % width, (top + 1) % height
    upper = texels[top * width + left] * (1 - fx) + texels[top * width + right] * fx
    lower = texels[below * width + left] * (1 - fx) + texels[below * width + right] * fx
    return (upper * (1 - fy) + lower * fy) / 255.0


def into_unit_square(corner_uvs: np.ndarray, images: Images) -> tuple[np.ndarray, Images]:
    """Move texture coordinates that use the repetition of the image into [0, 1].

    Args:
        corner_uvs: (F, 3, 2), of every face's corners.
        images: Of their material.

    Returns:
        The coordinates, each face moved by whole images, and the images, tiled where a face spans several of them.

    Raises:
        ValueError: A face repeats the image more than 64 times.
    """
    if corner_uvs.min() >= -_EDGE and corner_uvs.max() <= 1 + _EDGE:
        return corner_uvs.clip(0.0, 1.0), images
    moved = corner_uvs - np.floor(corner_uvs.min(axis=1, keepdims=True) + _EDGE)
    tiles = np.maximum(1, np.ceil(moved.max(axis=(0, 1)) - _EDGE)).astype(int)
    if tiles.max() > _MAX_REPEATS:
        raise ValueError(
            f"a face repeats its texture {tiles.max()} times, and at most {_MAX_REPEATS} can be laid out: "
            "unwrap the mesh into the unit square first"
        )
    across, down = tiles.tolist()
    tiled = {name: _tile(image, down, across) for name, image in images.named().items()}
    # Row 0 is the top, yet whole tiles do not tell top from bottom.
    return (moved / tiles).clip(0.0, 1.0), replace(images, **tiled)


def _tile(image: np.ndarray, down: int, across: int) -> np.ndarray:
    height, width = image.shape[:2]
    if max(height, width) == 1:
        return image
    small = resized(image, max(1, min(height, MAX_SIDE // down)), max(1, min(width, MAX_SIDE // across)))
    return np.tile(small, (down, across) + (1,) * (image.ndim - 2))


def resized(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """A uint8 image of another size."""
    if image.shape[:2] == (height, width):
        return image
    from PIL import Image

    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))


def join(uvs: list[np.ndarray], images: list[Images]) -> tuple[list[np.ndarray], Images]:
    """Lay the images of several materials out side by side.

    Args:
        uvs: Of each material (F, 3, 2) in [0, 1].
        images: Of each material; where one lacks a channel that others have, its cell holds white, full roughness, no
            metal and the unbent normal.

    Returns:
        The coordinates of each material in the atlas, and the atlas.
    """
    columns = math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    largest = max(max(image.shape[:2]) for one in images for image in one.named().values())
    inner = min(largest, MAX_SIDE // columns - 2)
    cell = inner + 2  # a border that repeats the edge, for bilinear samples there
    neutral = {"base_color": (255, 255, 255), "roughness": (255,), "metallic": (0,), "normal": (128, 128, 255)}
    atlas: dict[str, np.ndarray] = {}
    for name in dict.fromkeys(name for one in images for name in one.named()):
        color = np.array(neutral[name], dtype=np.uint8)
        sheet = np.tile(color, (rows * cell, columns * cell, 1))
        for index, one in enumerate(images):
            image = one.named().get(name)
            if image is not None:
                row, column = cell * (index // columns), cell * (index % columns)
                content = resized(image, inner, inner).reshape(inner, inner, -1)
                sheet[row : row + cell, column : column + cell] = np.pad(content, ((1, 1), (1, 1), (0, 0)), mode="edge")
        atlas[name] = sheet if len(color) == 3 else sheet[..., 0]
    return [_place(own, index, columns, rows, cell) for index, own in enumerate(uvs)], Images(**atlas)


def _place(uvs: np.ndarray, index: int, columns: int, rows: int, cell: int) -> np.ndarray:
    """Coordinates of a cell's own image in the atlas."""
    texels = 1.0 + uvs * (cell - 2)
    x = (index % columns) * cell + texels[..., 0]
    y = (rows - 1 - index // columns) * cell + texels[..., 1]
    return np.stack([x / (columns * cell), y / (rows * cell)], axis=-1)

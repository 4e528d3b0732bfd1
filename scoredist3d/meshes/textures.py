"""Texture images: bilinear sampling, sRGB conversion, tiling, and atlases of several materials."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

MAX_SIDE = 8192
_EDGE = 1e-3  # coordinates up to this far outside [0, 1] are rounding errors, not repetition
_MAX_REPEATS = 64


@dataclass(frozen=True)
class Images:
    """Texture images of a material, top row first; ``None`` for absent channels, 1 x 1 for constant ones.

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
        """Images that are not None, by name."""
        return {name: image for name, image in vars(self).items() if image is not None}

    @property
    def need_uvs(self) -> bool:
        """Whether any image is not constant, so that texture coordinates are needed."""
        return any((image != image[:1, :1]).any() for image in self.named().values())


def to_linear(display: np.ndarray) -> np.ndarray:
    """Convert display sRGB values in [0, 1] to linear values."""
    return np.where(display <= 0.04045, display / 12.92, ((display + 0.055) / 1.055) ** 2.4)


def to_display(linear: np.ndarray) -> np.ndarray:
    """Convert linear values in [0, 1] to display sRGB."""
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * np.maximum(linear, 0.0) ** (1 / 2.4) - 0.055)


def to_bytes(values: np.ndarray) -> np.ndarray:
    """Quantize values in [0, 1] to uint8, rounding to nearest."""
    return (np.clip(values, 0.0, 1.0) * 255.0 + 0.5).astype(np.uint8)


def sample_image(image: np.ndarray, uvs: Tensor) -> Tensor:
    """Bilinear samples (N, C) in [0, 1] of a repeating uint8 image (H, W, C) or (H, W), at coordinates ``uvs`` (N, 2).

    The coordinate (0, 0) is the bottom left corner of the image; row 0 is the top row.
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
    """Map texture coordinates that repeat the image into [0, 1].

    Args:
        corner_uvs: (F, 3, 2), coordinates of the face corners.
        images: Images of the material.

    Returns:
        The coordinates, with each face shifted by integers, and the images, tiled if a face spans several repetitions.

    Raises:
        ValueError: A face repeats the image more than 64 times.
    """
    if corner_uvs.min() >= -_EDGE and corner_uvs.max() <= 1 + _EDGE:
        return corner_uvs.clip(0.0, 1.0), images
    moved = corner_uvs - np.floor(corner_uvs.min(axis=1, keepdims=True) + _EDGE)
    tiles = np.maximum(1, np.ceil(moved.max(axis=(0, 1)) - _EDGE)).astype(int)
    if tiles.max() > _MAX_REPEATS:
        raise ValueError(
            f"a face repeats its texture {tiles.max()} times, but at most {_MAX_REPEATS} repetitions are supported: "
            "unwrap the mesh into the unit square first"
        )
    across, down = tiles.tolist()
    tiled = {name: _tile(image, down, across) for name, image in images.named().items()}
    # Row 0 is the top while v points up; for whole tiles this makes no difference.
    return (moved / tiles).clip(0.0, 1.0), replace(images, **tiled)


def _tile(image: np.ndarray, down: int, across: int) -> np.ndarray:
    height, width = image.shape[:2]
    if max(height, width) == 1:
        return image
    small = resized(image, max(1, min(height, MAX_SIDE // down)), max(1, min(width, MAX_SIDE // across)))
    return np.tile(small, (down, across) + (1,) * (image.ndim - 2))


def resized(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize a uint8 image bilinearly."""
    if image.shape[:2] == (height, width):
        return image
    from PIL import Image

    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))


def join(uvs: list[np.ndarray], images: list[Images]) -> tuple[list[np.ndarray], Images]:
    """Pack the images of several materials into one atlas of equal cells.

    Args:
        uvs: Corner coordinates (F, 3, 2) in [0, 1] of each material.
        images: Images of each material. A channel that only other materials have gets a neutral value: white,
            roughness 1, metallic 0, an unperturbed normal.

    Returns:
        Coordinates of each material in the atlas, and the atlas.
    """
    columns = math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    largest = max(max(image.shape[:2]) for one in images for image in one.named().values())
    inner = min(largest, MAX_SIDE // columns - 2)
    cell = inner + 2  # with a border of one texel that repeats the edge, for bilinear filtering
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
    """Map texture coordinates of the image in one cell to coordinates in the atlas."""
    texels = 1.0 + uvs * (cell - 2)
    x = (index % columns) * cell + texels[..., 0]
    y = (rows - 1 - index // columns) * cell + texels[..., 1]
    return np.stack([x / (columns * cell), y / (rows * cell)], axis=-1)

"""Conversion from world coordinates to the axes, units and origins of files."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

Pivot = Literal["scene", "center", "base"]


def to_y_up(vectors: np.ndarray) -> np.ndarray:
    """Convert (N, 3) vectors from z up to y up: (x, y, z) of the file = (y, z, x) of the world.

    The object's front, +x in the world, becomes +z, which is the front in glTF.
    """
    return np.ascontiguousarray(vectors[:, [1, 2, 0]])


@dataclass(frozen=True)
class Frame:
    """Axes, unit and origin of a file.

    Attributes:
        up: Up axis: ``y`` as in :func:`to_y_up`, ``z`` for the axes of the world with the front at +x.
        scale: File units (meters) per scene unit.
        origin: World position of the file's origin, in scene units.
    """

    up: Literal["y", "z"] = "y"
    scale: float = 1.0
    origin: tuple[float, float, float] = (0.0, 0.0, 0.0)

    @property
    def y_up(self) -> Frame:
        """The same unit and origin, y up."""
        return replace(self, up="y")

    @property
    def comment(self) -> str:
        """Description of the axes in file headers; :func:`scoredist3d.meshes.loading.load_mesh` reads it."""
        return "y up, front +z" if self.up == "y" else "z up, front +x"

    def points(self, points: np.ndarray) -> np.ndarray:
        """Convert (N, 3) positions to the axes, unit and origin of the file, float32."""
        moved = points - np.asarray(self.origin, dtype=points.dtype)
        return (self.directions(moved) * np.float32(self.scale)).astype(np.float32)

    def directions(self, vectors: np.ndarray) -> np.ndarray:
        """Convert (N, 3) directions to the axes of the file, without scaling."""
        return to_y_up(vectors) if self.up == "y" else np.ascontiguousarray(vectors)


Y_UP = Frame()


def fit_frame(
    bounds: tuple[np.ndarray, np.ndarray], *, up: Literal["y", "z"], scale: float, height: float | None, pivot: Pivot
) -> Frame:
    """The frame that gives an object the requested size and origin.

    Args:
        bounds: Lowest and highest corner of the object's bounding box, each (3,), world coordinates, scene units.
        up: Up axis of the file.
        scale: Meters per scene unit.
        height: Height of the object in meters; overrides ``scale``.
        pivot: Origin of the file; see ``pivot`` of the exporter.

    Raises:
        ValueError: ``height`` is given and the object is flat.
    """
    low, high = bounds
    if height is not None:
        if not high[2] > low[2]:
            raise ValueError(
                "exporter.height: the object is flat and cannot be scaled to a height; set exporter.scale instead"
            )
        scale = height / float(high[2] - low[2])
    if pivot == "scene":
        return Frame(up, scale)
    x, y, z = ((low + high) / 2).tolist()
    return Frame(up, scale, (x, y, float(low[2]) if pivot == "base" else z))

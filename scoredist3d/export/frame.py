"""From our world to the files' world: axes and units."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np


def to_y_up(vectors: np.ndarray) -> np.ndarray:
    """(x, y, z) of the file = (y, z, x) of ours: up becomes +y and the object's front, our +x, becomes glTF's +z."""
    return np.ascontiguousarray(vectors[:, [1, 2, 0]])


@dataclass(frozen=True)
class Frame:
    """The axes and the unit of a file.

    Attributes:
        up: ``y`` as in :func:`to_y_up`; ``z`` keeps our axes, front +x.
        scale: File units (metres) per scene unit.
    """

    up: Literal["y", "z"] = "y"
    scale: float = 1.0

    @property
    def comment(self) -> str:
        """What text headers say; :func:`scoredist3d.meshes.loading.load_mesh` understands it."""
        return "y up, front +z" if self.up == "y" else "z up, front +x"

    def points(self, points: np.ndarray) -> np.ndarray:
        """(N, 3) float32 positions in the file."""
        return (self.directions(points) * np.float32(self.scale)).astype(np.float32)

    def directions(self, vectors: np.ndarray) -> np.ndarray:
        """(N, 3) directions in the file; lengths stay."""
        return to_y_up(vectors) if self.up == "y" else np.ascontiguousarray(vectors)


Y_UP = Frame()

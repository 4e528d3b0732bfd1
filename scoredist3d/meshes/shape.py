"""What can be exported, and what a later stage can start from: a density and a look at points of the world."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from scoredist3d.meshes.mesh import Mesh
    from scoredist3d.meshes.splats import Splats

Progress = Callable[[float], None]


@dataclass(frozen=True)
class SurfaceChannels:
    """How a surface looks at ``N`` points, in the metallic-roughness model of glTF; ``None`` where there is none.

    Attributes:
        base_color: (N, 3), display sRGB in [0, 1].
        roughness: (N,), perceptual roughness in [0, 1].
        metallic: (N,), in [0, 1].
        normal: (N, 3), unit shading normals in the world.
        occlusion: (N,), 1 where all ambient light arrives.
    """

    base_color: Tensor
    roughness: Tensor | None = None
    metallic: Tensor | None = None
    normal: Tensor | None = None
    occlusion: Tensor | None = None


class Shape(Protocol):
    """An object inside the ball of ``radius`` around the origin, in world coordinates (z up)."""

    @property
    def radius(self) -> float:
        """Radius of the ball that holds the object, in scene units."""

    @property
    def device(self) -> torch.device:
        """Where the points of a query must live."""

    @property
    def iso_level(self) -> float | None:
        """The density on the surface where that is known (signed distances), else None: it has to be found."""

    def density(self, points: Tensor) -> Tensor:
        """(N,) densities in inverse scene units at (N, 3) points, never negative."""

    def channels(self, points: Tensor) -> SurfaceChannels:
        """The look of the surface at (N, 3) points on or near it."""

    def surface(self) -> Mesh | None:
        """The surface itself where the object is one (with its texture coordinates, if it has any), else None."""

    def splats(self) -> Splats | None:
        """The object as 3D Gaussians where it is made of them, else None."""


def query_density(shape: Shape, points: np.ndarray, *, chunk: int, progress: Progress | None = None) -> np.ndarray:
    """(N,) float32 densities at (N, 3) points, asked for in chunks and without gradients.

    Raises:
        ValueError: Wrong output shape, or a density that is not finite.
    """
    return _query(shape.density, "density", (), shape.device, points, chunk, progress)


def query_color(shape: Shape, points: np.ndarray, *, chunk: int, progress: Progress | None = None) -> np.ndarray:
    """(N, 3) float32 colours in [0, 1] at (N, 3) points, asked for in chunks and without gradients.

    Raises:
        ValueError: Wrong output shape, or a colour that is not finite or further than 1e-3 outside [0, 1].
    """
    colors = _query(
        lambda batch: shape.channels(batch).base_color, "color", (3,), shape.device, points, chunk, progress
    )
    if len(colors) and (colors.min() < -1e-3 or colors.max() > 1 + 1e-3):
        raise ValueError(
            f"the object's colours lie in [{colors.min():.4g}, {colors.max():.4g}], outside [0, 1]: "
            "its material must end in a function with that range, e.g. a sigmoid"
        )
    return colors.clip(0.0, 1.0)


@torch.no_grad()
def _query(
    function: Callable[[Tensor], Tensor],
    name: str,
    item: tuple[int, ...],
    device: torch.device,
    points: np.ndarray,
    chunk: int,
    progress: Progress | None,
) -> np.ndarray:
    result = np.empty((len(points), *item), dtype=np.float32)
    for start in range(0, len(points), chunk):
        batch = torch.from_numpy(np.ascontiguousarray(points[start : start + chunk], dtype=np.float32)).to(device)
        values = function(batch)
        if tuple(values.shape) != (len(batch), *item):
            raise ValueError(f"the object's {name} must have shape {(len(batch), *item)}, got {tuple(values.shape)}")
        finite = torch.isfinite(values)
        if not finite.all():
            bad = (~finite).reshape(len(batch), -1).any(dim=1)
            where = ", ".join(f"{x:.3g}" for x in batch[bad][0].tolist())
            raise ValueError(
                f"the object's {name} is not finite at {int(bad.sum())} of {len(batch)} points, first at ({where}): "
                "the parameters have diverged, export an earlier checkpoint"
            )
        result[start : start + chunk] = values.float().cpu().numpy()
        if progress is not None:
            progress(min(1.0, (start + len(batch)) / len(points)))
    return result

"""What can be exported: a density and a colour at points of the world."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

Progress = Callable[[float], None]


class ExportableField(Protocol):
    """A field inside the ball of ``radius`` around the origin, in world coordinates (z up)."""

    @property
    def radius(self) -> float:
        """Radius of the ball that holds the object, in scene units."""

    @property
    def device(self) -> torch.device:
        """Where the points of a query must live."""

    def density(self, points: Tensor) -> Tensor:
        """(N,) densities in inverse scene units at (N, 3) points."""

    def color(self, points: Tensor) -> Tensor:
        """(N, 3) display sRGB colours in [0, 1] at (N, 3) points."""


def query_density(
    field: ExportableField, points: np.ndarray, *, chunk: int, progress: Progress | None = None
) -> np.ndarray:
    """(N,) float32 densities at (N, 3) points, asked for in chunks and without gradients.

    Raises:
        ValueError: Wrong output shape, or a density that is not finite.
    """
    return _query(field.density, "density", (), field.device, points, chunk, progress)


def query_color(
    field: ExportableField, points: np.ndarray, *, chunk: int, progress: Progress | None = None
) -> np.ndarray:
    """(N, 3) float32 colours in [0, 1] at (N, 3) points, asked for in chunks and without gradients.

    Raises:
        ValueError: Wrong output shape, or a colour that is not finite or further than 1e-3 outside [0, 1].
    """
    colors = _query(field.color, "color", (3,), field.device, points, chunk, progress)
    if len(colors) and (colors.min() < -1e-3 or colors.max() > 1 + 1e-3):
        raise ValueError(
            f"the field's colours lie in [{colors.min():.4g}, {colors.max():.4g}], outside [0, 1]: "
            "its material must end in a function with that range, e.g. a sigmoid"
        )
    return colors.clip(0.0, 1.0)


@torch.no_grad()
def _query(
    function: Callable[[Tensor], Tensor],
    name: str,
    shape: tuple[int, ...],
    device: torch.device,
    points: np.ndarray,
    chunk: int,
    progress: Progress | None,
) -> np.ndarray:
    result = np.empty((len(points), *shape), dtype=np.float32)
    for start in range(0, len(points), chunk):
        batch = torch.from_numpy(np.ascontiguousarray(points[start : start + chunk], dtype=np.float32)).to(device)
        values = function(batch)
        if tuple(values.shape) != (len(batch), *shape):
            raise ValueError(f"the field's {name} must have shape {(len(batch), *shape)}, got {tuple(values.shape)}")
        finite = torch.isfinite(values)
        if not finite.all():
            bad = (~finite).reshape(len(batch), -1).any(dim=1)
            where = ", ".join(f"{x:.3g}" for x in batch[bad][0].tolist())
            raise ValueError(
                f"the field's {name} is not finite at {int(bad.sum())} of {len(batch)} points, first at ({where}): "
                "the parameters have diverged, export an earlier checkpoint"
            )
        result[start : start + chunk] = values.float().cpu().numpy()
        if progress is not None:
            progress(min(1.0, (start + len(batch)) / len(points)))
    return result

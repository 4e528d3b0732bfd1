"""What can be exported, and what a later stage can start from: a density and a look at points of the world."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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

    @property
    def baked_lighting(self) -> bool:
        """Whether the base colour includes light and shade, so that a viewer must not light it again."""

    def density(self, points: Tensor) -> Tensor:
        """(N,) densities in inverse scene units at (N, 3) points, never negative."""

    def channels(self, points: Tensor, normals: Tensor | None = None) -> SurfaceChannels:
        """The look of the surface at (N, 3) points on or near it.

        ``normals`` (N, 3), unit and outward, are those of the surface there: where they are given, an object whose
        shading normals differ from them can tell these.
        """

    def surface(self) -> Mesh | None:
        """The surface itself where the object is one (with its texture coordinates, if it has any), else None."""

    def splats(self) -> Splats | None:
        """The object as 3D Gaussians where it is made of them, else None."""


@torch.no_grad()
def query_density(shape: Shape, points: np.ndarray, *, chunk: int, progress: Progress | None = None) -> np.ndarray:
    """(N,) float32 densities at (N, 3) points, asked for in chunks and without gradients.

    Raises:
        ValueError: Wrong output shape, or a density that is not finite.
    """
    result = np.empty(len(points), dtype=np.float32)
    for start, batch in _batches(shape.device, points, chunk, progress):
        result[start : start + chunk] = _checked(shape.density(batch), "density", (), batch)
    return result


def query_color(shape: Shape, points: np.ndarray, *, chunk: int, progress: Progress | None = None) -> np.ndarray:
    """(N, 3) float32 colours in [0, 1] at (N, 3) points, asked for in chunks and without gradients.

    Raises:
        ValueError: Wrong output shape, or a colour that is not finite or further than 1e-3 outside [0, 1].
    """
    return query_channels(shape, points, chunk=chunk, progress=progress)["base_color"]


@torch.no_grad()
def query_channels(
    shape: Shape,
    points: np.ndarray,
    normals: np.ndarray | None = None,
    *,
    chunk: int,
    progress: Progress | None = None,
) -> dict[str, np.ndarray]:
    """The channels of :class:`SurfaceChannels` that the object has, float32, at (N, 3) points, by name.

    Asked for in chunks and without gradients. Everything but normals lies in [0, 1]; normals have unit length.
    ``normals`` (N, 3), unit, are those of the surface at the points.

    Raises:
        ValueError: Wrong output shape, or a value that is not finite, out of its range, or a normal without direction.
    """
    found: dict[str, np.ndarray] = {}
    for start, batch in _batches(shape.device, points, chunk, progress):
        facing = None if normals is None else torch.from_numpy(normals[start : start + chunk]).to(batch)
        for name, values in vars(shape.channels(batch, facing)).items():
            if values is None:
                continue
            item = (3,) if name in _VECTORS else ()
            if name not in found:
                found[name] = np.empty((len(points), *item), dtype=np.float32)
            found[name][start : start + chunk] = _checked(values, name.replace("_", " "), item, batch)
    found.setdefault("base_color", np.empty((0, 3), dtype=np.float32))
    return {name: _in_range(name, values) for name, values in found.items()}


_VECTORS = ("base_color", "normal")


def _in_range(name: str, values: np.ndarray) -> np.ndarray:
    """Values clipped into their range (the tolerance of half precision), normals made unit."""
    if name == "normal":
        length = np.linalg.norm(values, axis=1, keepdims=True)
        if len(values) and length.min() < 1e-6:
            raise ValueError("the object's normal has no direction at some points: its material must give unit vectors")
        return values / length
    if len(values) and (values.min() < -1e-3 or values.max() > 1 + 1e-3):
        raise ValueError(
            f"the object's {name.replace('_', ' ')} lies in [{values.min():.4g}, {values.max():.4g}], outside [0, 1]: "
            "its material must end in a function with that range, e.g. a sigmoid"
        )
    return values.clip(0.0, 1.0)


def _batches(
    device: torch.device, points: np.ndarray, chunk: int, progress: Progress | None
) -> Iterator[tuple[int, Tensor]]:
    """Points in chunks, each with its first row."""
    for start in range(0, len(points), chunk):
        yield start, torch.from_numpy(np.ascontiguousarray(points[start : start + chunk], dtype=np.float32)).to(device)
        if progress is not None:
            progress(min(1.0, (start + chunk) / len(points)))


def _checked(values: Tensor, name: str, item: tuple[int, ...], batch: Tensor) -> np.ndarray:
    """The values of one chunk, if they have the right shape and are finite."""
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
    return values.detach().float().cpu().numpy()

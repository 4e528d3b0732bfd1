"""Protocol for exportable objects (density and appearance at world-space points), and validated queries of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from scoredist3d.cameras import Cameras

if TYPE_CHECKING:
    from scoredist3d.meshes.mesh import Mesh
    from scoredist3d.meshes.splats import Splats

Progress = Callable[[float], None]


@dataclass(frozen=True)
class SurfaceChannels:
    """Appearance of a surface at ``N`` points, in the metallic-roughness model of glTF; channels may be ``None``.

    Attributes:
        base_color: (N, 3), display sRGB in [0, 1].
        roughness: (N,), perceptual roughness in [0, 1].
        metallic: (N,), in [0, 1].
        normal: (N, 3), unit shading normals, world coordinates.
        occlusion: (N,), ambient occlusion in [0, 1], 1 where no ambient light is blocked.
    """

    base_color: Tensor
    roughness: Tensor | None = None
    metallic: Tensor | None = None
    normal: Tensor | None = None
    occlusion: Tensor | None = None


class Extractable(Protocol):
    """Object whose surface can be extracted.

    It lies inside a ball around the origin; all coordinates are world coordinates (z up).
    """

    @property
    def radius(self) -> float:
        """Radius of the ball that contains the object, scene units."""

    @property
    def device(self) -> torch.device:
        """Device on which queries expect their points."""

    @property
    def iso_level(self) -> float | None:
        """Density on the surface if known (as for signed distance fields); None if it has to be estimated."""

    def density(self, points: Tensor) -> Tensor:
        """Densities (N,) >= 0 at points (N, 3), in inverse scene units."""

    def surface(self) -> Mesh | None:
        """Mesh of the object, with its texture coordinates if it has any; None if the object is not a surface."""


class Exportable(Extractable, Protocol):
    """Object that can be exported or used for initialization."""

    @property
    def baked_lighting(self) -> bool:
        """Whether the base color includes shading, in which case viewers must display it unlit."""

    def channels(self, points: Tensor, normals: Tensor | None = None) -> SurfaceChannels:
        """Appearance at points (N, 3) on or near the surface.

        ``normals`` (N, 3) are the outward unit normals of the surface at the points. Only with them, an object whose
        shading normals differ from the surface normals returns shading normals, and a radiance field returns averages
        along rays instead of the values at the points.
        """

    def splats(self) -> Splats | None:
        """Gaussians of the object; None if it is not made of Gaussians."""


@dataclass(frozen=True)
class ObjectViews:
    """``B`` images of an object over a white background.

    Attributes:
        rgb: (B, H, W, 3) in [0, 1], as the object's own renderer shows it.
        base_color: (B, H, W, 3) in [0, 1], without lighting; equal to ``rgb`` if the renderer does not light the
            object.
        opacity: (B, H, W, 1) in [0, 1].
        depth: (B, H, W, 1), distance from the camera, scene units; undefined where the opacity is 0.
        lit: Whether ``rgb`` includes lighting that ``base_color`` does not include.
    """

    rgb: Tensor
    base_color: Tensor
    opacity: Tensor
    depth: Tensor
    lit: bool = False


@runtime_checkable
class HasViews(Protocol):
    """An :class:`Exportable` that can render itself, so that an exported mesh can be compared with it."""

    def views(self, cameras: Cameras) -> ObjectViews:
        """Images from ``cameras``, which are on the object's device, without randomness and gradients."""


@runtime_checkable
class HasFusedSurface(Protocol):
    """An :class:`Extractable` with a density whose surface can be fused from renders of its depth."""

    def fused_surface(self, resolution: int) -> Extractable | None:
        """The fused surface, an object with a known ``iso_level``; None if the object is too transparent.

        ``resolution`` is the number of grid points along each axis.
        """


@runtime_checkable
class HasTrainingCameras(Protocol):
    """An :class:`Exportable` that knows its training cameras, so that an exporter finds the parts they do not see."""

    def training_cameras(self, count: int) -> Cameras | None:
        """``count`` cameras on the object's device, spread over the range of the training cameras; None if unknown."""


@torch.no_grad()
def query_density(
    shape: Extractable, points: np.ndarray, *, chunk: int, progress: Progress | None = None
) -> np.ndarray:
    """Densities (N,) float32 at points (N, 3), evaluated in chunks of ``chunk`` points and without gradients.

    Raises:
        ValueError: The output has the wrong shape or is not finite.
    """
    result = np.empty(len(points), dtype=np.float32)
    for start, batch in _batches(shape.device, points, chunk, progress):
        result[start : start + chunk] = _checked(shape.density(batch), "density", (), batch)
    return result


def query_color(shape: Exportable, points: np.ndarray, normals: np.ndarray | None = None, *, chunk: int) -> np.ndarray:
    """The base color (N, 3) of :func:`query_channels`.

    Raises:
        ValueError: The output has the wrong shape, is not finite, or is more than 1e-3 outside [0, 1].
    """
    return query_channels(shape, points, normals, chunk=chunk)["base_color"]


@torch.no_grad()
def query_channels(
    shape: Exportable,
    points: np.ndarray,
    normals: np.ndarray | None = None,
    *,
    chunk: int,
    progress: Progress | None = None,
) -> dict[str, np.ndarray]:
    """Channels of :class:`SurfaceChannels` at points (N, 3), by name, float32; channels that are None are omitted.

    They are evaluated in chunks of ``chunk`` points and without gradients. Normals have unit length; all other values
    are in [0, 1]. ``normals`` (N, 3) are the outward unit normals of the surface at the points.

    Raises:
        ValueError: An output has the wrong shape, is not finite, is out of range, or is a normal of length 0.
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
    """Values clipped to [0, 1], an error if they are more than 1e-3 outside; normals are normalized instead."""
    if name == "normal":
        length = np.linalg.norm(values, axis=1, keepdims=True)
        if len(values) and length.min() < 1e-6:
            raise ValueError("the object's normals have length 0 at some points: its material must return unit vectors")
        return values / length
    if len(values) and (values.min() < -1e-3 or values.max() > 1 + 1e-3):
        raise ValueError(
            f"the object's {name.replace('_', ' ')} lies in [{values.min():.4g}, {values.max():.4g}], outside "
            "[0, 1]: its material must end in a bounded function such as a sigmoid"
        )
    return values.clip(0.0, 1.0)


def _batches(
    device: torch.device, points: np.ndarray, chunk: int, progress: Progress | None
) -> Iterator[tuple[int, Tensor]]:
    """Chunks of points on ``device``, each with the index of its first point."""
    for start in range(0, len(points), chunk):
        yield start, torch.from_numpy(np.ascontiguousarray(points[start : start + chunk], dtype=np.float32)).to(device)
        if progress is not None:
            progress(min(1.0, (start + chunk) / len(points)))


def _checked(values: Tensor, name: str, item: tuple[int, ...], batch: Tensor) -> np.ndarray:
    """Values of one chunk as a numpy array; raises if their shape is wrong or they are not finite."""
    if tuple(values.shape) != (len(batch), *item):
        raise ValueError(f"the object's {name} must have shape {(len(batch), *item)}, got {tuple(values.shape)}")
    finite = torch.isfinite(values)
    if not finite.all():
        bad = (~finite).reshape(len(batch), -1).any(dim=1)
        where = ", ".join(f"{x:.3g}" for x in batch[bad][0].tolist())
        raise ValueError(
            f"the object's {name} is not finite at {int(bad.sum())} of {len(batch)} points, first at ({where}): "
            "the parameters have diverged; export an earlier checkpoint"
        )
    return values.detach().float().cpu().numpy()

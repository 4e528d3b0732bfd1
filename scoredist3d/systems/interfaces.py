"""Protocols of systems that :mod:`scoredist3d.visualization` can show in previews and videos.

A system implements one of the three protocols and contains no drawing code of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor

from scoredist3d.cameras import Cameras
from scoredist3d.systems.scene import Scene


@runtime_checkable
class HasScenes(Protocol):
    """A system that optimizes 3D scenes."""

    def list_scenes(self) -> Sequence[Scene]:
        """The scenes, in a fixed order."""

    def evaluation_cameras(self, azimuths: Sequence[float], elevation: float, height: int, width: int) -> Cameras:
        """Cameras around the object, on the CPU; angles in degrees, image size in pixels."""


@runtime_checkable
class HasImages(Protocol):
    """A system that optimizes images."""

    def images(self) -> Tensor:
        """The images, (N, H, W, 3) in [0, 1], without gradients."""


@runtime_checkable
class HasMethods(Protocol):
    """A system that optimizes images with several methods side by side."""

    @property
    def methods(self) -> Mapping[str, HasImages]:
        """The system of each method, by method label."""

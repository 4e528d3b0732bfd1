"""The final video of a run: a turntable of its scenes, or the optimization of its images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from scoredist3d.cameras import Cameras
from scoredist3d.config.experiment import TurntableConfig
from scoredist3d.meshes.image_files import decode_image
from scoredist3d.systems.base import System
from scoredist3d.systems.interfaces import HasScenes
from scoredist3d.visualization.views import render_views


@dataclass(frozen=True)
class Video:
    """Frames of a video, and their cameras if there are any.

    Attributes:
        frames: (H, W, 3) images in [0, 1].
        cameras: One camera per frame of a turntable; None for a video without cameras.
    """

    frames: Iterator[Tensor]
    cameras: Cameras | None = None


def video_name(system: System) -> str:
    """File stem of the final video: ``turntable`` for scenes, ``optimisation`` for images."""
    return "turntable" if isinstance(system, HasScenes) else "optimisation"


def final_video(system: System, config: TurntableConfig, snapshots: Sequence[Path]) -> Video:
    """The final video of a system; ``snapshots`` are the preview images of the run, oldest first."""
    if isinstance(system, HasScenes):
        return turntable(system, config)
    return Video(animation(snapshots, config.frames))


def turntable(system: HasScenes, config: TurntableConfig) -> Video:
    """Video of one full turn around the scenes, which are shown side by side."""
    azimuths = [360.0 * index / config.frames for index in range(config.frames)]
    cameras = system.evaluation_cameras(azimuths, config.elevation, config.height, config.width)
    return Video(_side_by_side(system, cameras), cameras)


def animation(snapshots: Sequence[Path], least: int) -> Iterator[Tensor]:
    """The preview images of a run as at least ``least`` video frames; each is repeated the same number of times.

    Raises:
        ValueError: A file is not an image, or is too large; the run may come from others.
    """
    hold = -(-least // max(1, len(snapshots)))
    for path in snapshots:
        try:
            image = decode_image(path, "RGB")
        except ValueError as error:
            raise ValueError(f"the preview {path} cannot be used: {error}; delete it") from error
        yield from [torch.from_numpy(np.asarray(image, dtype=np.float32) / 255.0)] * hold


def _side_by_side(system: HasScenes, cameras: Cameras) -> Iterator[Tensor]:
    """Frames (H, scenes x W, 3) that show the scenes side by side, one per camera."""
    turns = [render_views(scene, cameras) for scene in system.list_scenes()]
    for renders in zip(*turns, strict=True):
        yield torch.cat([render.rgb[0] for render in renders], dim=1)

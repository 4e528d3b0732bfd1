"""What a run shows and hands over: preview grids, the final video, the exported object."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from scoredist3d import registry
from scoredist3d.config.experiment import ExperimentConfig, PreviewConfig
from scoredist3d.export.camera_path import write_camera_path
from scoredist3d.export.images import image_grid, save_png
from scoredist3d.export.video import VideoWriter
from scoredist3d.systems.base import System
from scoredist3d.training.checkpoint import step_of
from scoredist3d.training.folder import RunFolder, slug

_log = logging.getLogger("scoredist3d")


@torch.no_grad()
def save_preview(system: System, config: PreviewConfig, folder: RunFolder, step: int, *, prefix: str = "step") -> Path:
    """One row per quantity, one column per view: ``images/<prefix>-000200.png``."""
    rows = system.preview(config)
    if len(rows) == 1 and not system.label_rows:
        grid = image_grid(next(iter(rows.values())))
    else:
        columns = len(next(iter(rows.values())))
        names = [name if column == 0 else "" for name in rows for column in range(columns)]
        images = [image for row in rows.values() for image in row]
        grid = image_grid(images, columns, labels=names if system.label_rows else None)
    return save_png(grid, folder.images / f"{prefix}-{step:06d}.png")


def latest_preview(folder: RunFolder) -> Path | None:
    """The newest grid of the optimisation."""
    return max(folder.images.glob("step-*.png"), key=step_of, default=None)


@torch.no_grad()
def write_video(
    system: System, config: ExperimentConfig, folder: RunFolder, progress: Callable[[float], None]
) -> tuple[Path, str]:
    """The turntable (3D) or the animation of the optimisation (2D); its path, and a remark or an empty string.

    The cameras of a turntable are written beside it as ``<name>-cameras.json``.
    """
    snapshots = sorted(folder.images.glob("step-*.png"), key=step_of)
    expected = max(1, config.test.frames)
    with VideoWriter(folder.videos / f"{system.video_name}.{config.test.format}", fps=config.test.fps) as video:
        for index, frame in enumerate(system.frames(config.test, snapshots)):
            video.add(frame)
            progress(min(1.0, (index + 1) / expected))
    cameras = system.video_cameras(config.test)
    if cameras is not None:
        write_camera_path(folder.videos / f"{system.video_name}-cameras.json", cameras, config.test.fps)
    return video.path, video.note


def export_objects(
    system: System, config: ExperimentConfig, folder: RunFolder, progress: Callable[[str, float], None]
) -> list[Any]:
    """Mesh and texture files in ``export/``; of each object the exporter's result with ``paths`` and ``report``.

    Raises:
        ValueError: The system has no object (text-to-2d), or none that is solid; single ones that are not are left out
            with a warning.
    """
    shapes = system.shapes()
    if not shapes:
        raise ValueError(f"system.type={config.system.type} makes images, so there is no object to export")
    exporter, name = registry.build(config.exporter), slug(config.prompt)
    names = [name, *(f"{name}-{index}" for index in range(2, len(shapes) + 1))]
    exported, problems = [], []
    for shape, own in zip(shapes, names, strict=True):
        try:
            exported.append(exporter.export(shape, folder.export, own, progress))
        except ValueError as error:
            problems.append(f"{own}: {error}" if len(shapes) > 1 else str(error))
    if not exported:
        raise ValueError("; ".join(problems))
    for problem in problems:
        _log.warning("no mesh was written of %s", problem)
    return exported

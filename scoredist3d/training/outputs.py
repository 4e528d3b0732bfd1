"""What a run shows and hands over: preview grids, the final video, the exported object."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from scoredist3d import registry
from scoredist3d.config.experiment import ExperimentConfig, PreviewConfig
from scoredist3d.export.base import ExportResult
from scoredist3d.export.camera_path import write_camera_path
from scoredist3d.export.images import image_grid, save_png
from scoredist3d.export.video import SUFFIXES, VideoWriter
from scoredist3d.files import new_folder, read_json, write_json
from scoredist3d.systems.base import System
from scoredist3d.training.checkpoint import step_of
from scoredist3d.training.folder import RunFolder, slug
from scoredist3d.training.replacement import Replacement


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


@dataclass(frozen=True)
class Exported:
    """What an export has written.

    Attributes:
        results: The exporter's results, with their paths in ``export/``.
        reports: Of each result.
        missing: Name of each object without a file -> why.
        remark: What was replaced, or an empty string.
    """

    results: list[ExportResult]
    reports: list[Path]
    missing: dict[str, str]
    remark: str

    @property
    def problem(self) -> str | None:
        """Which objects have no mesh and why; None where all have one."""
        return no_mesh(self.missing) if self.missing else None


class NoMeshError(ValueError):
    """None of the objects could be exported."""


def no_mesh(missing: Mapping[str, str]) -> str:
    """``no mesh was written of mug-2: <why>; of mug-3: <why>``."""
    return "no mesh was written " + "; ".join(f"of {name}: {why}" for name, why in missing.items())


@torch.no_grad()
def write_video(
    system: System, config: ExperimentConfig, folder: RunFolder, progress: Callable[[float], None]
) -> tuple[Path, str]:
    """The turntable (3D) or the animation of the optimisation (2D); its path, and what it replaced, in a sentence.

    The cameras of a turntable are written beside it as ``<name>-cameras.json``. An earlier video that differs is kept
    in ``videos/previous-<n>/``.
    """
    snapshots = sorted(folder.images.glob("step-*.png"), key=step_of)
    expected = max(1, config.test.frames)
    name, path_of_cameras = system.video_name, f"{system.video_name}-cameras.json"
    with new_folder(folder.root / ".videos.tmp") as staging:
        with VideoWriter(staging / f"{name}.{config.test.format}", fps=config.test.fps) as video:
            for index, frame in enumerate(system.frames(config.test, snapshots)):
                video.add(frame)
                progress(min(1.0, (index + 1) / expected))
        cameras = system.video_cameras(config.test)
        if cameras is not None:
            write_camera_path(staging / path_of_cameras, cameras, config.test.fps)
        earlier = [*(f"{name}{suffix}" for suffix in SUFFIXES), path_of_cameras]
        replacement = Replacement.plan(staging, folder.videos, earlier)
        replacement.apply()
    return folder.videos / video.path.name, replacement.describe()


def export_objects(
    system: System, config: ExperimentConfig, folder: RunFolder, progress: Callable[[str, float], None]
) -> Exported:
    """Mesh and texture files in ``export/``, with a ``report.json`` per object.

    The files of an earlier export that differ are kept in ``export/previous-<n>/``, and the reports say so. Objects
    that cannot be exported are left out.

    Raises:
        NoMeshError: None could be exported; nothing has changed.
        ValueError: The system has no object (text-to-2d).
    """
    shapes = system.shapes()
    if not shapes:
        raise ValueError(f"system.type={config.system.type} makes images, so there is no object to export")
    exporter, name = registry.build(config.exporter), slug(config.prompt)
    names = [name, *(f"{name}-{index}" for index in range(2, len(shapes) + 1))]
    results: list[ExportResult] = []
    missing: dict[str, str] = {}
    with new_folder(folder.root / ".export.tmp") as staging:
        for shape, own in zip(shapes, names, strict=True):
            try:
                results.append(exporter.export(shape, staging, own, progress))
            except ValueError as error:
                missing[own] = str(error)
        if not results:
            raise NoMeshError(no_mesh(missing))
        reports = [f"report{'' if number == 1 else f'-{number}'}.json" for number in range(1, len(results) + 1)]
        replacement = Replacement.plan(staging, folder.export, _exported_before(folder), reports)
        for report, result in zip(reports, results, strict=True):
            write_json(staging / report, result.report.to_dict() | _replacement_entry(replacement))
        replacement.apply([path.name for result in results for path in result.paths])
    placed = [replace(result, paths=[folder.export / path.name for path in result.paths]) for result in results]
    return Exported(placed, [folder.export / name for name in reports], missing, replacement.describe())


def set_export_aside(folder: RunFolder) -> str:
    """Move the files of an earlier export to ``export/previous-<n>/``; a sentence about it, or an empty string."""
    with new_folder(folder.root / ".export.tmp") as staging:
        replacement = Replacement.plan(staging, folder.export, _exported_before(folder))
        if replacement.previous is not None:
            replacement.apply()
    return replacement.describe()


def _replacement_entry(replacement: Replacement) -> dict[str, Any]:
    if replacement.previous is None:
        return {"replaced": None}
    return {"replaced": {"files": list(replacement.replaced), "kept_in": replacement.previous.name}}


def _exported_before(folder: RunFolder) -> list[str]:
    """Names of the files of the current export, by its reports; files of others in that folder are not in it."""
    names = []
    for path in folder.export.glob("report*.json"):
        written = read_json(path).get("bytes")
        if isinstance(written, dict):
            names += [path.name, *(name for name in written if Path(name).name == name)]
    return names

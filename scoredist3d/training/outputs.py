"""User-facing results of a run: preview grids, the final video and the exported objects."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from scoredist3d import registry
from scoredist3d.config.errors import under
from scoredist3d.config.experiment import ExperimentConfig, PreviewConfig
from scoredist3d.export.base import ExportResult
from scoredist3d.export.camera_path import write_camera_path
from scoredist3d.export.check import CHECK_SUFFIX
from scoredist3d.export.images import save_png
from scoredist3d.export.video import SUFFIXES, VideoWriter
from scoredist3d.files import is_file_name, naming, new_folder, read_json, write_json
from scoredist3d.systems.base import System
from scoredist3d.training.folder import RunFolder, slug, step_of
from scoredist3d.training.replacement import Replacement
from scoredist3d.visualization.previews import preview_grid
from scoredist3d.visualization.turntable import final_video, video_name

CAMERAS = "-cameras.json"
"""End of the name of the file with the cameras of a video."""
VALIDATION = "validation"
"""Prefix of the images of ``--validate``."""


def save_preview(system: System, config: PreviewConfig, folder: RunFolder, step: int, *, prefix: str = "step") -> Path:
    """Save the preview grid as ``images/<prefix>-<step>.png``, e.g. ``images/step-000200.png``; returns its path."""
    return save_png(preview_grid(system, config), folder.images / f"{prefix}-{step:06d}.png")


def latest_preview(folder: RunFolder, step: int = 0) -> Path | None:
    """The newest preview grid saved during training, of ``step`` or later; None if there is none."""
    newest = max(folder.images.glob("step-*.png"), key=step_of, default=None)
    return newest if newest is not None and step_of(newest) >= step else None


@dataclass(frozen=True)
class Exported:
    """Result of an export.

    Attributes:
        results: Results of the exporter, with paths in ``export/``.
        reports: Report file of each result.
        missing: Reasons why objects could not be exported, by object name.
        remark: Message about the earlier files that were replaced, or an empty string.
    """

    results: list[ExportResult]
    reports: list[Path]
    missing: dict[str, str]
    remark: str

    @property
    def paths(self) -> dict[str, Path]:
        """All files by label: ``glb``, ``normal texture``, ``mesh check``, ``mesh report 2``, ..."""
        names, paths = {".png": "texture", ".mtl": "material"}, {}
        for number, (item, report) in enumerate(zip(self.results, self.reports, strict=True), start=1):
            label = "" if number == 1 else f" {number}"
            own = min((path.stem for path in item.paths), key=len)
            for path in item.paths:
                if path.name == f"{own}{CHECK_SUFFIX}":
                    paths[f"mesh check{label}"] = path
                    continue
                channel = path.stem.removeprefix(own).strip("-")
                kind = names.get(path.suffix, path.suffix.removeprefix("."))
                paths[f"{channel} {kind}".strip() + label] = path
            paths[f"mesh report{label}"] = report
        return paths

    @property
    def problem(self) -> str | None:
        """Message about the objects that could not be exported; None if all were exported."""
        return no_mesh(self.missing) if self.missing else None


class NoMeshError(ValueError):
    """Error raised if no object could be exported."""


def no_mesh(missing: Mapping[str, str]) -> str:
    """Message about objects without a mesh: ``no mesh was written for mug-2: <reason>; for mug-3: <reason>``."""
    return "no mesh was written " + "; ".join(f"for {name}: {why}" for name, why in missing.items())


@torch.no_grad()
def write_video(
    system: System, config: ExperimentConfig, folder: RunFolder, progress: Callable[[float], None]
) -> tuple[Path, str]:
    """Write the final video: a turntable of scenes, or an animation of the optimization of images.

    The cameras of a turntable are written next to the video as ``<name>-cameras.json``. An earlier video that differs
    is kept in ``videos/previous-<n>/``.

    Returns:
        The path of the video, and a message about the files that it replaced (may be empty).
    """
    snapshots = sorted(folder.images.glob("step-*.png"), key=step_of)
    expected = max(1, config.test.frames)
    name, path_of_cameras = video_name(system), f"{video_name(system)}{CAMERAS}"
    content = final_video(system, config.test, snapshots)
    with naming(folder.videos), new_folder(folder.root / ".videos.tmp") as staging:
        with VideoWriter(staging / f"{name}.{config.test.format}", fps=config.test.fps) as video:
            for index, frame in enumerate(content.frames):
                video.add(frame)
                progress(min(1.0, (index + 1) / expected))
        if content.cameras is not None:
            write_camera_path(staging / path_of_cameras, content.cameras, config.test.fps)
        earlier = [*(f"{name}{suffix}" for suffix in SUFFIXES), path_of_cameras]
        replacement = Replacement.plan(staging, folder.videos, earlier)
        replacement.apply()
    return folder.videos / video.path.name, replacement.describe()


def export_objects(
    system: System, config: ExperimentConfig, folder: RunFolder, progress: Callable[[str, float], None]
) -> Exported:
    """Export all objects to ``export/``, with one report per object: ``report.json``, ``report-2.json``, ...

    Files of an earlier export that differ are kept in ``export/previous-<n>/`` and named in the reports. Objects that
    cannot be exported are skipped.

    Raises:
        NoMeshError: No object could be exported; all files in ``export/`` are unchanged.
        ValueError: The system has no 3D object (text-to-2d).
    """
    shapes = system.shapes()
    if not shapes:
        raise ValueError(
            f"system.type={config.system.type} optimizes images, so there is no object to export; "
            "export a text-to-3d run"
        )
    exporter, name = registry.build(config.exporter), slug(config.prompt)
    names = [name, *(f"{name}-{index}" for index in range(2, len(shapes) + 1))]
    results: list[ExportResult] = []
    missing: dict[str, str] = {}
    with naming(folder.export), new_folder(folder.root / ".export.tmp") as staging:
        for shape, own in zip(shapes, names, strict=True):
            try:
                with under("exporter"):
                    ready = exporter.for_prompt(config.prompt)
                results.append(ready.export(shape, staging, own, progress))
            except ValueError as error:
                missing[own] = str(error)
        if not results:
            raise NoMeshError(no_mesh(missing))
        reports = [f"report{'' if number == 1 else f'-{number}'}.json" for number in range(1, len(results) + 1)]
        replacement = Replacement.plan(staging, folder.export, _exported_before(folder), reports)
        for report, result in zip(reports, results, strict=True):
            write_json(staging / report, result.report.to_dict() | _replacement_entry(replacement))
        replacement.apply()
    placed = [replace(result, paths=[folder.export / path.name for path in result.paths]) for result in results]
    return Exported(placed, [folder.export / name for name in reports], missing, replacement.describe())


def set_export_aside(folder: RunFolder) -> str:
    """Move the files of an earlier export to ``export/previous-<n>/``; returns a message, or "" if there are none."""
    return _set_aside(folder.export, _exported_before(folder))


def set_results_aside(folder: RunFolder, step: int) -> list[str]:
    """Move the results of an earlier state to subfolders ``previous-<n>``, and delete previews of later steps.

    Called when training continues at ``step``. The results are the export, the video and the images of ``--validate``.
    Previews of later steps remain from a killed session, or if an earlier checkpoint is resumed.

    Returns:
        A message for each kind of result.
    """
    for preview in folder.images.glob("step-*.png"):
        if step_of(preview) > step:
            preview.unlink()
    videos = [path.name for path in folder.videos.glob("*") if path.suffix in SUFFIXES or path.name.endswith(CAMERAS)]
    validation = [path.name for path in folder.images.glob(f"{VALIDATION}-*.png")]
    asides = {
        "export": set_export_aside(folder),
        "video": _set_aside(folder.videos, videos),
        "validation": _set_aside(folder.images, validation),
    }
    return [f"{what}: {message}" for what, message in asides.items() if message]


def _set_aside(target: Path, names: list[str]) -> str:
    with new_folder(target.with_name(f".{target.name}.tmp")) as staging:
        replacement = Replacement.plan(staging, target, names)
        if replacement.previous is not None:
            replacement.apply()
    return replacement.describe()


def _replacement_entry(replacement: Replacement) -> dict[str, Any]:
    if replacement.previous is None:
        return {"replaced": None}
    return {"replaced": {"files": list(replacement.replaced), "kept_in": replacement.previous.name}}


def _exported_before(folder: RunFolder) -> list[str]:
    """Names of the current export's files according to its reports; other files in the folder are not included."""
    names = []
    for path in folder.export.glob("report*.json"):
        written = read_json(path).get("bytes")
        if isinstance(written, dict):
            names += [path.name, *(name for name in written if is_file_name(name))]
    return names

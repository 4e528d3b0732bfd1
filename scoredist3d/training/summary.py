"""``summary.json``: settings, outcome and files of a run or a pipeline."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import scoredist3d
from scoredist3d.config.experiment import ExperimentConfig
from scoredist3d.files import read_json, write_json
from scoredist3d.training.console import StageClock, peak_memory_gib
from scoredist3d.training.folder import SUMMARY, RunFolder

RUNNING, DONE, INTERRUPTED, FAILED, NO_MESH = "running", "done", "interrupted", "failed", "no mesh"
NOT_BEGUN = "not begun"
"""Status of a pipeline stage that has no summary."""


def write_summary(
    folder: RunFolder,
    config: ExperimentConfig,
    clock: StageClock,
    *,
    status: str,
    step: int,
    error: str | None = None,
    paths: Mapping[str, Path] | None = None,
) -> Path:
    """Replace the summary of a run.

    Args:
        folder: Folder of the run.
        config: Config of the run.
        clock: Wall times of the stages of this session.
        status: One of the status constants of this module.
        step: Number of optimizer steps of the saved state.
        error: Reason for a status other than ``done``.
        paths: Files inside ``folder`` by label.
    """
    summary = {
        **_head(config, status, error),
        "step": step,
        "max_steps": config.trainer.max_steps,
        "seconds": clock.seconds,
        "peak_memory_gib": round(peak_memory_gib(), 3),
        "stages": {name: {"status": clock.status[name], "seconds": clock.seconds[name]} for name in clock.seconds},
        "paths": {label: _relative(path, folder.root) for label, path in (paths or {}).items()},
    }
    return write_json(folder.summary, summary)


def add_files(folder: RunFolder, part: Path, paths: Mapping[str, Path]) -> None:
    """Replace the listed files of the subfolder ``part`` with ``paths`` in an existing summary."""
    summary = read_json(folder.summary)
    if not isinstance(summary.get("paths"), dict):
        return  # There is no summary, or an earlier version of the program wrote it.
    kept = {label: path for label, path in summary["paths"].items() if not str(path).startswith(f"{part.name}/")}
    summary["paths"] = kept | {label: _relative(path, folder.root) for label, path in paths.items()}
    write_json(folder.summary, summary)


def settle_export(folder: RunFolder, step: int, problem: str | None) -> None:
    """Update the status of an existing summary after a later export of the same state."""
    summary = read_json(folder.summary)
    if summary.get("status") in (DONE, NO_MESH) and summary.get("step") == step:
        status = DONE if problem is None else NO_MESH
        write_json(folder.summary, summary | {"status": status, "error": problem})


def finished_steps(folder: RunFolder) -> int:
    """Number of optimizer steps of a run according to its summary; 0 if there is none."""
    return int(read_json(folder.summary).get("step", 0))


def is_done(folder: RunFolder, max_steps: int) -> bool:
    """Whether a run finished with at least ``max_steps`` steps; a summary without a status counts as finished."""
    summary = read_json(folder.summary)
    return bool(summary) and summary.get("status", DONE) == DONE and finished_steps(folder) >= max_steps


def write_pipeline_summary(
    root: Path, stages: Mapping[str, ExperimentConfig], *, status: str, error: str | None = None
) -> Path:
    """Replace the summary of a pipeline, which contains totals and the summaries of its stages.

    Prompt, seed and paths are those of the last stage, which produces the pipeline's object.
    """
    summaries = {name: _stage(root / name) for name in stages}
    seconds = [float(value) for stage in summaries.values() for value in stage.get("seconds", {}).values()]
    last = list(stages)[-1]
    summary = {
        **_head(stages[last], status, error),
        "seconds": round(sum(seconds), 3),
        "peak_memory_gib": max((float(stage.get("peak_memory_gib", 0.0)) for stage in summaries.values()), default=0.0),
        "stages": summaries,
        "paths": {label: f"{last}/{path}" for label, path in summaries[last].get("paths", {}).items()},
    }
    return write_json(root / SUMMARY, summary)


def _stage(folder: Path) -> dict[str, Any]:
    summary = read_json(folder / SUMMARY)
    return {"path": folder.name, **({"status": DONE, **summary} if summary else {"status": NOT_BEGUN})}


def _head(config: ExperimentConfig, status: str, error: str | None) -> dict[str, Any]:
    return {
        "status": status,
        "error": error,
        "prompt": config.prompt,
        "negative_prompt": config.negative_prompt,
        "seed": config.seed,
        "version": scoredist3d.__version__,
    }


def _relative(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix()

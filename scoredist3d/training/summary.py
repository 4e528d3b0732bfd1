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

RUNNING, DONE, INTERRUPTED, FAILED = "running", "done", "interrupted", "failed"
NO_MESH, NO_VIDEO, NO_IMAGES = "no mesh", "no video", "no images"
"""Statuses of a trained run without one of its products."""
NOT_BEGUN = "not begun"
"""Status of a pipeline stage that has no summary."""
MESH, VIDEO, IMAGES = "mesh", "video", "images"
"""Names of the products of a run, by which the summary lists them."""
_WITHOUT = {MESH: NO_MESH, VIDEO: NO_VIDEO, IMAGES: NO_IMAGES}

Products = Mapping[str, str | None]
"""Mapping from each product that was written or attempted to the reason why it failed; None if it was written."""


def write_summary(
    folder: RunFolder,
    config: ExperimentConfig,
    clock: StageClock,
    *,
    status: str,
    step: int,
    error: str | None = None,
    paths: Mapping[str, Path] | None = None,
    products: Products | None = None,
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
        products: Products of the run.
    """
    summary = {
        **_head(config, status, error),
        "step": step,
        "max_steps": config.trainer.max_steps,
        "seconds": clock.seconds,
        "peak_memory_gib": round(peak_memory_gib(), 3),
        "stages": {name: {"status": clock.status[name], "seconds": clock.seconds[name]} for name in clock.seconds},
        "products": _entries(products or {}),
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


def outcome(products: Products) -> tuple[str, str | None]:
    """Status and error of a trained run with these products; several reasons are joined by semicolons."""
    failed = [name for name in _WITHOUT if products.get(name) is not None]
    return (_WITHOUT[failed[0]], "; ".join(str(products[name]) for name in failed)) if failed else (DONE, None)


def finished_steps(folder: RunFolder) -> int:
    """Number of optimizer steps of a run according to its summary; 0 if there is none."""
    step = read_json(folder.summary).get("step", 0)
    return step if isinstance(step, int) else 0


def settle(folder: RunFolder, step: int, product: str, problem: str | None) -> None:
    """Update products, status and error of an existing summary after a product of the same state was written again."""
    summary = read_json(folder.summary)
    if summary.get("status") not in (DONE, *_WITHOUT.values()) or summary.get("step") != step:
        return
    products = _problems(summary) | {product: problem}
    status, error = outcome(products)
    write_json(folder.summary, summary | {"status": status, "error": error, "products": _entries(products)})


def _entries(products: Products) -> dict[str, dict[str, str | None]]:
    """Products as entries of a summary."""
    return {name: {"status": DONE if why is None else FAILED, "error": why} for name, why in products.items()}


def _problems(summary: dict[str, Any]) -> dict[str, str | None]:
    """Products of a summary; an earlier version of the program recorded only a missing mesh, in status and error."""
    entries = summary.get("products")
    if isinstance(entries, dict):
        return {name: entry.get("error") for name, entry in entries.items() if isinstance(entry, dict)}
    return {MESH: summary.get("error")} if summary.get("status") == NO_MESH else {}


def is_done(folder: RunFolder, max_steps: int, *, needs_products: bool = True) -> bool:
    """Whether a run finished with at least ``max_steps`` steps; a summary without a status counts as finished.

    Args:
        folder: Folder of the run.
        max_steps: Required number of optimizer steps.
        needs_products: Whether a run without one of its products counts as unfinished, so that a resumed run writes
            it. A stage of a pipeline that others follow only needs its state.
    """
    summary = read_json(folder.summary)
    finished = (DONE,) if needs_products else (DONE, *_WITHOUT.values())
    return bool(summary) and summary.get("status", DONE) in finished and finished_steps(folder) >= max_steps


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

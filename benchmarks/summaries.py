"""What the benchmarks read from ``summary.json``, the same for a run and for a pipeline."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any


def read_summary(folder: Path) -> dict[str, Any]:
    """The summary of a run or pipeline folder."""
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    return summary


def phase_seconds(summary: dict[str, Any]) -> dict[str, float]:
    """Seconds of each phase of a run (``training``, ``export``, ...), summed over the stages of a pipeline."""
    total: Counter[str] = Counter()
    for part in summary["stages"].values() if is_pipeline(summary) else [summary]:
        total.update(part.get("seconds", {}))
    return dict(total)


def object_folder(run: Path) -> Path:
    """Folder of the run that made the object: ``run`` itself, or the last stage of a pipeline."""
    summary = read_summary(run)
    return run / list(summary["stages"].values())[-1]["path"] if is_pipeline(summary) else run


def is_pipeline(summary: dict[str, Any]) -> bool:
    """Whether a summary is that of a pipeline, whose ``seconds`` are a total and not a mapping."""
    return not isinstance(summary["seconds"], dict)

"""Run the stages of a pipeline, each in a folder of its own, and go on where an interrupted one has stopped.

``<output_root>/<name>/<tag>@<time>/`` holds ``pipeline.yaml`` (what was asked for) and one run folder per stage. A
stage is done when its ``summary.json`` is there; one that has a checkpoint is resumed, one that has none starts again.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from scoredist3d.config.experiment import ExperimentConfig
from scoredist3d.config.pipeline import STAGE_PREFIX, Pipeline
from scoredist3d.config.validation import layers_to_yaml
from scoredist3d.files import write_atomically, write_json
from scoredist3d.training.console import Console
from scoredist3d.training.distributed import DeviceSpec
from scoredist3d.training.folder import PIPELINE_CONFIG, SUMMARY, RunFolder, slug
from scoredist3d.training.run import RunResult, run_training


@dataclass
class PipelineResult:
    """What came out of a pipeline.

    Attributes:
        folder: Of all stages.
        stages: The results of the stages that ran now, by name; those that were done before are not in it.
        interrupted: Stopped by a signal; the checkpoint of the stage is saved.
    """

    folder: Path
    stages: dict[str, RunResult] = field(default_factory=dict)
    interrupted: bool = False


def run_pipeline(
    pipeline: Pipeline,
    *,
    devices: DeviceSpec = "auto",
    resume: Path | str | None = None,
    output: Path | str | None = None,
    console: Console | None = None,
) -> PipelineResult:
    """Optimise every stage in turn; only the last one is exported.

    Args:
        pipeline: The validated stages.
        devices: As for a single run.
        resume: Folder of an earlier pipeline to go on in.
        output: Folder to use in place of ``<output_root>/<name>/<tag>@<time>``.
        console: Where to print.

    Raises:
        ValueError, NonFiniteError, KeyboardInterrupt: As for a single run; the stages done before stay.
    """
    console = console or Console()
    root = _root(pipeline.first, resume, output)
    write_atomically(root / PIPELINE_CONFIG, layers_to_yaml(pipeline.written))
    result = PipelineResult(root)
    names = list(pipeline.stages)
    for number, (name, config) in enumerate(pipeline.stages.items(), start=1):
        folder = RunFolder(root / name)
        if _is_done(folder, config):
            console.say(f"Stage {number} of {len(names)}, {name}: done before, in {folder.root}")
            continue
        console.say(f"Stage {number} of {len(names)}, {name}:")
        start = getattr(config.system, "init_from", None)
        if start is not None and start.startswith(STAGE_PREFIX):
            config.system.init_from = str(root / start.removeprefix(STAGE_PREFIX))  # type: ignore[attr-defined]
        result.stages[name] = run_training(
            config,
            devices=devices,
            resume=folder.root if folder.last_checkpoint.is_file() else None,
            output=folder.root,
            export=name == names[-1],
            console=console,
        )
        if result.stages[name].interrupted:
            result.interrupted = True
            console.say(f"To go on with the pipeline: python launch.py --train --resume {root}")
            return result
    _summarise(root, names)
    return result


def _root(first: ExperimentConfig, resume: Path | str | None, output: Path | str | None) -> Path:
    if resume is not None:
        return Path(resume)
    if output is not None:
        Path(output).mkdir(parents=True, exist_ok=True)
        return Path(output)
    return RunFolder.create(first.output_root, first.name, first.tag or slug(first.prompt)).root


def _is_done(folder: RunFolder, config: ExperimentConfig) -> bool:
    """Whether the stage has been closed at or beyond the step now asked for."""
    path = folder.root / SUMMARY
    return path.is_file() and json.loads(path.read_text(encoding="utf-8"))["step"] >= config.trainer.max_steps


def _summarise(root: Path, names: list[str]) -> None:
    """``summary.json`` of the pipeline: that of each stage, in order."""
    stages = {name: json.loads((root / name / SUMMARY).read_text(encoding="utf-8")) for name in names}
    seconds = sum(sum(stage["seconds"].values()) for stage in stages.values())
    write_json(root / SUMMARY, {"seconds": round(seconds, 3), "stages": stages})

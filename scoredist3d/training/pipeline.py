"""Run the stages of a pipeline, each in a folder of its own, and go on where an interrupted one has stopped.

``<output_root>/<name>/<tag>@<time>/`` holds ``pipeline.yaml`` (what was asked for) and one run folder per stage. A
stage is done when its ``summary.json`` is there; one that has a checkpoint is resumed, one that has none starts again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from scoredist3d.config.experiment import ExperimentConfig
from scoredist3d.config.fields import ConfigError
from scoredist3d.config.loader import STAGES
from scoredist3d.config.pipeline import Pipeline, at_stage, source_stage
from scoredist3d.config.validation import dump, layers_to_yaml, load_experiment
from scoredist3d.files import write_atomically, write_json
from scoredist3d.paths import command_name
from scoredist3d.training.console import Console
from scoredist3d.training.distributed import DeviceSpec
from scoredist3d.training.folder import PIPELINE_CONFIG, SUMMARY, RunFolder, slug
from scoredist3d.training.run import RunResult, check_precision, check_sources, run_training


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
    _check_sources(pipeline)
    _check_precision(pipeline, devices, None if resume is None else Path(resume))
    root = _root(pipeline.first, resume, output)
    write_atomically(root / PIPELINE_CONFIG, layers_to_yaml(pipeline.written))
    result = PipelineResult(root)
    names = list(pipeline.stages)
    how = f"To go on with the pipeline: {command_name()} --train --resume {root}"
    for number, (name, config) in enumerate(pipeline.stages.items(), start=1):
        folder = RunFolder(root / name)
        source = source_stage(config)
        if source is not None:
            config.system.init_from = str(root / source)  # type: ignore[attr-defined]
        if _is_done(folder, config, name) and source not in result.stages:
            console.say(f"Stage {number} of {len(names)}, {name}: done before, in {folder.root}")
            continue
        console.say(f"Stage {number} of {len(names)}, {name}:")
        if source in result.stages and folder.root.exists():
            console.say(f"{source} has changed, so {name} begins anew; what was there is in {_set_aside(folder.root)}")
        try:
            result.stages[name] = run_training(
                config,
                devices=devices,
                resume=folder.root if folder.last_checkpoint.is_file() else None,
                output=folder.root,
                export=name == names[-1],
                resume_from=root,
                console=console,
            )
        except ConfigError as error:
            if result.stages or number > 1:
                console.say(f"{how} (and what is to be changed)")
            raise ConfigError(at_stage(name, str(error))) from error
        except Exception:
            console.say(f"Stage {name} failed. {how}")
            raise
        if result.stages[name].interrupted:
            result.interrupted = True
            return result
    _summarise(root, names)
    return result


def _check_sources(pipeline: Pipeline) -> None:
    """That the files of all stages are there, before the first of them runs for hours."""
    _check_each(pipeline.stages, check_sources)


def _check_precision(pipeline: Pipeline, devices: DeviceSpec, root: Path | None) -> None:
    """That the devices can compute in the precision of all stages that are still to run."""
    todo = {
        name: config
        for name, config in pipeline.stages.items()
        if root is None or not _is_done(RunFolder(root / name), config, name)
    }
    _check_each(todo, lambda config: check_precision(config, devices))


def _check_each(stages: Mapping[str, ExperimentConfig], check: Callable[[ExperimentConfig], None]) -> None:
    problems = []
    for name, config in stages.items():
        try:
            check(config)
        except ConfigError as error:
            problems.append(at_stage(name, str(error)))
    if problems:
        raise ConfigError("\n".join(problems))


def _set_aside(folder: Path) -> Path:
    """Rename a stage's folder to one that does not exist yet."""
    for number in range(1, 1000):
        aside = folder.with_name(f"{folder.name}-before-{number}")
        if not aside.exists():
            folder.rename(aside)
            return aside
    raise ValueError(f"{folder} and 999 older ones exist already; remove some")


def _root(first: ExperimentConfig, resume: Path | str | None, output: Path | str | None) -> Path:
    if resume is not None:
        return Path(resume)
    if output is not None:
        Path(output).mkdir(parents=True, exist_ok=True)
        return Path(output)
    return RunFolder.create(first.output_root, first.name, first.tag or slug(first.prompt)).root


def _is_done(folder: RunFolder, config: ExperimentConfig, name: str) -> bool:
    """Whether the stage has been closed, with these very options, at or beyond the step now asked for.

    Raises:
        ConfigError: It has been closed with other options.
    """
    path = folder.root / SUMMARY
    if not path.is_file() or json.loads(path.read_text(encoding="utf-8"))["step"] < config.trainer.max_steps:
        return False
    then = load_experiment([folder.resolved_config])
    if hasattr(then.system, "init_from"):
        then.system.init_from = config.system.init_from  # type: ignore[attr-defined]  # the folder may have another name now
    if dump(then.system) != dump(config.system) or then.prompt != config.prompt:
        raise ConfigError(
            f"{STAGES}.{name}: was done with other options, in {folder.root}; rename or remove that folder to run it "
            "again, or leave its options as they were"
        )
    return True


def _summarise(root: Path, names: list[str]) -> None:
    """``summary.json`` of the pipeline: that of each stage, in order."""
    stages = {name: json.loads((root / name / SUMMARY).read_text(encoding="utf-8")) for name in names}
    seconds = sum(sum(stage["seconds"].values()) for stage in stages.values())
    write_json(root / SUMMARY, {"seconds": round(seconds, 3), "stages": stages})

"""Run the stages of a pipeline, each in a folder of its own, and go on where an interrupted one has stopped.

``<output_root>/<name>/<tag>@<time>/`` holds ``pipeline.yaml`` (what was asked for) and one run folder per stage. A
stage is done when its ``summary.json`` says so; one that has a checkpoint is resumed, one that has none starts again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from scoredist3d.config.experiment import ExperimentConfig
from scoredist3d.config.fields import ConfigError
from scoredist3d.config.loader import STAGES, merge
from scoredist3d.config.pipeline import Pipeline, at_stage, source_stage
from scoredist3d.config.resume import resumed_stages
from scoredist3d.config.validation import dump, layers_to_yaml, load_experiment, load_plain
from scoredist3d.files import write_atomically
from scoredist3d.paths import command_name
from scoredist3d.training.console import Console
from scoredist3d.training.distributed import DeviceSpec
from scoredist3d.training.folder import PIPELINE_CONFIG, RunFolder, slug, stages_begun
from scoredist3d.training.precision import check_precision
from scoredist3d.training.run import RunResult, check_sources, run_training
from scoredist3d.training.summary import DONE, FAILED, INTERRUPTED, RUNNING, is_done, write_pipeline_summary


@dataclass
class PipelineResult:
    """What came out of a pipeline.

    Attributes:
        folder: Of all stages.
        stages: The results of the stages that ran now, by name; those that were done before are not in it.
        status: That of the last stage that ran; see :class:`scoredist3d.training.run.RunResult`.
        error: Why the status is not ``done``.
    """

    folder: Path
    stages: dict[str, RunResult] = field(default_factory=dict)
    status: str = DONE
    error: str | None = None

    @property
    def interrupted(self) -> bool:
        """Whether a stage was stopped by a signal; its checkpoint is saved."""
        return self.status == INTERRUPTED


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
        resume: Folder of an earlier pipeline to go on in; stages that go on keep their schedules, as
            :func:`scoredist3d.config.resume.resumed_stages` says.
        output: Folder to use in place of ``<output_root>/<name>/<tag>@<time>``.
        console: Where to print.

    Raises:
        ValueError, NonFiniteError, KeyboardInterrupt: As for a single run; the stages done before stay.
    """
    console = console or Console()
    _check_sources(pipeline)
    _check_precision(pipeline, devices, None if resume is None else Path(resume))
    root = _root(pipeline.first, resume, output)
    result = PipelineResult(root)
    record = _Record(root, pipeline)
    if resume is None:
        record.begin()
    try:
        _run_stages(pipeline, result, record, devices, console)
    except KeyboardInterrupt:
        record.end(INTERRUPTED, "stopped by a signal, outside of the optimisation")
        raise
    except Exception as error:
        record.end(FAILED, str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}")
        raise
    if not result.interrupted:
        record.begin()
    record.end(result.status, result.error)
    return result


def _run_stages(
    pipeline: Pipeline, result: PipelineResult, record: _Record, devices: DeviceSpec, console: Console
) -> None:
    """Run what is not done; the outcome of the last stage that ran is that of the pipeline."""
    root, names = result.folder, list(pipeline.stages)
    resumed = resumed_stages(pipeline, stages_begun(root))
    how = f"To go on with the pipeline: {command_name()} --train --resume {root}"
    for number, (name, fresh) in enumerate(pipeline.stages.items(), start=1):
        folder, source = RunFolder(root / name), source_stage(fresh)
        anew = source in result.stages and folder.root.exists()
        written = pipeline.written[STAGES][name] if anew else resumed[name]
        config = fresh if written is pipeline.written[STAGES][name] else load_plain(written)
        if source is not None:
            config.system.init_from = str(root / source)  # type: ignore[attr-defined]
            written = merge(written, {"system": {"init_from": str(root / source)}})
        if not anew and source not in result.stages and _is_done(folder, config, name):
            console.say(f"Stage {number} of {len(names)}, {name}: done before, in {folder.root}")
            continue
        console.say(f"Stage {number} of {len(names)}, {name}:")
        if anew:
            console.say(f"{source} has changed, so {name} begins anew; what was there is in {_set_aside(folder.root)}")
        try:
            stage = run_training(
                config,
                devices=devices,
                resume=folder.root if folder.last_checkpoint.is_file() else None,
                output=folder.root,
                source=layers_to_yaml(written),
                export=name == names[-1],
                resume_from=root,
                begun=record.begin,
                console=console,
            )
        except ConfigError as error:
            if result.stages or number > 1:
                console.say(f"{how} (and what is to be changed)")
            raise ConfigError(at_stage(name, str(error))) from error
        except Exception:
            console.say(f"Stage {name} failed. {how}")
            raise
        result.stages[name], result.status, result.error = stage, stage.status, stage.error
        record.end(RUNNING)
        if result.interrupted:
            return


class _Record:
    """``pipeline.yaml`` and ``summary.json`` of one session of a pipeline.

    A resumed one begins when its first stage does, so that options that a stage refuses leave the pipeline as it was.
    """

    def __init__(self, root: Path, pipeline: Pipeline) -> None:
        self.root, self.pipeline = root, pipeline
        self.begun = False

    def begin(self) -> None:
        """Save what is asked for, after keeping what was asked for before."""
        if self.begun:
            return
        self.begun = True
        path, text = self.root / PIPELINE_CONFIG, layers_to_yaml(self.pipeline.written)
        before = path.read_text(encoding="utf-8") if path.is_file() else text
        if before != text:
            number = len(list((self.root / "history").glob("pipeline-*.yaml"))) + 1
            write_atomically(self.root / "history" / f"pipeline-{number}.yaml", before)
        write_atomically(path, text)
        self.end(RUNNING)

    def end(self, status: str, error: str | None = None) -> None:
        """Write the summary of a session that has begun."""
        if self.begun:
            write_pipeline_summary(self.root, self.pipeline.stages, status=status, error=error)


def _check_sources(pipeline: Pipeline) -> None:
    """That the files of all stages are there, before the first of them runs for hours."""
    _check_each(pipeline.stages, check_sources)


def _check_precision(pipeline: Pipeline, devices: DeviceSpec, root: Path | None) -> None:
    """That the devices can compute in the precision of all stages that are still to run."""
    todo = {
        name: config
        for name, config in pipeline.stages.items()
        if root is None or not is_done(RunFolder(root / name), config.trainer.max_steps)
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
    if not is_done(folder, config.trainer.max_steps):
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

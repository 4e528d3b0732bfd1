"""Pipelines: run stages one after another, each in its own folder, and resume interrupted pipelines.

``<output_root>/<name>/<tag>@<time>/`` holds ``pipeline.yaml`` (the requested stages) and one run folder per stage. A
stage is done if its ``summary.json`` says so. A stage with a checkpoint is resumed; any other stage starts at step 0.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from scoredist3d.config.experiment import ExperimentConfig
from scoredist3d.config.fields import ConfigError
from scoredist3d.config.loader import STAGES, merge
from scoredist3d.config.pipeline import Pipeline, at_stage, source_stage
from scoredist3d.config.resume import resumed_stages
from scoredist3d.config.validation import dump, layers_to_yaml, load_experiment, load_plain
from scoredist3d.files import make_folder, read_text, write_atomically
from scoredist3d.paths import command_name
from scoredist3d.prompts.wording import check_prompts
from scoredist3d.reasons import ExplainedError, reason
from scoredist3d.training.announcement import shell_path
from scoredist3d.training.checks import check_changes, check_sources
from scoredist3d.training.console import Console
from scoredist3d.training.distributed import DeviceSpec
from scoredist3d.training.failures import explaining
from scoredist3d.training.folder import PIPELINE_CONFIG, RunFolder, slug, stages_begun
from scoredist3d.training.lock import LOCK, locked, tidy
from scoredist3d.training.precision import check_precision
from scoredist3d.training.run import RunResult, run_training
from scoredist3d.training.summary import (
    DONE,
    FAILED,
    INTERRUPTED,
    RUNNING,
    finished_steps,
    is_done,
    write_pipeline_summary,
)


@dataclass
class PipelineResult:
    """Outcome of a pipeline.

    Attributes:
        folder: Folder of the pipeline.
        stages: Result of each stage that ran in this session, by stage name.
        status: Status of the first stage without one of its products, else of the last stage that ran; see
            :class:`scoredist3d.training.run.RunResult`.
        error: Reason for a status other than ``done``.
        signal: Number of the signal that interrupted the pipeline, or None.
    """

    folder: Path
    stages: dict[str, RunResult] = field(default_factory=dict)
    status: str = DONE
    error: str | None = None
    signal: int | None = None

    @property
    def interrupted(self) -> bool:
        """Whether a signal stopped a stage; its checkpoint is saved."""
        return self.status == INTERRUPTED


def run_pipeline(
    pipeline: Pipeline,
    *,
    devices: DeviceSpec = "auto",
    resume: Path | str | None = None,
    output: Path | str | None = None,
    allow_change: Collection[str] = (),
    console: Console | None = None,
) -> PipelineResult:
    """Train the stages in order and export the object of the last one.

    Args:
        pipeline: Validated configs of the stages.
        devices: As in :func:`scoredist3d.training.run.run_training`.
        resume: Folder of an earlier pipeline to continue; for the schedules of resumed stages see
            :func:`scoredist3d.config.resume.resumed_stages`.
        output: Folder to use instead of ``<output_root>/<name>/<tag>@<time>``.
        allow_change: Keys that a resumed pipeline may change, as in :func:`scoredist3d.training.run.run_training`;
            ``stages.NAME.KEY`` applies to one stage.
        console: Prints progress and messages.

    Raises:
        ValueError, NonFiniteError, OutOfMemoryError, DiskFullError, KeyboardInterrupt: As in a single run; the results
            of finished stages are kept.
    """
    console = console or Console()
    _check_sources(pipeline)
    check_prompts(pipeline.stages.values())
    _check_precision(pipeline, devices, None if resume is None else Path(resume))
    root = _root(pipeline.first, resume, output)
    with locked(root):
        return _run_locked(pipeline, root, resume is not None, devices, allow_change, console)


def _run_locked(
    pipeline: Pipeline,
    root: Path,
    resumed: bool,
    devices: DeviceSpec,
    allow_change: Collection[str],
    console: Console,
) -> PipelineResult:
    """Run the pipeline in the folder ``root``, whose lock is held, and record its outcome."""
    if resumed:
        _check_changes(pipeline, root, allow_change)
    result = PipelineResult(root)
    record = _Record(root, pipeline)
    if not resumed:
        record.begin()

    def continuing(condition: str, overrides: str) -> str:
        after = f" {condition}" if condition else ""
        command = f"{command_name()} --train --resume {shell_path(root)} {overrides}".rstrip()
        return f"To continue{after}: {command}"

    try:
        with explaining(pipeline.first, continuing):
            _run_stages(pipeline, result, record, devices, allow_change, console)
            if not result.interrupted:
                record.begin()
            record.end(result.status, result.error)
    except KeyboardInterrupt:
        record.end(INTERRUPTED, "stopped by a signal, outside training")
        raise
    except Exception as error:
        with suppress(OSError):  # A full disk must not hide the error.
            record.end(FAILED, reason(error))
        raise
    return result


def _run_stages(
    pipeline: Pipeline,
    result: PipelineResult,
    record: _Record,
    devices: DeviceSpec,
    allow_change: Collection[str],
    console: Console,
) -> None:
    """Run the stages that are not done and record their results; the last of them sets the pipeline's status."""
    root, names = result.folder, list(pipeline.stages)
    resumed = resumed_stages(pipeline, stages_begun(root))
    how = f"To continue the pipeline: {command_name()} --train --resume {root}"
    for number, (name, fresh) in enumerate(pipeline.stages.items(), start=1):
        folder, source = RunFolder(root / name), source_stage(fresh)
        restart = source in result.stages and folder.root.exists()
        written = pipeline.written[STAGES][name] if restart else resumed[name]
        config = fresh if written is pipeline.written[STAGES][name] else load_plain(written)
        if source is not None:
            config.system.init_from = str(root / source)  # type: ignore[attr-defined]
            written = merge(written, {"system": {"init_from": str(root / source)}})
        if not restart and source not in result.stages and _is_done(folder, config, name, last=name == names[-1]):
            tidy(folder.root)
            console.say(f"Stage {number} of {len(names)}, {name}: already done, in {folder.root}")
            continue
        console.say(f"Stage {number} of {len(names)}, {name}:")
        if restart:
            console.say(
                f"Stage {source} has changed, so stage {name} starts again; its earlier results are in "
                f"{_set_aside(folder.root)}"
            )
        try:
            stage = run_training(
                config,
                devices=devices,
                resume=None if folder.newest_checkpoint is None else folder.root,
                output=folder.root,
                source=layers_to_yaml(written),
                final=name == names[-1],
                resume_from=root,
                begun=record.begin,
                allow_change=_of_stage(allow_change, name),
                console=console,
            )
        except ConfigError as error:
            if result.stages or number > 1:
                console.say(f"{how} (with the corrected options)")
            raise ConfigError(at_stage(name, error.full)) from error
        except ExplainedError:
            raise
        except Exception:
            console.say(f"Stage {name} failed. {how}")
            raise
        result.stages[name], result.signal = stage, stage.signal
        if stage.interrupted or result.error is None:  # The first product that failed decides the status.
            result.status, result.error = stage.status, stage.error
        record.end(RUNNING)
        if result.interrupted:
            return


class _Record:
    """Writes ``pipeline.yaml`` and ``summary.json`` of one session of a pipeline.

    A resumed session is recorded only once its first stage begins, so options that this stage rejects leave the files
    unchanged.
    """

    def __init__(self, root: Path, pipeline: Pipeline) -> None:
        self.root, self.pipeline = root, pipeline
        self.begun = False

    def begin(self) -> None:
        """Write ``pipeline.yaml`` and keep a version that differs in ``history/``; later calls do nothing."""
        if self.begun:
            return
        self.begun = True
        path, text = self.root / PIPELINE_CONFIG, layers_to_yaml(self.pipeline.written)
        before = read_text(path) if path.is_file() else text
        if before != text:
            number = len(list((self.root / "history").glob("pipeline-*.yaml"))) + 1
            write_atomically(self.root / "history" / f"pipeline-{number}.yaml", before)
        write_atomically(path, text)
        self.end(RUNNING)

    def end(self, status: str, error: str | None = None) -> None:
        """Write the summary if the session has begun."""
        if self.begun:
            write_pipeline_summary(self.root, self.pipeline.stages, status=status, error=error)


def _check_sources(pipeline: Pipeline) -> None:
    """Check that the input files of all stages exist, before the first stage, which may take hours, starts."""
    _check_each(pipeline.stages, lambda _, config: check_sources(config))


def _check_precision(pipeline: Pipeline, devices: DeviceSpec, root: Path | None) -> None:
    """Check that the devices support the precision of all stages that are not done."""
    todo = {
        name: config
        for name, config in pipeline.stages.items()
        if root is None or not is_done(RunFolder(root / name), config.trainer.max_steps)
    }
    _check_each(todo, lambda _, config: check_precision(config, devices))


def _check_changes(pipeline: Pipeline, root: Path, allow_change: Collection[str]) -> None:
    """Check that all stages that have begun keep their seeds, prompts and finished steps, before one of them runs."""
    begun = stages_begun(root)

    def check(name: str, config: ExperimentConfig) -> None:
        folder = RunFolder(root / name)
        check_changes(config, folder, finished_steps(folder), _of_stage(allow_change, name))

    _check_each({name: config for name, config in pipeline.stages.items() if name in begun}, check)


def _of_stage(keys: Collection[str], name: str) -> list[str]:
    """The keys of ``--allow-change`` as they are named in one stage."""
    return [key.removeprefix(f"{STAGES}.{name}.") for key in keys]


def _check_each(stages: Mapping[str, ExperimentConfig], check: Callable[[str, ExperimentConfig], None]) -> None:
    problems = []
    for name, config in stages.items():
        try:
            check(name, config)
        except ConfigError as error:
            problems.append(at_stage(name, error.full))
    if problems:
        raise ConfigError("\n".join(problems))


def _set_aside(folder: Path) -> Path:
    """Rename a stage's folder to an unused name and return it."""
    for number in range(1, 1000):
        aside = folder.with_name(f"{folder.name}-before-{number}")
        if not aside.exists():
            with locked(folder):  # Another process may export this stage.
                folder.rename(aside)
                (aside / LOCK).unlink(missing_ok=True)
            return aside
    raise ValueError(f"{folder} and 999 earlier folders of this stage exist; remove some of them")


def _root(first: ExperimentConfig, resume: Path | str | None, output: Path | str | None) -> Path:
    if resume is not None:
        return Path(resume)
    if output is not None:
        make_folder(Path(output))
        return Path(output)
    return RunFolder.create(first.output_root, first.name, first.tag or slug(first.prompt)).root


def _is_done(folder: RunFolder, config: ExperimentConfig, name: str, *, last: bool) -> bool:
    """Whether the stage is done with the same options and at least the requested number of steps.

    Raises:
        ConfigError: The stage is done, but with other options.
    """
    if not is_done(folder, config.trainer.max_steps, needs_products=last):
        return False
    then = load_experiment([folder.resolved_config])
    if hasattr(then.system, "init_from"):
        then.system.init_from = config.system.init_from  # type: ignore[attr-defined]  # The folder may have been moved.
    if dump(then.system) != dump(config.system) or then.prompt != config.prompt:
        raise ConfigError(
            f"{STAGES}.{name}: this stage is already done with other options (in {folder.root}); rename or remove that "
            "folder to run the stage again, or restore its options"
        )
    return True

"""The four things a run can do: train, validate, test, export. The command line and notebooks call these.

``devices`` is ``"auto"`` (first GPU, else CPU), ``"cpu"``, ``"cpu:2"`` (two processes, for trying out distributed runs)
or a list of GPU numbers. Training uses all of them, everything else the first.
"""

from __future__ import annotations

import logging
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from scoredist3d.config.experiment import ExperimentConfig
from scoredist3d.config.fields import ConfigError
from scoredist3d.config.pipeline import source_stage
from scoredist3d.config.validation import missing_files, to_yaml
from scoredist3d.custom import loaded_folders
from scoredist3d.files import write_json
from scoredist3d.paths import command_name
from scoredist3d.systems.base import System
from scoredist3d.training.checkpoint import load_weights, read_checkpoint
from scoredist3d.training.console import Console, StageClock, peak_memory_gib
from scoredist3d.training.distributed import Devices, DeviceSpec, Workers
from scoredist3d.training.fit import Place, begin, build_system, fit, import_lightning, start_of
from scoredist3d.training.folder import SUMMARY, RunFolder, find_run, slug
from scoredist3d.training.interrupt import InterruptGuard
from scoredist3d.training.outputs import export_objects, latest_preview, save_preview, write_video
from scoredist3d.training.snapshot import save_snapshot


@dataclass
class RunResult:
    """What came out of a run.

    Attributes:
        folder: The run's folder.
        step: Optimiser steps of the state that was used.
        paths: What it is -> where it is, for everything written.
        seconds: Stage -> wall time.
        interrupted: Training was stopped by a signal; the checkpoint is saved.
        system: The system in its final state, on its device.
    """

    folder: Path
    step: int = 0
    paths: dict[str, Path] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    interrupted: bool = False
    system: System | None = None


def run_training(
    config: ExperimentConfig,
    *,
    devices: DeviceSpec = "auto",
    resume: Path | str | None = None,
    output: Path | str | None = None,
    source: str | None = None,
    export: bool = True,
    resume_from: Path | None = None,
    console: Console | None = None,
) -> RunResult:
    """Optimise, then write the final video and export the object.

    Args:
        config: The validated run.
        devices: See the module.
        resume: Run folder or checkpoint to continue in place, to ``trainer.max_steps`` of ``config``.
        output: Folder to use in place of ``<output_root>/<name>/<tag>@<time>``.
        source: The config as it was written, interpolations kept; saved as ``configs/config.yaml`` for resuming.
        export: Write the object's files at the end; a stage that another one follows need not.
        resume_from: What to tell the user to resume after an interrupt, where it is not this run's folder.
        console: Where to print.

    Raises:
        ValueError: A mistake in the config, the devices or the checkpoint.
        NonFiniteError: The optimisation diverged; nothing non-finite has been saved.
        KeyboardInterrupt: Interrupted outside of the optimisation, after saying how to go on.
    """
    console, clock = console or Console(), StageClock()
    place = Place(Devices.parse(devices))
    check_precision(config, devices)
    found = find_run(resume) if resume is not None else None
    if found is None:
        check_sources(config)
    folder = _folder(config, output) if found is None else found[0]
    checkpoint = found[1] if found else None
    with InterruptGuard(console.say) as guard, _log_to(console):
        try:
            with clock.stage("start-up"):
                _announce(config, place.devices, folder, checkpoint, console)
                slow = slow_prior_warning(config, place.devices)
                if slow is not None:
                    console.say(f"warning: {slow}")
                save_snapshot(folder, to_yaml(config), source, sys.argv, loaded_folders())
            with Workers(place.devices, folder.root, checkpoint, console.say) as workers:
                with clock.stage("start-up"):
                    import_lightning()
                    place = Place(place.devices, port=workers.port)
                    system = _new_system(config, place, folder, resumed=checkpoint is not None)
                guard.graceful = True
                with clock.stage("training"):
                    outcome = fit(system, config, folder, place, console, guard, resume=checkpoint)
                guard.graceful = False
            result = RunResult(folder.root, outcome.step, seconds=clock.seconds, system=system)
            if outcome.interrupted:
                result.interrupted = True
                how = f"To go on: {command_name()} --train --resume {resume_from or folder.root}"
                console.say(f"Stopped at step {outcome.step} of {config.trainer.max_steps}. {how}")
                return result
            system.to_device(torch.device(place.devices.first))
            _finish(system, config, folder, result, console, clock, export=export)
        except KeyboardInterrupt:
            console.say(_after_interrupt(folder, resume_from))
            raise
    _close(result, folder, console, clock)
    return result


def check_sources(config: ExperimentConfig) -> None:
    """That what a new run reads is there, before anything is made or written.

    Raises:
        ConfigError: A file or a run that the config names does not exist; one line each.
    """
    problems = missing_files(config)
    start = start_of(config)
    if start is not None and source_stage(config) is None:
        try:
            find_run(start)
        except ValueError as error:
            problems.append(f"system.init_from: {error}")
    if problems:
        raise ConfigError("\n".join(problems))


def run_validation(
    config: ExperimentConfig, checkpoint: Path | str, *, devices: DeviceSpec = "auto", console: Console | None = None
) -> RunResult:
    """Render the preview views of a trained run: ``images/validation-<step>.png``."""
    with _evaluation(config, checkpoint, devices, console, "validate") as (system, folder, result, console, clock):
        with clock.stage("images"):
            path = save_preview(system, config.preview, folder, result.step, prefix="validation")
        result.paths["image grid"] = path
    return result


def run_test(
    config: ExperimentConfig, checkpoint: Path | str, *, devices: DeviceSpec = "auto", console: Console | None = None
) -> RunResult:
    """Write the final video of a trained run."""
    with _evaluation(config, checkpoint, devices, console, "test") as (system, folder, result, console, clock):
        _video(system, config, folder, result, console, clock)
    return result


def run_export(
    config: ExperimentConfig, checkpoint: Path | str, *, devices: DeviceSpec = "auto", console: Console | None = None
) -> RunResult:
    """Export the object of a trained run."""
    with _evaluation(config, checkpoint, devices, console, "export") as (system, folder, result, console, clock):
        _export(system, config, folder, result, console, clock)
    return result


@contextmanager
def _evaluation(
    config: ExperimentConfig, checkpoint: Path | str, devices: DeviceSpec, console: Console | None, what: str
) -> Iterator[tuple[System, RunFolder, RunResult, Console, StageClock]]:
    """Load a trained system, hand it over, and close with the list of what was written."""
    console, clock = console or Console(), StageClock()
    where = Devices.parse(devices)
    where = Devices(where.kind, where.indices[:1])
    folder, path = find_run(checkpoint)
    with _log_to(console):
        console.say(f"{what} {path} ({where.describe()})")
        with clock.stage("start-up"):
            state = read_checkpoint(path)
            system = build_system(config, Place(where))
            load_weights(system, state["state_dict"])
            system.to_device(torch.device(where.first))
            system.restore_step(state["global_step"])
        result = RunResult(folder.root, state["global_step"], seconds=clock.seconds, system=system)
        yield system, folder, result, console, clock
    for name, path in result.paths.items():
        console.say(f"  {name:<16} {path}")
    console.say(f"  {'time':<16} {clock.summary()}")


def _finish(
    system: System,
    config: ExperimentConfig,
    folder: RunFolder,
    result: RunResult,
    console: Console,
    clock: StageClock,
    *,
    export: bool,
) -> None:
    """Video and export after training; an empty scene loses its mesh, not the rest."""
    _video(system, config, folder, result, console, clock)
    grid = latest_preview(folder)
    if grid is not None:
        result.paths["image grid"] = grid
    if not export or not system.shapes():
        return
    try:
        _export(system, config, folder, result, console, clock)
    except ValueError as error:
        console.say(f"warning: no mesh was written: {error}")


def _video(
    system: System, config: ExperimentConfig, folder: RunFolder, result: RunResult, console: Console, clock: StageClock
) -> None:
    def progress(fraction: float) -> None:
        if console.due():
            console.progress(f"{system.video_name}: {fraction:.0%}")

    with clock.stage(system.video_name):
        path, remark = write_video(system, config, folder, progress)
    result.paths[system.video_name] = path
    if remark:
        console.say(remark)


def _export(
    system: System, config: ExperimentConfig, folder: RunFolder, result: RunResult, console: Console, clock: StageClock
) -> None:
    def progress(stage: str, fraction: float) -> None:
        if console.due():
            console.progress(f"export: {stage} {fraction:.0%}")

    with clock.stage("export"):
        objects = export_objects(system, config, folder, progress)
    names = {".png": "texture", ".mtl": "material"}
    for number, exported in enumerate(objects, start=1):
        label, ending = ("", "") if number == 1 else (f" {number}", f"-{number}")
        own = min((path.stem for path in exported.paths), key=len)
        for path in exported.paths:
            channel = path.stem.removeprefix(own).strip("-")
            kind = names.get(path.suffix, path.suffix.removeprefix("."))
            result.paths[f"{channel} {kind}".strip() + label] = path
        report = write_json(folder.export / f"report{ending}.json", exported.report.to_dict())
        result.paths[f"mesh report{label}"] = report
        console.say(exported.report.describe())


def _new_system(config: ExperimentConfig, place: Place, folder: RunFolder, *, resumed: bool) -> System:
    """The system before its first step; a run that cannot begin leaves no folder behind.

    Raises:
        ConfigError: Something about the config that only building it could show.
    """
    try:
        system = build_system(config, place)
        begin(system, config, place, resumed=resumed)
    except ValueError as error:
        if not resumed:
            for made in (folder.configs, folder.code):
                shutil.rmtree(made, ignore_errors=True)
            with suppress(OSError):
                folder.root.rmdir()  # stays where anything else is in it
        raise ConfigError(str(error)) from error
    return system


def _folder(config: ExperimentConfig, output: Path | str | None) -> RunFolder:
    if output is not None:
        Path(output).mkdir(parents=True, exist_ok=True)
        return RunFolder(Path(output))
    return RunFolder.create(config.output_root, config.name, config.tag or slug(config.prompt))


def check_precision(config: ExperimentConfig, devices: DeviceSpec) -> None:
    """That the devices can compute in ``trainer.precision``.

    Raises:
        ConfigError: Mixed precision on a CPU.
    """
    precision = config.trainer.precision
    if Devices.parse(devices).kind != "cpu" or precision == "32-true":
        return
    problem = (
        "computes in float16, which is slower than float32 on a CPU and overflows above 65504"
        if precision == "16-mixed"
        else "computes in bfloat16, which is many times slower than float32 on most CPUs"
    )
    raise ConfigError(
        f"trainer.precision: {precision} {problem}. Add trainer.precision=32-true to the command, or choose a GPU with "
        "--gpu 0."
    )


def slow_prior_warning(config: ExperimentConfig, devices: Devices) -> str | None:
    """What to say about a prior in half precision on a CPU, which works and saves memory; None about any other."""
    precision = getattr(config.prior, "precision", None)
    if devices.kind != "cpu" or precision not in ("fp16", "bf16"):
        return None
    return (
        f"prior.precision: {precision} halves the memory of the prior, but is many times slower than fp32 on most "
        "CPUs; add prior.precision=fp32 to the command if the prior fits into memory in it."
    )


def _announce(
    config: ExperimentConfig, devices: Devices, folder: RunFolder, resume: Path | None, console: Console
) -> None:
    system = config.system
    parts = [getattr(system, name, None) for name in ("geometry", "material", "background", "renderer")]
    source = getattr(config.prior, "pretrained_model_name_or_path", None)
    lines = {
        "prompt": f'"{config.prompt}"' + (f', not "{config.negative_prompt}"' if config.negative_prompt else ""),
        "prior": config.prior.type + (f" ({source})" if source else ""),
        "guidance": _methods(system),
        "representation": f"{system.type}: {', '.join(part.type for part in parts if part is not None)}",
        "steps": f"{config.trainer.max_steps}, seed {config.seed}, precision {config.trainer.precision}",
        "device": devices.describe(),
        "output": f"{folder.root}",
    }
    if resume is not None:
        lines["resume"] = str(resume)
    for name, text in lines.items():
        console.say(f"{name:<16} {text}")


def _methods(system: Any) -> str:
    """The distillation methods of a run: one, or those of a comparison."""
    return system.guidance.type if hasattr(system, "guidance") else ", ".join(system.chosen)


def _close(result: RunResult, folder: RunFolder, console: Console, clock: StageClock) -> None:
    result.paths |= {
        "metrics": folder.metrics,
        "tensorboard": folder.tensorboard,
        "config": folder.resolved_config,
        "code snapshot": folder.code,
        "checkpoint": folder.last_checkpoint,
    }
    result.paths = {name: path for name, path in result.paths.items() if path.exists()}
    summary = {"step": result.step, "seconds": clock.seconds, "peak_memory_gib": round(peak_memory_gib(), 3)}
    result.paths["summary"] = write_json(folder.root / SUMMARY, summary)
    console.say("Done:")
    for name, path in result.paths.items():
        console.say(f"  {name:<16} {path}")
    console.say(f"  {'time':<16} {clock.summary()}")


def _after_interrupt(folder: RunFolder, resume_from: Path | None) -> str:
    if folder.last_checkpoint.is_file():
        how = f"To go on: {command_name()} --train --resume {resume_from or folder.root}"
        return f"Stopped; the last checkpoint is {folder.last_checkpoint}. {how}"
    return "Stopped before the first checkpoint; nothing to resume."


class _ConsoleHandler(logging.Handler):
    """Log records of this package as sentences on the console."""

    def __init__(self, console: Console) -> None:
        super().__init__(logging.INFO)
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        prefix = "warning: " if record.levelno >= logging.WARNING else ""
        self.console.say(prefix + record.getMessage())


@contextmanager
def _log_to(console: Console) -> Iterator[None]:
    logger, handler = logging.getLogger("scoredist3d"), _ConsoleHandler(console)
    level, propagate = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate

"""Entry points of a run: train, validate, test and export; called by the command line and by notebooks.

``devices`` is ``"auto"`` (first GPU, else CPU), ``"cpu"``, ``"cpu:2"`` (two processes, to try distributed training) or
a list of GPU numbers. Training uses all of them; validation, test and export use only the first.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch

from scoredist3d.config.experiment import ExperimentConfig
from scoredist3d.config.fields import ConfigError
from scoredist3d.config.validation import to_yaml
from scoredist3d.files import make_folder
from scoredist3d.reasons import part, reason
from scoredist3d.systems.base import System
from scoredist3d.training.announcement import after_failure, after_interrupt, announce, how_to_resume
from scoredist3d.training.checkpoint import load_weights, read_trained
from scoredist3d.training.checks import check_new, check_resume
from scoredist3d.training.console import Console, StageClock, log_to
from scoredist3d.training.distributed import Devices, DeviceSpec, Workers
from scoredist3d.training.failures import explaining
from scoredist3d.training.fit import RankContext, begin, build_system, fit, import_lightning
from scoredist3d.training.folder import RunFolder, find_run, slug
from scoredist3d.training.interrupt import InterruptGuard
from scoredist3d.training.lock import locked, locked_stage
from scoredist3d.training.outputs import VALIDATION, save_preview, set_results_aside
from scoredist3d.training.precision import check_precision, slow_prior_warning
from scoredist3d.training.products import ProductWriter
from scoredist3d.training.session import Session
from scoredist3d.training.slurm import requeue_job
from scoredist3d.training.summary import DONE, FAILED, IMAGES, INTERRUPTED, MESH, VIDEO, add_files, outcome, settle


@dataclass
class RunResult:
    """Outcome of a run.

    Attributes:
        folder: Folder of the run.
        step: Number of optimizer steps of the state that was trained or evaluated.
        paths: All files and folders that were written, by label.
        seconds: Wall time of each stage, such as start-up, training or export.
        status: ``done``; ``interrupted`` (by a signal; a checkpoint is saved); or ``no mesh``, ``no video`` or
            ``no images`` (this product failed, the mesh being named first; everything else is complete).
        error: Reason for a status other than ``done``.
        signal: Number of the signal that interrupted the run, or None.
        products: Mapping from each product (``mesh``, ``video``, ``images``) to the reason why it failed; None if it
            was written.
        system: The system in its final state, on its device.
    """

    folder: Path
    step: int = 0
    paths: dict[str, Path] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    status: str = DONE
    error: str | None = None
    signal: int | None = None
    products: dict[str, str | None] = field(default_factory=dict)
    system: System | None = None

    @property
    def interrupted(self) -> bool:
        """Whether a signal stopped training."""
        return self.status == INTERRUPTED


def run_training(
    config: ExperimentConfig,
    *,
    devices: DeviceSpec = "auto",
    resume: Path | str | None = None,
    output: Path | str | None = None,
    source: str | None = None,
    final: bool = True,
    resume_from: Path | None = None,
    begun: Callable[[], None] | None = None,
    allow_change: Collection[str] = (),
    console: Console | None = None,
) -> RunResult:
    """Train, then export the object and write the final video.

    Args:
        config: Validated config of the run.
        devices: Devices of the run; the module docstring lists the accepted forms.
        resume: Run folder or checkpoint to continue in place, up to ``trainer.max_steps`` of ``config``;
            :func:`scoredist3d.config.resume.load_resumed` loads a config whose schedules continue.
        output: Folder to use instead of ``<output_root>/<name>/<tag>@<time>``.
        source: The config as written, with interpolations; saved as ``configs/config.yaml`` for resuming.
        final: Whether no stage follows; otherwise no object is exported, and ``test.enabled=auto`` means no video.
        resume_from: Folder of the pipeline to which the run belongs, whose lock the caller holds.
        begun: Called once the folder exists and the checkpoint, if any, has been loaded.
        allow_change: Keys of :data:`scoredist3d.config.resume.GUARDED_KEYS` that a resumed run may change.
        console: Prints progress and messages.

    Returns:
        The result; its ``status``, ``error`` and ``products`` report a mesh or video that could not be written.

    Raises:
        ValueError: The config, the devices or the checkpoint cannot be used, or another process uses the folder.
        RankLostError: A process of a run on several devices has ended early.
        NonFiniteError: Training diverged; no non-finite state has been saved.
        OutOfMemoryError: The memory of the computer or of a GPU is full; the last checkpoint is kept.
        DiskFullError: A disk is full; the last checkpoint is kept.
        KeyboardInterrupt: The run was interrupted outside training; the console shows how to continue.
    """
    console, clock, context = console or Console(), StageClock(), RankContext(Devices.parse(devices))
    check_precision(config, devices)
    found = find_run(resume) if resume is not None else None
    if found is None:
        check_new(config)
    folder = _folder(config, output) if found is None else found[0]
    with log_to(console), (locked if resume_from else locked_stage)(folder.root):
        done = 0 if found is None else check_resume(config, *found, allow_change)
        session = Session(folder, config, clock, source=source, step=done, begun=begun)
        start = found[1] if found else None
        result, products = _train(session, context, console, start, final=final, resume_from=resume_from)
        if products is not None:
            with _explaining(session, resume_from):
                _close(result, products, session, resume_from, console)
    return result


def _explaining(session: Session, resume_from: Path | None) -> AbstractContextManager[None]:
    """Context manager that completes the messages of errors about memory, disks and non-finite values."""
    stage = None if resume_from is None else session.folder.root.name

    def continuing(condition: str, overrides: str) -> str:
        return after_failure(session.folder, resume_from, condition, overrides)

    return explaining(session.config, continuing, stage)


def _train(
    session: Session,
    context: RankContext,
    console: Console,
    checkpoint: Path | None,
    *,
    final: bool,
    resume_from: Path | None,
) -> tuple[RunResult, ProductWriter | None]:
    """Run the session up to its products, None after an interrupt; an interrupt or an error is recorded."""
    with InterruptGuard(console.say, session.config.trainer.grace_seconds) as guard:
        guard.on_save_outside_training = lambda: console.say(requeue_job() or "SIGUSR1: there is nothing new to save")
        guard.before_forced_end = lambda: _end_at_once(session, guard)
        try:
            with _explaining(session, resume_from):
                result = _optimize(session, context, console, guard, checkpoint)
                products = None if result.interrupted else _finish(result, session, console, final=final)
        except KeyboardInterrupt:
            session.end(INTERRUPTED, f"stopped by {_name_of(guard.received)}, outside training")
            console.say(after_interrupt(session.folder, resume_from))
            raise
        except Exception as error:
            with suppress(OSError):  # A full disk must not hide the error.
                session.end(FAILED, reason(error))
            raise
        if products is None:
            session.end(INTERRUPTED, result.error, step=result.step)
            console.say(f"{result.error}. {how_to_resume(session.folder, resume_from)}")
    return result, products


def _end_at_once(session: Session, guard: InterruptGuard, workers: Workers | None = None) -> None:
    if workers is not None:
        workers.kill()
    session.end(INTERRUPTED, f"stopped at once after {_name_of(guard.received)}")


def run_validation(
    config: ExperimentConfig, checkpoint: Path | str, *, devices: DeviceSpec = "auto", console: Console | None = None
) -> RunResult:
    """Render the preview grid of a trained run and save it as ``images/validation-<step>.png``."""
    with _evaluation(config, checkpoint, devices, console, "validate") as (result, products):
        with products.clock.stage("images"):
            path = save_preview(products.system, config.preview, products.folder, result.step, prefix=VALIDATION)
        result.paths["image grid"] = path
        settle(products.folder, result.step, IMAGES, None)
    return result


def run_test(
    config: ExperimentConfig, checkpoint: Path | str, *, devices: DeviceSpec = "auto", console: Console | None = None
) -> RunResult:
    """Write the final video of a trained run."""
    with _evaluation(config, checkpoint, devices, console, "test") as (result, products):
        products.video()
        add_files(products.folder, products.folder.videos, result.paths)
        settle(products.folder, result.step, VIDEO, None)
    return result


def run_export(
    config: ExperimentConfig, checkpoint: Path | str, *, devices: DeviceSpec = "auto", console: Console | None = None
) -> RunResult:
    """Export the objects of a trained run.

    If only some objects can be exported, ``status`` and ``error`` of the result say so.

    Raises:
        ValueError: No object could be exported; the files of an earlier export are unchanged.
    """
    with _evaluation(config, checkpoint, devices, console, "export") as (result, products):
        products.mesh()
        result.status, result.error = outcome(products.problems)
        add_files(products.folder, products.folder.export, result.paths)
        settle(products.folder, result.step, MESH, result.error)
    return result


@contextmanager
def _evaluation(
    config: ExperimentConfig, checkpoint: Path | str, devices: DeviceSpec, console: Console | None, what: str
) -> Iterator[tuple[RunResult, ProductWriter]]:
    """Context manager that provides a trained system and prints the list of written files at the end.

    A stop signal ends it at once, at the latest after ``trainer.grace_seconds`` if the main thread cannot react.
    """
    console, clock = console or Console(), StageClock()
    where = Devices.parse(devices)
    where = Devices(where.kind, where.indices[:1])
    folder, path = find_run(checkpoint)
    guard = InterruptGuard(console.say, config.trainer.grace_seconds, "the earlier files of the run are intact")
    with guard, log_to(console), locked(folder.root):
        console.say(f"{what} {path} ({where.describe()})")
        with explaining(config):
            with clock.stage("start-up"), part("the start-up"):
                state = read_trained(path)
                system = build_system(config, RankContext(where))
                load_weights(system, state.weights)
                system.to_device(torch.device(where.first))
                system.restore_step(state.step)
            products = ProductWriter(system, config, folder, console, clock, state.step)
            result = RunResult(folder.root, products.step, products.paths, clock.seconds, system=system)
            result.products = products.problems
            yield result, products
    _list(result, console, clock)
    if result.error is not None:
        console.say(f"error: {result.error}")


def _announce(session: Session, devices: Devices, console: Console, checkpoint: Path | None) -> None:
    """Print the settings of a run and begin its session, unless a checkpoint has to be loaded first."""
    with session.clock.stage("start-up"):
        announce(session.config, devices, session.folder, checkpoint, session.step, console)
        slow = slow_prior_warning(session.config, devices)
        if slow is not None:
            console.say(f"warning: {slow}")
        if checkpoint is None:
            session.begin()


def _optimize(
    session: Session, context: RankContext, console: Console, guard: InterruptGuard, checkpoint: Path | None
) -> RunResult:
    """Build and train the system; when training is complete, the system is on the first device."""
    config, folder, clock = session.config, session.folder, session.clock
    _announce(session, context.devices, console, checkpoint)

    def lost(message: str) -> None:
        session.end(INTERRUPTED if guard.requested else FAILED, message)
        console.say(f"error: {message}")

    def restored() -> None:
        session.begin()
        if checkpoint is not None and session.step < config.trainer.max_steps:
            for message in set_results_aside(folder, session.step):
                console.say(message)

    with Workers(context.devices, folder.root, to_yaml(config), checkpoint, guard, lost, console.say) as workers:
        guard.before_forced_end = lambda: _end_at_once(session, guard, workers)
        with clock.stage("start-up"):
            import_lightning()
            context = RankContext(context.devices, port=workers.port)
            system = _new_system(session, context, resumed=checkpoint is not None)
        guard.graceful = True
        with clock.stage("training"):
            step = fit(system, config, folder, context, console, guard, resume=checkpoint, restored=restored)
        guard.graceful = False
    result = RunResult(folder.root, step, seconds=clock.seconds, system=system)
    if guard.requested:  # perhaps after the last step
        clock.status["training"] = result.status = INTERRUPTED
        result.error = f"Stopped at step {step} of {config.trainer.max_steps}"
        result.signal = guard.received
    else:
        system.to_device(torch.device(context.devices.first))
    return result


def _new_system(session: Session, context: RankContext, *, resumed: bool) -> System:
    """Build and initialize the system; if that fails, the folder of a new run is removed.

    Raises:
        ConfigError: The config has a mistake that only building the system reveals.
    """
    try:
        with part("the start-up"):
            system = build_system(session.config, context)
            begin(system, session.config, context, resumed=resumed)
    except ValueError as error:
        session.discard()
        raise ConfigError(str(error)) from error
    return system


def _finish(result: RunResult, session: Session, console: Console, *, final: bool) -> ProductWriter:
    """Write the products of a trained run; a product that fails is recorded in the result."""
    config, system = session.config, result.system
    assert system is not None
    products = ProductWriter(system, config, session.folder, console, session.clock, result.step)
    products.write_all(mesh=final, video=final if config.test.enabled == "auto" else config.test.enabled)
    result.paths |= products.paths
    result.products = products.problems
    result.status, result.error = outcome(products.problems)
    return products


def _folder(config: ExperimentConfig, output: Path | str | None) -> RunFolder:
    if output is not None:
        make_folder(Path(output))
        return RunFolder(Path(output))
    return RunFolder.create(config.output_root, config.name, config.tag or slug(config.prompt))


def _close(
    result: RunResult, products: ProductWriter, session: Session, resume_from: Path | None, console: Console
) -> None:
    """Write the summary and print all paths and products; an error, if any, is the last line."""
    folder = session.folder
    result.paths |= {
        "metrics": folder.metrics,
        "tensorboard": folder.tensorboard,
        "config": folder.resolved_config,
        "code snapshot": folder.code,
        "checkpoint": folder.last_checkpoint,
    }
    result.paths = {name: path for name, path in result.paths.items() if path.exists()}
    summary = session.end(result.status, result.error, step=result.step, paths=result.paths, products=products.problems)
    assert summary is not None
    result.paths["summary"] = summary
    failed = [name for name, problem in products.problems.items() if problem is not None]
    console.say(f"Done, except for the {' and the '.join(failed)}:" if failed else "Done:")
    products.report()
    _list(result, console, session.clock)
    if result.error is not None:
        console.say(f"error: {result.error}. {products.remedy(resume_from)}")


def _list(result: RunResult, console: Console, clock: StageClock) -> None:
    for name, path in result.paths.items():
        console.say(f"  {name:<16} {path}")
    console.say(f"  {'time':<16} {clock.summary()}")


def _name_of(received: int | None) -> str:
    return "KeyboardInterrupt" if received is None else signal.Signals(received).name

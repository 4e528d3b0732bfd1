"""Construction of the system described by a config, and its training with Lightning."""

from __future__ import annotations

import importlib
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from scoredist3d import registry
from scoredist3d.config import under
from scoredist3d.config.experiment import ExperimentConfig
from scoredist3d.config.validation import load_experiment
from scoredist3d.reasons import reason
from scoredist3d.seeding import Rng
from scoredist3d.systems.base import System
from scoredist3d.training.checkpoint import checkpoint_step, read_trained
from scoredist3d.training.console import Console
from scoredist3d.training.distributed import Devices
from scoredist3d.training.folder import RunFolder, find_run
from scoredist3d.training.interrupt import InterruptGuard

if TYPE_CHECKING:
    from pytorch_lightning import Callback

    from scoredist3d.training.callbacks import OnceRestored


@dataclass(frozen=True)
class RankContext:
    """Rank of this process in a run, and the devices of the run.

    Attributes:
        devices: Devices of all ranks.
        rank: Rank of this process, from 0.
        port: TCP port at which the ranks connect.
    """

    devices: Devices
    rank: int = 0
    port: int = 0

    @property
    def device(self) -> torch.device:
        """Device of this rank."""
        on_cpu = self.devices.kind == "cpu"
        return torch.device("cpu") if on_cpu else torch.device("cuda", self.devices.indices[self.rank])

    @property
    def is_writer(self) -> bool:
        """Whether this rank writes files and prints: rank 0 only."""
        return self.rank == 0


def build_system(config: ExperimentConfig, context: RankContext) -> System:
    """Build prior, camera sampler and system on the CPU."""
    cameras = registry.build(config.data, world_size=context.devices.world_size * config.trainer.accumulate)
    prior = registry.build(config.prior)
    # The prompt of a new run has been checked at launch, and an existing run keeps its prompt.
    prior.allow_unknown_nouns = True
    with under("system"):
        system: System = registry.build(
            config.system,
            prior=prior,
            prompt=config.prompt,
            negative_prompt=config.negative_prompt,
            cameras=cameras,
            rng=Rng(config.seed),
        )
    return system


def start_of(config: ExperimentConfig) -> str | None:
    """Path of the run that initializes a new run (``system.init_from``); None if there is no such run or option."""
    return getattr(config.system, "init_from", None)


def begin(system: System, config: ExperimentConfig, context: RankContext, *, resumed: bool) -> None:
    """Check that the trainer supports a new system and, if configured, initialize the system from another run.

    Args:
        system: Newly built system.
        config: Config of the run.
        context: Devices and rank of this process.
        resumed: Whether a checkpoint will be loaded, in which case nothing is initialized.

    Raises:
        ValueError: The other run cannot be used, or the trainer does not support densification.
    """
    _check_densification(system, config, context)
    start = start_of(config)
    if resumed or start is None:
        return
    folder, checkpoint = find_run(start)
    source = load_experiment([folder.resolved_config])
    system.to_device(context.device)
    with under("system"):
        system.init_from(read_trained(checkpoint).weights, source.system)


def fit(
    system: System,
    config: ExperimentConfig,
    folder: RunFolder,
    context: RankContext,
    console: Console,
    guard: InterruptGuard,
    *,
    resume: Path | None = None,
    restored: Callable[[], None] = lambda: None,
) -> int:
    """Train a system in place until ``trainer.max_steps`` is reached or a signal requests a stop.

    Args:
        system: Newly built system, even if a checkpoint is resumed.
        config: Config of the run.
        folder: Folder of the run.
        context: Devices and rank of this process.
        console: Prints the progress.
        guard: Reports whether a signal has requested a stop.
        resume: Checkpoint to continue from.
        restored: Called once before the first step, after the checkpoint, if any, has been loaded.

    Returns:
        Number of optimizer steps done, earlier sessions of the run included; ``guard.requested`` tells whether a signal
        has stopped the training.

    Raises:
        NonFiniteError: A loss term or gradient is NaN or infinite.
        ValueError: The checkpoint cannot be read or does not belong to this system.
    """
    import_lightning()
    import pytorch_lightning as pl

    with _quiet_lightning():
        from scoredist3d.training.callbacks import OnceRestored
        from scoredist3d.training.lightning_module import EndlessSteps, TrainingModule

        module = TrainingModule(system, config.trainer, Rng(config.seed))

        def begins() -> None:
            _check_step(trainer, resume)
            restored()

        once_restored = OnceRestored(begins)
        callbacks = [once_restored, *_callbacks(config, folder, context, console, guard)]
        trainer = pl.Trainer(callbacks=callbacks, **_trainer_options(system, config, folder, context))
        # Lightning's handler for SIGTERM would broadcast between ranks that are not at the same place.
        trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
        try:
            with under("system"), _restoring(resume, once_restored):
                trainer.fit(
                    module, train_dataloaders=EndlessSteps(), ckpt_path=resume and str(resume), weights_only=True
                )
            once_restored.call()  # Lightning skips its hooks if no step is left.
        except BaseException:
            _leave_group(failed=True)
            raise
        _leave_group(failed=False)
    return int(trainer.global_step)


@contextmanager
def _restoring(checkpoint: Path | None, once_restored: OnceRestored) -> Iterator[None]:
    """Context manager that replaces errors of restoring a checkpoint that has another form than this program writes.

    Raises:
        ValueError: The body failed before the checkpoint was restored.
    """
    try:
        yield
    except (LookupError, TypeError, AttributeError) as error:
        if checkpoint is None or once_restored.called:
            raise
        raise ValueError(
            f"{checkpoint} cannot be restored ({reason(error)}); use another checkpoint or the version of the program "
            "that wrote it"
        ) from error


def _check_step(trainer: Any, checkpoint: Path | None) -> None:
    """Check that the loops of a restored checkpoint are at its step.

    Raises:
        ValueError: They are not, so training would repeat or leave out steps.
    """
    if checkpoint is not None and trainer.global_step != checkpoint_step(checkpoint):
        raise ValueError(f"{checkpoint} is damaged: its loops are not those of its step; use another checkpoint")


def _callbacks(
    config: ExperimentConfig, folder: RunFolder, context: RankContext, console: Console, guard: InterruptGuard
) -> list[Callback]:
    """Callbacks in the order of their execution: metrics, preview, progress, checkpoint, stop."""
    from scoredist3d.training.callbacks import Checkpoints, MetricsWriter, PreviewGrids, ProgressLine, SaveOnRequest

    checkpoints = Checkpoints(folder.checkpoints, config.checkpoint, is_writer=context.is_writer)
    callbacks: list[Callback] = [MetricsWriter(folder, config.log, is_writer=context.is_writer)]
    if context.is_writer:
        callbacks.append(PreviewGrids(config.preview, folder))
    return [*callbacks, ProgressLine(console), checkpoints, SaveOnRequest(guard, checkpoints, console)]


def _leave_group(*, failed: bool) -> None:
    """Leave the process group of this rank; with NCCL, a rank that failed aborts the group instead."""
    if not torch.distributed.is_initialized():
        return
    if failed and torch.distributed.get_backend() == "nccl":
        # The other ranks may wait for this one in a collective operation, and an orderly shutdown would wait for them.
        torch.distributed.distributed_c10d._abort_process_group()
    else:
        torch.distributed.destroy_process_group()


def _check_densification(system: System, config: ExperimentConfig, context: RankContext) -> None:
    """Check that the trainer supports densification, which needs a single process and unscaled gradients.

    Raises:
        ValueError: The system uses densification, but the trainer uses several devices, accumulation or
            16-mixed precision.
    """
    if not system.densifies:
        return
    if context.devices.world_size > 1:
        raise ValueError(
            "system.geometry: densification changes the number of elements, which training on several devices does not "
            "support; use one device, or set system.geometry.densify.enabled=false"
        )
    if config.trainer.accumulate > 1:
        raise ValueError(
            "trainer.accumulate: averaging over batches scales down the gradients that control densification; "
            "increase data.batch_size instead, or set system.geometry.densify.enabled=false"
        )
    if config.trainer.precision == "16-mixed":
        raise ValueError(
            "trainer.precision: 16-mixed scales the gradients that control densification; use bf16-mixed or 32-true, "
            "or set system.geometry.densify.enabled=false"
        )


def _trainer_options(
    system: System, config: ExperimentConfig, folder: RunFolder, context: RankContext
) -> dict[str, Any]:
    """Keyword arguments for the constructor of the Lightning trainer."""
    from pytorch_lightning.strategies import DDPStrategy

    from scoredist3d.training.lightning_plugins import AtomicCheckpointIO, LocalRanks

    plugins: list[Any] = [AtomicCheckpointIO(), LocalRanks(context.rank, context.devices.world_size, context.port)]
    strategy: Any = "auto"
    if context.devices.world_size > 1:
        # Buffers need no broadcast: the shared random stream and equal weights make them equal on all ranks.
        strategy = DDPStrategy(broadcast_buffers=False, find_unused_parameters=not system.steps_everything)
    trainer = config.trainer
    on_cpu = context.devices.kind == "cpu"
    return {
        "accelerator": "cpu" if on_cpu else "gpu",
        "devices": context.devices.world_size if on_cpu else list(context.devices.indices),
        "strategy": strategy,
        "plugins": plugins,
        "max_steps": trainer.max_steps,
        "max_epochs": -1,
        "precision": trainer.precision,
        "accumulate_grad_batches": trainer.accumulate,
        "detect_anomaly": trainer.detect_anomaly,
        "default_root_dir": str(folder.root),
        "limit_val_batches": 0,
        "num_sanity_val_steps": 0,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
    }


def import_lightning() -> None:
    """Import Lightning without its warnings; the first import takes seconds, and later ones take no time."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        importlib.import_module("pytorch_lightning")


@contextmanager
def _quiet_lightning() -> Iterator[None]:
    """Context manager that silences Lightning's banners and hints about deliberate choices of this program."""
    loggers = [logging.getLogger(name) for name in ("pytorch_lightning", "lightning_fabric")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"(pytorch_lightning|lightning_fabric)\.")
        warnings.filterwarnings("ignore", message=".*(torch\\.jit|lr_scheduler).*")
        # Lightning deliberately wraps the module for several GPUs on a separate stream.
        warnings.filterwarnings("ignore", message="The AccumulateGrad node's stream does not match")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)

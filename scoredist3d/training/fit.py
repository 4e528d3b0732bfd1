"""From a config to a system, and from a system to a trained one."""

from __future__ import annotations

import importlib
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from scoredist3d import registry
from scoredist3d.config import under
from scoredist3d.config.experiment import ExperimentConfig
from scoredist3d.config.validation import load_experiment
from scoredist3d.seeding import Rng
from scoredist3d.systems.base import System
from scoredist3d.training.checkpoint import read_checkpoint
from scoredist3d.training.console import Console
from scoredist3d.training.distributed import Devices
from scoredist3d.training.folder import RunFolder, find_run
from scoredist3d.training.interrupt import InterruptGuard
from scoredist3d.training.outputs import save_preview


@dataclass(frozen=True)
class RankContext:
    """This process among those of the run.

    Attributes:
        devices: Of all ranks.
        rank: Of this one.
        port: Where the ranks meet.
    """

    devices: Devices
    rank: int = 0
    port: int = 0

    @property
    def device(self) -> torch.device:
        """Of this rank."""
        on_cpu = self.devices.kind == "cpu"
        return torch.device("cpu") if on_cpu else torch.device("cuda", self.devices.indices[self.rank])

    @property
    def is_writer(self) -> bool:
        """Rank 0 writes files and speaks."""
        return self.rank == 0


@dataclass(frozen=True)
class FitResult:
    """How training ended.

    Attributes:
        step: Optimiser steps done in all.
        interrupted: Stopped by a signal, with a checkpoint.
    """

    step: int
    interrupted: bool


def build_system(config: ExperimentConfig, place: RankContext) -> System:
    """Construct prior, camera sampler and system, on the CPU."""
    cameras = registry.build(config.data, world_size=place.devices.world_size * config.trainer.accumulate)
    prior = registry.build(config.prior)
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
    """The run whose scene a new run starts from, for systems that can."""
    return getattr(config.system, "init_from", None)


def begin(system: System, config: ExperimentConfig, place: RankContext, *, resumed: bool) -> None:
    """What comes between building a system and its first step: checks, and the start from another run.

    Raises:
        ValueError: The other run cannot be taken over, or elements of the representation come and go while training on
            several devices or with gradients of another scale.
    """
    _check_growth(system, config, place)
    start = start_of(config)
    if resumed or start is None:
        return
    folder, checkpoint = find_run(start)
    source = load_experiment([folder.resolved_config])
    system.to_device(place.device)
    with under("system"):
        system.init_from(read_checkpoint(checkpoint)["state_dict"], source.system)


def fit(
    system: System,
    config: ExperimentConfig,
    folder: RunFolder,
    place: RankContext,
    console: Console,
    guard: InterruptGuard,
    *,
    resume: Path | None = None,
    restored: Callable[[], None] = lambda: None,
) -> FitResult:
    """Optimise until ``trainer.max_steps`` or an interrupt; the system is trained in place.

    Args:
        system: At its start, also where a checkpoint is resumed.
        config: Of the run.
        folder: Of the run.
        place: This process.
        console: For progress.
        guard: Says when to stop.
        resume: Checkpoint to go on from.
        restored: Called once that checkpoint is loaded, before the first step.

    Raises:
        NonFiniteError: A loss term or gradient is NaN or infinite.
        ValueError: The checkpoint cannot be read or does not belong to this system.
    """
    import_lightning()
    import pytorch_lightning as pl

    with _quiet_lightning():
        from scoredist3d.training.callbacks import (
            Checkpoints,
            MetricsWriter,
            OnceRestored,
            PreviewGrids,
            ProgressLine,
            StopOnRequest,
        )
        from scoredist3d.training.lightning_module import EndlessSteps, TrainingModule

        module = TrainingModule(system, config.trainer, Rng(config.seed))
        checkpoints = Checkpoints(folder.checkpoints, config.checkpoint, is_writer=place.is_writer)
        once_restored = OnceRestored(restored)
        callbacks: list[pl.Callback] = [once_restored, MetricsWriter(folder, config.log, is_writer=place.is_writer)]
        if place.is_writer:
            callbacks.append(
                PreviewGrids(
                    config.preview, lambda module, step: save_preview(module.system, config.preview, folder, step)
                )
            )
        callbacks += [ProgressLine(console), checkpoints, StopOnRequest(guard, checkpoints)]
        trainer = pl.Trainer(callbacks=callbacks, **_trainer_options(system, config, folder, place))
        try:
            with under("system"):
                trainer.fit(
                    module, train_dataloaders=EndlessSteps(), ckpt_path=resume and str(resume), weights_only=True
                )
            once_restored.call()  # Lightning skips its hooks where no step is left
        except BaseException:
            _leave_group(failed=True)
            raise
        _leave_group(failed=False)
    return FitResult(trainer.global_step, guard.requested and trainer.global_step < config.trainer.max_steps)


def _leave_group(*, failed: bool) -> None:
    """End the process group of this rank, at once where it has failed."""
    if not torch.distributed.is_initialized():
        return
    if failed and torch.distributed.get_backend() == "nccl":
        # The other ranks may be waiting for this one in a collective, which an orderly end would wait for in turn.
        torch.distributed.distributed_c10d._abort_process_group()
    else:
        torch.distributed.destroy_process_group()


def _check_growth(system: System, config: ExperimentConfig, place: RankContext) -> None:
    """Where elements come and go by their gradients, there must be one process, and gradients of a known scale."""
    if not system.grows:
        return
    if place.devices.world_size > 1:
        raise ValueError(
            "system.geometry: its elements come and go while training, which several devices cannot follow; "
            "use one device, or set system.geometry.densify.enabled=false"
        )
    if config.trainer.accumulate > 1:
        raise ValueError(
            "trainer.accumulate: averaging batches divides the gradients that say where elements of system.geometry "
            "are added; enlarge data.batch_size instead, or set system.geometry.densify.enabled=false"
        )
    if config.trainer.precision == "16-mixed":
        raise ValueError(
            "trainer.precision: 16-mixed scales the gradients that say where elements of system.geometry are added; "
            "use bf16-mixed or 32-true, or set system.geometry.densify.enabled=false"
        )


def _trainer_options(system: System, config: ExperimentConfig, folder: RunFolder, place: RankContext) -> dict[str, Any]:
    from pytorch_lightning.strategies import DDPStrategy

    from scoredist3d.training.lightning_plugins import AtomicCheckpointIO, LocalRanks

    plugins: list[Any] = [AtomicCheckpointIO(), LocalRanks(place.rank, place.devices.world_size, place.port)]
    strategy: Any = "auto"
    if place.devices.world_size > 1:
        # Buffers are a function of the shared random stream and of weights that are equal already.
        strategy = DDPStrategy(broadcast_buffers=False, find_unused_parameters=not system.steps_everything)
    trainer = config.trainer
    on_cpu = place.devices.kind == "cpu"
    return {
        "accelerator": "cpu" if on_cpu else "gpu",
        "devices": place.devices.world_size if on_cpu else list(place.devices.indices),
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
    """Import Lightning (seconds), without its advice; later imports are free."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        importlib.import_module("pytorch_lightning")


@contextmanager
def _quiet_lightning() -> Iterator[None]:
    """Lightning's banners and advice are about choices that this program has made on purpose."""
    loggers = [logging.getLogger(name) for name in ("pytorch_lightning", "lightning_fabric")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"(pytorch_lightning|lightning_fabric)\.")
        warnings.filterwarnings("ignore", message=".*(torch\\.jit|lr_scheduler).*")
        # Lightning wraps the module for several GPUs on a stream of its own, on purpose.
        warnings.filterwarnings("ignore", message="The AccumulateGrad node's stream does not match")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)

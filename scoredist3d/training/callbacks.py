"""Lightning callbacks that run after optimizer steps: metrics, previews, checkpoints, stopping, progress line."""

from __future__ import annotations

import logging
import time
from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from scoredist3d.config.experiment import CheckpointConfig, LogConfig, PreviewConfig
from scoredist3d.reasons import is_out_of_memory, part, reason
from scoredist3d.training.checkpoint import checkpoint_name, link_or_copy
from scoredist3d.training.console import Console, duration, memory_use
from scoredist3d.training.folder import LAST_CHECKPOINT, RunFolder, kept_checkpoints, step_of
from scoredist3d.training.interrupt import InterruptGuard
from scoredist3d.training.lightning_module import TrainingModule
from scoredist3d.training.metrics import MetricsFile
from scoredist3d.training.outputs import save_preview
from scoredist3d.training.slurm import requeue_job

logger = logging.getLogger("scoredist3d")


class StepCallback(pl.Callback):
    """Base class of callbacks that run :meth:`after_step` once per optimizer step, not once per accumulated batch."""

    def __init__(self) -> None:
        self._seen = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start counting at the step of the resumed checkpoint, or at 0 in a new run."""
        self._seen = trainer.global_step

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Call :meth:`after_step` if this batch completed an optimizer step."""
        if trainer.global_step != self._seen:
            self._seen = trainer.global_step
            self.after_step(trainer, pl_module, trainer.global_step)

    @abstractmethod
    def after_step(self, trainer: pl.Trainer, module: TrainingModule, step: int) -> None:
        """Called when ``step`` optimizer steps are done."""


def is_due(step: int, every: int, max_steps: int) -> bool:
    """Whether ``step`` is the last step or a multiple of ``every``; 0 means the last step only."""
    return step >= max_steps or (every > 0 and step % every == 0)


class OnceRestored(pl.Callback):
    """Callback that calls a function once, before the first step and after the checkpoint, if any, has been loaded."""

    def __init__(self, function: Callable[[], None]) -> None:
        self.function = function
        self.called = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Call the function; Lightning restores weights, optimizers and callbacks before this hook."""
        self.call()

    def call(self) -> None:
        """Call the function unless it has been called already."""
        if not self.called:
            self.called = True
            self.function()


class MetricsWriter(StepCallback):
    """Callback that writes the mean of each logged scalar over a window of steps to ``metrics.csv`` and TensorBoard.

    ``metrics.csv`` contains no wall times, so a resumed run writes the same rows as an uninterrupted one; checkpoints
    store the values of the unfinished window. On several devices, the logged values are those of rank 0.
    """

    def __init__(self, folder: RunFolder, config: LogConfig, *, is_writer: bool) -> None:
        super().__init__()
        self.folder, self.config, self.is_writer = folder, config, is_writer
        self.file: MetricsFile | None = None
        self.events: Any = None
        self._window_start = (0, 0.0)
        self._restored: dict[str, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        """The values logged since the last row, to be stored in a checkpoint; makes the earlier rows durable."""
        if self.file is not None:
            self.file.sync()
        return {"window": self._module.buffer.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the unfinished window of the checkpoint, which is restored when training starts."""
        self._restored = state_dict["window"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Open the files and drop rows that a killed run wrote after the checkpoint."""
        super().on_train_start(trainer, pl_module)
        self._module: TrainingModule = pl_module
        pl_module.buffer.load_state_dict(self._restored)
        step = trainer.global_step
        self._window_start = (step, time.perf_counter())
        if not self.is_writer:
            return
        self.file = MetricsFile(self.folder.metrics, resume_step=step or None)
        if self.config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.events = SummaryWriter(str(self.folder.tensorboard), purge_step=step + 1 if step else None)

    def after_step(self, trainer: pl.Trainer, module: TrainingModule, step: int) -> None:
        """Write a row of mean values if one is due."""
        if not is_due(step, self.config.every_n_steps, trainer.max_steps):
            return
        module.check_finite()
        row = module.buffer.mean_row()
        row |= {f"lr/{group['name']}": float(group["lr"]) for group in trainer.optimizers[0].param_groups}
        if self.file is not None:
            self.file.append(step, row)
        if self.events is not None:
            first, start = self._window_start
            for key, value in row.items():
                self.events.add_scalar(key, value, step)
            self.events.add_scalar("performance/steps_per_second", (step - first) / (time.perf_counter() - start), step)
            self._window_start = (step, time.perf_counter())

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Close the TensorBoard event file, even after an error."""
        if self.events is not None:
            self.events.close()


class PreviewGrids(StepCallback):
    """Callback that saves preview grids, e.g. ``images/step-000200.png``, at regular steps and after the last step."""

    def __init__(self, config: PreviewConfig, folder: RunFolder) -> None:
        super().__init__()
        self.config, self.folder = config, folder

    def after_step(self, trainer: pl.Trainer, module: TrainingModule, step: int) -> None:
        """Save a preview grid if one is due."""
        if is_due(step, self.config.every_n_steps, trainer.max_steps):
            try:
                save_preview(module.system, self.config, self.folder, step)
            # Previews are not worth the run; the last one is attempted again at the end.
            except (OSError, MemoryError, RuntimeError) as error:
                if not isinstance(error, OSError) and not is_out_of_memory(error):
                    raise
                full = "the memory is full; lower preview.size" if is_out_of_memory(error) else reason(error)
                logger.warning("preview of step %d: %s", step, full)


class Checkpoints(StepCallback):
    """Callback that saves ``step-*.ckpt`` files and ``last.ckpt``, a hard link to the newest one.

    All ranks take part in saving, but only rank 0 writes files.
    """

    def __init__(self, folder: Path, config: CheckpointConfig, *, is_writer: bool) -> None:
        super().__init__()
        self.folder, self.config, self.is_writer = folder, config, is_writer
        self.saved_step = -1

    def after_step(self, trainer: pl.Trainer, module: TrainingModule, step: int) -> None:
        """Save a checkpoint if one is due."""
        if is_due(step, self.config.every_n_steps, trainer.max_steps):
            self.save(trainer, module)

    def save(self, trainer: pl.Trainer, module: TrainingModule) -> None:
        """Save the state after the current step, unless it has been saved already.

        Raises:
            NonFiniteError: The state comes from a non-finite loss or gradient; existing checkpoints are kept.
        """
        step = trainer.global_step
        if step == self.saved_step:
            return
        module.check_finite()
        _check_ranks_agree(trainer, module)
        path = self.folder / checkpoint_name(step)
        with part("the checkpoint"):
            trainer.save_checkpoint(path)
        self.saved_step = step
        if self.is_writer:
            link_or_copy(path, self.folder / LAST_CHECKPOINT)
            kept = kept_checkpoints(self.folder)
            older = [other for other in kept if step_of(other) < step]
            # Later steps exist if the run was resumed from an earlier checkpoint; this session replaces them.
            abandoned = [other for other in kept if step_of(other) > step]
            for surplus in older[: max(0, len(older) - self.config.keep + 1)] + abandoned:
                surplus.unlink()


def _check_ranks_agree(trainer: pl.Trainer, module: TrainingModule) -> None:
    """Check that all ranks have the same weights, which follows if gradients are averaged over the ranks.

    Raises:
        RuntimeError: The weights differ, so gradients were not averaged over all ranks.
    """
    if trainer.world_size == 1:
        return
    with torch.no_grad():
        norms = torch.stack([norm.double() for norm in torch._foreach_norm(list(module.system.parameters()))])
        everywhere = trainer.strategy.all_gather(norms)
    if not torch.allclose(everywhere, norms.expand_as(everywhere), rtol=1e-5, atol=1e-12):
        raise RuntimeError(
            f"step {trainer.global_step}: the ranks have different weights, so gradients were not averaged; "
            "resume from the last checkpoint on one device"
        )


class SaveOnRequest(StepCallback):
    """Callback that saves a checkpoint after the step in which a rank received a signal, and ends the run if asked to.

    SIGUSR1 asks for a checkpoint only; under SLURM, the job is then requeued.
    """

    def __init__(self, guard: InterruptGuard, checkpoints: Checkpoints, console: Console) -> None:
        super().__init__()
        self.guard, self.checkpoints, self.console = guard, checkpoints, console

    def after_step(self, trainer: pl.Trainer, module: TrainingModule, step: int) -> None:
        """Save if any rank has received a signal; all ranks decide alike."""
        stop, save = self.guard.received or 0, self.guard.save_requested
        if trainer.world_size > 1:
            requests = torch.tensor([stop, int(save)], device=trainer.strategy.root_device)
            torch.distributed.all_reduce(requests, op=torch.distributed.ReduceOp.MAX)
            stop, save = int(requests[0]), bool(requests[1])
        if not stop and not save:
            return
        if stop:
            self.guard.agree(stop)
            trainer.should_stop = True
        self.guard.save_requested = False
        self.checkpoints.save(trainer, module)
        if save:
            self.console.say(f"Saved a checkpoint at step {step} (SIGUSR1)")
            if self.checkpoints.is_writer and (message := requeue_job()) is not None:
                self.console.say(message)


class ProgressLine(StepCallback):
    """Callback that prints a progress line with the step, speed, losses, memory use, elapsed and remaining time."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self.console = console
        self._start = 0.0
        self._warm = (0, 0.0)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start measuring time."""
        super().on_train_start(trainer, pl_module)
        self._start = time.monotonic()
        self._warm = (0, 0.0)

    def after_step(self, trainer: pl.Trainer, module: TrainingModule, step: int) -> None:
        """Print the progress line if it is due."""
        if not self._warm[1]:
            self._warm = (step, time.monotonic())
        if self.console.due() or (step >= trainer.max_steps and not self.console.quiet):
            self.console.progress(self.text(step, trainer.max_steps, module))

    def text(self, step: int, max_steps: int, module: TrainingModule) -> str:
        """The progress line after ``step`` steps."""
        now = time.monotonic()
        first, since = self._warm  # Excludes the first step and its one-time costs.
        per_step = (now - since) / (step - first) if step > first else now - self._start
        rate = f"{1 / per_step:.1f} it/s" if per_step < 1 else f"{per_step:.1f} s/it"
        latest = module.buffer.latest
        terms = [f"{key.removeprefix('loss/')} {value:.4g}" for key, value in latest.items() if key.startswith("loss/")]
        loss = (
            f"loss {latest['loss']:.4g}" + (f" ({', '.join(terms)})" if len(terms) > 1 else "")
            if "loss" in latest
            else "loss ..."
        )
        return (
            f"step {step}/{max_steps}  {rate}  {loss}  {memory_use(module.device)}  "
            f"{duration(now - self._start)} elapsed, {duration((max_steps - step) * per_step)} left"
        )

"""Record of one session of a run: a snapshot of its inputs, and its summary."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from scoredist3d.config.experiment import ExperimentConfig
from scoredist3d.config.validation import to_yaml
from scoredist3d.custom import loaded_folders
from scoredist3d.training.checkpoint import checkpoint_step
from scoredist3d.training.console import StageClock
from scoredist3d.training.folder import RunFolder
from scoredist3d.training.snapshot import save_snapshot
from scoredist3d.training.summary import RUNNING, Products, write_summary


class Session:
    """Writes the snapshot and the summary of one session of a run.

    A new run calls :meth:`begin` at once. A resumed run calls it after loading its checkpoint, so that a config that
    does not match the checkpoint leaves the run unchanged.
    """

    def __init__(
        self,
        folder: RunFolder,
        config: ExperimentConfig,
        clock: StageClock,
        *,
        source: str | None,
        step: int,
        begun: Callable[[], None] | None = None,
    ) -> None:
        """Args:
        folder: Folder of the run.
        config: Config of this session.
        clock: Wall times of the stages.
        source: The config as written, with interpolations.
        step: Optimizer steps done in earlier sessions.
        begun: Called once the session has begun.
        """
        self.folder, self.config, self.clock, self.source, self.step = folder, config, clock, source, step
        self._begun = begun
        self.number = 0

    def begin(self) -> None:
        """Write the snapshot and a summary with status ``running``; later calls do nothing."""
        if self.number:
            return
        self.number = save_snapshot(self.folder, to_yaml(self.config), self.source, sys.argv, loaded_folders())
        self.end(RUNNING, step=self.step)
        if self._begun is not None:
            self._begun()

    def end(
        self,
        status: str,
        error: str | None = None,
        *,
        step: int | None = None,
        paths: Mapping[str, Path] | None = None,
        products: Products | None = None,
    ) -> Path | None:
        """Write the summary if the session has begun; ``step`` defaults to that of the last checkpoint."""
        if not self.number:
            return None
        step = self._saved_step() if step is None else step
        return write_summary(
            self.folder,
            self.config,
            self.clock,
            status=status,
            error=error,
            step=step,
            paths=paths,
            products=products,
        )

    def discard(self) -> None:
        """Delete the record of this session if it is the first of the run; otherwise do nothing.

        The folder is deleted with its lock if it contains nothing else.
        """
        if self.number != 1:
            return
        self.number = 0
        for made in (self.folder.configs, self.folder.code):
            shutil.rmtree(made, ignore_errors=True)
        self.folder.summary.unlink(missing_ok=True)

    def _saved_step(self) -> int:
        newest = self.folder.newest_checkpoint
        with suppress(ValueError):  # The checkpoint is damaged.
            return self.step if newest is None else checkpoint_step(newest)
        return self.step

"""The record of one session of training: what ran, and how it ended."""

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
from scoredist3d.training.summary import RUNNING, write_summary


class Session:
    """Writes the snapshot and the summary of one session of a run, from :meth:`begin` on.

    A new run begins at once. A resumed run begins when its checkpoint has been loaded, so that a config that does not
    fit the checkpoint leaves the run as it was.
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
        folder: Of the run.
        config: Of this session.
        clock: Stages of work of this session.
        source: The config as it was written, interpolations kept.
        step: Optimiser steps done before.
        begun: Called after the session has begun.
        """
        self.folder, self.config, self.clock, self.source, self.step = folder, config, clock, source, step
        self._begun = begun
        self.number = 0

    def begin(self) -> None:
        """Write the snapshot and a summary that says that the run is in progress; the second call does nothing."""
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
    ) -> Path | None:
        """Write the summary of a session that has begun; ``step`` is that of the last checkpoint where not given."""
        if not self.number:
            return None
        step = self._saved_step() if step is None else step
        return write_summary(self.folder, self.config, self.clock, status=status, error=error, step=step, paths=paths)

    def discard(self) -> None:
        """Leave no trace of the first session of a run; the record of a later one stays."""
        if self.number != 1:
            return
        self.number = 0
        for made in (self.folder.configs, self.folder.code):
            shutil.rmtree(made, ignore_errors=True)
        self.folder.summary.unlink(missing_ok=True)
        with suppress(OSError):
            self.folder.root.rmdir()  # stays where anything else is in it

    def _saved_step(self) -> int:
        with suppress(ValueError):  # none yet, or damaged
            return checkpoint_step(self.folder.last_checkpoint)
        return self.step

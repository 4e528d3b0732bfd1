"""Stages of an export: their timing and progress, and the warnings they produce."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

logger = logging.getLogger(__name__)

StageProgress = Callable[[str, float], None]
"""Callback that receives the name of a stage and the fraction of it that is done, in [0, 1]."""


class Notes(list[str]):
    """Warnings for the report, one sentence each; every warning is also logged."""

    def add(self, *notes: str) -> None:
        """Append and log warnings."""
        for note in notes:
            logger.warning(note)
            self.append(note)


class Stages:
    """Timer of the stages of an export.

    Args:
        progress: Callback that receives the progress of each stage, or None.
    """

    def __init__(self, progress: StageProgress | None) -> None:
        self.progress = progress
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[Callable[[float], None]]:
        """Context manager that times one stage.

        Yields:
            A function that reports the fraction of the stage that is done. 0 and 1 are reported automatically.
        """

        def report(fraction: float) -> None:
            if self.progress is not None:
                self.progress(name, fraction)

        start = time.perf_counter()
        report(0.0)
        yield report
        self.seconds[name] = round(time.perf_counter() - start, 3)
        report(1.0)

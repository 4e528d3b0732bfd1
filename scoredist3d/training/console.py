"""Terminal output of a run: messages and one progress line."""

from __future__ import annotations

import logging
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

import psutil
import torch

from scoredist3d.reasons import reason
from scoredist3d.terminal import display_width, fit_width, print_out

SECONDS_BETWEEN_LINES = 10.0
SECONDS_BETWEEN_REFRESHES = 0.2


class Console:
    """Prints messages and a progress line, which is redrawn on a terminal and printed every few seconds elsewhere.

    A quiet console (all ranks but rank 0) prints nothing. A console whose output pipe is closed (``| head``) becomes
    quiet, so that the run still finishes.
    """

    def __init__(self, stream: TextIO | None = None, *, quiet: bool = False) -> None:
        self.stream = stream or sys.stdout
        self.quiet = quiet
        self.interactive = not quiet and self.stream.isatty()
        self._width = 0
        self._next = 0.0

    def say(self, text: str = "") -> None:
        """Print a message on a new line, below the progress line if there is one."""
        if not self.quiet:
            self._end_line()
            self._print(text)

    def due(self) -> bool:
        """Whether enough time has passed to print the progress line again; if not, the caller need not format it."""
        return not self.quiet and time.monotonic() >= self._next

    def progress(self, text: str) -> None:
        """Print ``text`` as the progress line, which replaces the previous one on a terminal."""
        if self.quiet:
            return
        if not self.interactive:
            self._next = time.monotonic() + SECONDS_BETWEEN_LINES
            self._print(text)
            return
        self._next = time.monotonic() + SECONDS_BETWEEN_REFRESHES
        text = fit_width(text, max(1, shutil.get_terminal_size().columns - 1))
        width = display_width(text)
        self._print("\r" + text + " " * (self._width - width), end="")
        self._width = width

    def _end_line(self) -> None:
        if self._width:
            self._print("")
            self._width = 0

    def _print(self, text: str, end: str = "\n") -> None:
        self.quiet = not print_out(text, end=end, stream=self.stream)


class StageClock:
    """Wall time and outcome of each stage of a run; outcomes are ``done``, ``interrupted`` and ``failed``."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.status: dict[str, str] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Context manager that adds its duration to the time of stage ``name``, even if an error is raised inside."""
        start = time.perf_counter()
        self.status[name] = "failed"
        try:
            yield
            self.status[name] = "done"
        except KeyboardInterrupt:
            self.status[name] = "interrupted"
            raise
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def summary(self) -> str:
        """Times of all stages and their sum: ``start-up 4.1 s, training 121.0 s, ...; 140.2 s in all``."""
        parts = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in self.seconds.items())
        return f"{parts}; {sum(self.seconds.values()):.1f} s in all"


class _ConsoleHandler(logging.Handler):
    """Logging handler that prints the log records of this package on the console."""

    def __init__(self, console: Console) -> None:
        super().__init__(logging.INFO)
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        prefix = "warning: " if record.levelno >= logging.WARNING else ""
        self.console.say(prefix + record.getMessage())


@contextmanager
def log_to(console: Console) -> Iterator[None]:
    """Context manager in which log records of this package are printed on the console only.

    A system error in a thread of a library, such as a full disk in the writer of TensorBoard, is one line of warning.
    """
    uncaught = threading.excepthook

    def print_line(thread: threading.ExceptHookArgs) -> None:
        if isinstance(thread.exc_value, OSError):
            console.say(f"warning: {reason(thread.exc_value)}")
        else:
            uncaught(thread)

    logger, handler = logging.getLogger("scoredist3d"), _ConsoleHandler(console)
    level, propagate = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    threading.excepthook = print_line
    try:
        yield
    finally:
        threading.excepthook = uncaught
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate


def duration(seconds: float) -> str:
    """A number of seconds formatted as ``0:07``, ``12:30`` or ``1:02:03``."""
    whole = max(0, round(seconds))
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"


def peak_memory_gib() -> float:
    """Peak resident memory of this process so far, in GiB."""
    info = psutil.Process().memory_info()
    if hasattr(info, "peak_wset"):  # Windows
        return float(info.peak_wset) / 2**30
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


def memory_use(device: torch.device) -> str:
    """Text with the resident memory of this process and, if ``device`` is a GPU, the peak of its allocated memory."""
    text = f"{psutil.Process().memory_info().rss / 2**30:.2f} GiB"
    if device.type == "cuda":
        text += f" + GPU {torch.cuda.max_memory_allocated(device) / 2**30:.2f} GiB"
    return text

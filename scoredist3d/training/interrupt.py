"""Graceful stop of a run after Ctrl-C or SIGTERM."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any


class InterruptGuard:
    """Context manager in which the first signal requests a graceful stop and the second ends the process at once.

    While :attr:`graceful` is False (loading, export), the first signal raises ``KeyboardInterrupt`` immediately.
    Ending at once is safe, because every file is written atomically. Signals can only be caught in the main thread; in
    other threads, and with ``active=False``, the guard does nothing.

    Attributes:
        graceful: Whether the first signal takes effect only after the current step.
        received: Number of the received signal, or None.
    """

    signals = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, say: Callable[[str], None], *, active: bool = True) -> None:
        self.say = say
        self.active = active and threading.current_thread() is threading.main_thread()
        self.graceful = False
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

    @property
    def requested(self) -> bool:
        """Whether a signal has been received."""
        return self.received is not None

    @property
    def exit_code(self) -> int:
        """Exit code 128 + signal number, as shells report it: 130 after Ctrl-C."""
        return 128 + (self.received or signal.SIGINT)

    def __enter__(self) -> InterruptGuard:
        self._previous = {number: signal.getsignal(number) for number in self.signals}
        self.install()
        return self

    def install(self) -> None:
        """Install the signal handlers; called again after another library has replaced them."""
        if self.active:
            for number in self.signals:
                signal.signal(number, self._handle)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.active:
            for number, handler in self._previous.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            self.say("Stopped at once; the last saved checkpoint is intact.")
            os._exit(128 + number)
        self.received = number
        if not self.graceful:
            raise KeyboardInterrupt
        self.say("Stopping after this step and saving a checkpoint; press Ctrl-C again to stop at once.")

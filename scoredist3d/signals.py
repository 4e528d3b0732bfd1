"""Signals that end a command or ask a run to save a checkpoint."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

STOP_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
"""Signals that end a command; a run in training saves a checkpoint first."""
SAVE_SIGNAL: int | None = getattr(signal, "SIGUSR1", None)
"""Signal for which a run saves a checkpoint and continues; None on Windows."""


class SignalReceived(KeyboardInterrupt):
    """Exception raised in the main thread by a stop signal."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number

    @property
    def exit_code(self) -> int:
        """Exit code 128 + signal number, as shells report it: 130 after Ctrl-C, 143 after SIGTERM, 129 after SIGHUP."""
        return 128 + self.number


def caught_signals() -> list[int]:
    """The signals to install handlers for; ``nohup`` ignores SIGHUP, and that is left so."""
    stops = [number for number in STOP_SIGNALS if number == signal.SIGINT or not _is_ignored(number)]
    return stops + ([] if SAVE_SIGNAL is None else [SAVE_SIGNAL])


@contextmanager
def signals_end_command() -> Iterator[None]:
    """Context manager in which stop signals raise :class:`SignalReceived`, and requests to save are ignored.

    In a container, a process without handlers that is the first one does not react to ``docker stop``.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # Ctrl-C keeps Python's own handler, or remains ignored in a shell's background job.
    previous: dict[int, Any] = {n: signal.signal(n, _raise) for n in caught_signals() if n != signal.SIGINT}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _raise(number: int, frame: FrameType | None) -> None:
    if number in STOP_SIGNALS:
        raise SignalReceived(number)


def _is_ignored(number: int) -> bool:
    return signal.getsignal(number) is signal.SIG_IGN

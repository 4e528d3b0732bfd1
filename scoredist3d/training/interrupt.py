"""Reaction of a run to signals: SIGINT, SIGTERM and SIGHUP stop it, in training after a checkpoint; SIGUSR1 saves."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, NoReturn

from scoredist3d.signals import SAVE_SIGNAL, STOP_SIGNALS, SignalReceived, caught_signals

_WAKE_UP = b"\0"  # No signal has the number 0.
_ACTION_SECONDS = 3.0
"""Time for the message of a signal, and for the message and the summary of a forced end."""


def _nothing() -> None:
    """Do nothing."""


class InterruptGuard:
    """Context manager in which signals stop a run gracefully, and end it at once if that takes too long.

    The first stop signal requests a stop. While :attr:`graceful` is False (loading, export), it also raises
    :class:`SignalReceived` in the main thread. A second stop signal, or the end of the grace period, ends the process
    at once, whatever the main thread is doing; that is safe, because every file is written atomically.

    Python runs signal handlers in the main thread, between two instructions, so a handler waits for a long operator or
    for another rank. A thread therefore reads the numbers of the signals from a socket, to which they are written as
    soon as they arrive. Signals can only be caught from the main thread; in other threads, the guard does nothing.

    Attributes:
        graceful: Whether the first signal takes effect only after the current step.
        received: Number of the stop signal that this rank has received or all ranks have agreed on, or None.
        agreed: Whether all ranks have agreed to stop, so that it is no failure if one of them ends first.
        save_requested: Whether a checkpoint has been requested; reset by whoever saves it.
        on_stop: Called once when a stop is requested.
        on_save_outside_training: Called for a request to save while there is nothing new to save.
        before_forced_end: Called before the process is ended at once.
    """

    def __init__(
        self, say: Callable[[str], None], grace_seconds: float = 30.0, kept: str = "the last saved checkpoint is intact"
    ) -> None:
        """Args:
        say: Prints a message.
        grace_seconds: Seconds after the first signal at which the process is ended.
        kept: What a forced end leaves, for its message.
        """
        self.say, self.grace_seconds, self.kept = say, grace_seconds, kept
        self.active = threading.current_thread() is threading.main_thread()
        self.graceful = self.agreed = self.save_requested = False
        self.received: int | None = None
        self.on_stop: Callable[[], None] = _nothing
        self.on_save_outside_training: Callable[[], None] = _nothing
        self.before_forced_end: Callable[[], None] = _nothing
        self._previous: dict[int, Any] = {}
        self._handled = 0
        self._sockets: tuple[socket.socket, socket.socket] | None = None
        self._previous_descriptor = -1
        self._thread: threading.Thread | None = None
        self._once = threading.Lock()

    @property
    def requested(self) -> bool:
        """Whether a stop has been requested."""
        return self.received is not None

    @property
    def exit_code(self) -> int:
        """Exit code 128 + signal number, as shells report it: 130 after Ctrl-C, 143 after SIGTERM, 129 after SIGHUP."""
        return 128 + (self.received or signal.SIGINT)

    def agree(self, number: int) -> None:
        """Stop because some rank has received the signal ``number``; called by all ranks after the same step."""
        self.received, self.agreed = self.received or number, True
        if self._sockets is not None:
            self._sockets[1].send(_WAKE_UP)  # The grace period of this rank begins.

    def __enter__(self) -> InterruptGuard:
        if not self.active:
            return self
        reader, writer = self._sockets = socket.socketpair()
        writer.setblocking(False)
        self._previous_descriptor = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        for number in caught_signals():
            self._previous[number] = signal.signal(number, self._handle)
        self._thread = threading.Thread(target=self._watch, args=(reader,), daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._sockets is None or self._thread is None:
            return
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._previous_descriptor)
        reader, writer = self._sockets
        self._sockets = None
        writer.close()
        self._thread.join()
        reader.close()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """Note a signal in the main thread; messages are left to the thread, since this may interrupt a print."""
        if number == SAVE_SIGNAL:
            self.save_requested = self.save_requested or self.graceful
            return
        self._handled += 1
        self.received = self.received or number
        if self._handled == 1 and not self.graceful:
            raise SignalReceived(number)

    def _watch(self, reader: socket.socket) -> None:
        """Read the numbers of signals until the other end is closed, and enforce the grace period."""
        seen, deadline = 0, None
        while True:
            # A timeout of 0 would be one that raises another error.
            reader.settimeout(None if deadline is None else max(0.001, deadline - time.monotonic()))
            try:
                numbers = reader.recv(64)
            except TimeoutError:
                self._end(f"Stopped {self.grace_seconds:g} s after the signal (trainer.grace_seconds)")
            if not numbers:
                return
            stops = [number for number in numbers if number in STOP_SIGNALS]
            if stops or 0 in numbers:
                deadline = deadline or time.monotonic() + self.grace_seconds
            if stops and not seen:
                self.received = self.received or stops[0]
                _run_briefly(self._stop_requested)
            seen += len(stops)
            if seen > 1:
                self._end("Stopped at once")
            if SAVE_SIGNAL in set(numbers) and not self.graceful:
                _run_briefly(self.on_save_outside_training)

    def _stop_requested(self) -> None:
        self.on_stop()
        if self.graceful:
            how = "press Ctrl-C again" if self.received == signal.SIGINT else "send a second signal"
            self.say(f"Stopping after this step and saving a checkpoint; {how} to stop at once.")

    def _end(self, why: str) -> NoReturn:
        """End the process."""

        def last_actions() -> None:
            self.say(f"{why}; {self.kept}.")
            self.before_forced_end()

        with self._once:  # never released
            _run_briefly(last_actions)
            os._exit(self.exit_code)


def _run_briefly(action: Callable[[], None]) -> None:
    """Run an action, but do not wait for it for long: a terminal or a disk may be blocked."""
    thread = threading.Thread(target=action, daemon=True)
    thread.start()
    thread.join(_ACTION_SECONDS)

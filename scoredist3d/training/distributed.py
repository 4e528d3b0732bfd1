"""Runs with several processes: the main process is rank 0 and starts the other ranks."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from scoredist3d.custom import loaded_folders
from scoredist3d.paths import PACKAGE
from scoredist3d.signals import STOP_SIGNALS, SignalReceived
from scoredist3d.training.interrupt import InterruptGuard

DeviceSpec = str | list[int]

_CONNECTION_ERRORS = ("gloo", "NCCL", "Connection closed", "Connection reset", "connection")
"""Parts of the messages of errors that torch.distributed raises if another rank has ended."""
SECONDS_UNTIL_REAPED = 5.0
"""Time within which the system reports the end of a process whose connections are closed."""


@dataclass(frozen=True)
class Devices:
    """Devices of a run, with one rank per device or CPU process.

    Attributes:
        kind: ``cpu`` or ``cuda``.
        indices: GPU numbers, or 0 .. n-1 for n CPU processes.
    """

    kind: str
    indices: tuple[int, ...]

    @classmethod
    def parse(cls, devices: DeviceSpec) -> Devices:
        """Parse ``"auto"`` (first GPU, else CPU), ``"cpu"``, ``"cpu:2"`` (two processes) or a list of GPU numbers.

        Raises:
            ValueError: ``devices`` has another form, or is an empty list.
        """
        import torch

        if devices == "auto":
            return cls("cuda", (0,)) if torch.cuda.is_available() else cls("cpu", (0,))
        if isinstance(devices, list) and devices:
            return cls("cuda", tuple(devices))
        if isinstance(devices, str):
            kind, _, count = devices.partition(":")
            if kind == "cpu" and (not count or (count.isdecimal() and int(count) > 0)):
                return cls("cpu", tuple(range(int(count or 1))))
        raise ValueError(f"devices must be 'auto', 'cpu', 'cpu:2' or GPU numbers such as [0, 1]; got {devices!r}")

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return len(self.indices)

    @property
    def first(self) -> str:
        """Device of rank 0 as a torch device string: ``cpu`` or ``cuda:<number>``."""
        return "cpu" if self.kind == "cpu" else f"cuda:{self.indices[0]}"

    def argument(self) -> str:
        """The ``--devices`` argument of the worker's command line."""
        return f"cpu:{self.world_size}" if self.kind == "cpu" else ",".join(map(str, self.indices))

    def describe(self) -> str:
        """Human-readable description of the devices, e.g. ``CPU, 2 processes``."""
        if self.kind == "cpu":
            return "CPU" if self.world_size == 1 else f"CPU, {self.world_size} processes"
        import torch

        names = [f"GPU {index} ({torch.cuda.get_device_name(index)})" for index in self.indices]
        return ", ".join(names)


class RankLostError(RuntimeError):
    """Error that ends a run because another rank has ended without it."""


@dataclass
class Workers:
    """Context manager that runs the processes of ranks 1 .. n-1.

    Workers read the resolved config from their standard input, because the run folder of a resumed run still holds the
    config of the previous session until the checkpoint is loaded. A worker exits when the process that started it
    exits. If a worker ends, the run ends, because the other ranks would wait for the worker forever.

    Attributes:
        devices: Devices of all ranks.
        folder: Folder of the run.
        config: Text of the resolved config.
        resume: Checkpoint to continue from.
        guard: Receives the signals of this process; told of the signals that end a worker.
        lost: Called with the reason before the process ends because of a worker.
        say: Prints a message.
        port: TCP port at which the ranks connect.
        processes: The running workers.
    """

    devices: Devices
    folder: Path
    config: str
    resume: Path | None
    guard: InterruptGuard
    lost: Callable[[str], None]
    say: Callable[[str], None]
    port: int = 0
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def __enter__(self) -> Workers:
        if self.devices.world_size > 1:
            self.port = free_port()
            for rank in range(1, self.devices.world_size):
                process = subprocess.Popen(self._command(rank), env=_worker_environment(), stdin=subprocess.PIPE)
                self.processes.append(process)
                assert process.stdin is not None
                with suppress(BrokenPipeError), process.stdin:  # The watch reports a worker that has ended already.
                    process.stdin.write(self.config.encode())
            self.guard.on_stop = self._wake_stopped
            threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *_: object) -> None:
        ended = None if error is None else self._cause(error)
        processes, self.processes = self.processes, []
        for process in processes:
            if kind is not None:
                process.kill()  # The worker would wait for this rank forever; it writes no files.
            try:
                process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if ended is not None:
            if self._stops_run(ended):
                self.say(ended.describe())
                raise SignalReceived(self.guard.received or signal.SIGTERM) from error
            raise RankLostError(ended.describe()) from error

    def kill(self) -> None:
        """Kill all workers, also stopped ones, before this process ends without leaving the context."""
        for process in self.processes:
            with suppress(OSError):
                process.kill()

    def _command(self, rank: int) -> list[str]:
        command = [sys.executable, "-P", "-m", "scoredist3d.training.worker", str(self.folder)]
        command += ["--rank", str(rank), "--devices", self.devices.argument(), "--port", str(self.port)]
        command += ["--parent", str(os.getpid())]
        for custom in loaded_folders():
            command += ["--custom", str(custom)]
        return command + (["--resume", str(self.resume)] if self.resume is not None else [])

    def _ended(self) -> _Ended | None:
        """The first worker that has ended early."""
        for rank, process in enumerate(list(self.processes), start=1):
            code = process.poll()
            if code not in (None, 0) and not (self.guard.agreed and code == self.guard.exit_code):
                return _Ended(rank, process.pid, code)
        return None

    def _cause(self, error: BaseException) -> _Ended | None:
        """The worker whose end caused an error of this rank; None if this rank failed by itself."""
        connection = is_connection_error(error)
        deadline = time.monotonic() + (SECONDS_UNTIL_REAPED if connection and self.processes else 0.0)
        while (ended := self._ended()) is None and time.monotonic() < deadline:
            time.sleep(0.02)
        return ended if ended is not None and (connection or ended.signal is not None) else None

    def _stops_run(self, ended: _Ended) -> bool:
        """Whether the end of a worker interrupts the run rather than failing it."""
        if ended.signal is not None and ended.signal in STOP_SIGNALS:
            self.guard.agree(ended.signal)
        return self.guard.requested

    def _wake_stopped(self) -> None:
        """Continue workers that are stopped (SIGSTOP), since all ranks have to save the last state together."""
        for process in self.processes:
            with suppress(OSError, AttributeError):  # Windows has no such signal.
                process.send_signal(signal.SIGCONT)

    def _watch(self) -> None:
        stopped: set[int] = set()
        while self.processes:
            ended = self._ended()
            if ended is not None:
                time.sleep(2.0)  # The end of a worker usually stops this rank as well, with a better message.
                if self.processes:
                    code = self.guard.exit_code if self._stops_run(ended) else 1
                    self.lost(ended.describe())
                    self.kill()
                    os._exit(code)
            for rank, process in enumerate(list(self.processes), start=1):
                if _is_stopped(process.pid) and self.guard.requested:
                    self._wake_stopped()
                elif _is_stopped(process.pid) and rank not in stopped:
                    stopped.add(rank)
                    self.say(
                        f"warning: rank {rank} (process {process.pid}) is stopped and the other ranks wait for it; "
                        f"continue it with kill -CONT {process.pid}"
                    )
            time.sleep(0.5)


@dataclass(frozen=True)
class _Ended:
    """A worker that has ended early, with the exit code of ``subprocess`` (negative for a signal)."""

    rank: int
    pid: int
    code: int

    @property
    def signal(self) -> int | None:
        """The signal that ended the process; None if it failed by itself."""
        if self.code < 0:
            return -self.code
        return self.code - 128 if self.code - 128 in STOP_SIGNALS else None

    def describe(self) -> str:
        """Message with the rank and the reason."""
        if self.signal is None:
            return f"rank {self.rank} failed with exit code {self.code}; see its message above"
        name = next((known.name for known in signal.Signals if known == self.signal), f"signal {self.signal}")
        if self.signal in STOP_SIGNALS:
            return f"rank {self.rank} (process {self.pid}) was stopped by {name}"
        hint = ", perhaps because the memory was full" if name == "SIGKILL" else ""
        return f"rank {self.rank} (process {self.pid}) was killed by {name}{hint}; resume from the last checkpoint"


def _is_stopped(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_STOPPED
    except psutil.Error:
        return False


def is_connection_error(error: BaseException) -> bool:
    """Whether torch.distributed raised an error because another rank has ended."""
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _CONNECTION_ERRORS)


def _worker_environment() -> dict[str, str]:
    """Environment variables with which workers import the same package as this process, whatever the current folder."""
    paths = [str(PACKAGE.parent), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(path for path in paths if path)}


def free_port() -> int:
    """An unused TCP port on this machine."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def end_with_parent(parent: int, rank: int, guard: InterruptGuard) -> None:
    """End this process, which has the given rank, soon after its parent, rank 0, has ended."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        if rank == 1 and not guard.requested:
            with suppress(OSError):
                print(
                    f"error: rank 0 (process {parent}) has ended, so the other ranks end, too; resume the run from its "
                    "last checkpoint",
                    file=sys.stderr,
                    flush=True,
                )
        os._exit(guard.exit_code if guard.requested else 1)

    threading.Thread(target=watch, daemon=True).start()

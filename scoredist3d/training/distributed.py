"""Runs with several processes: the main process is rank 0 and starts the other ranks."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from scoredist3d.custom import loaded_folders
from scoredist3d.paths import PACKAGE

DeviceSpec = str | list[int]


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


@dataclass
class Workers:
    """Context manager that runs the processes of ranks 1 .. n-1.

    Workers read the resolved config from a temporary file, because the run folder of a resumed run still holds the
    config of the previous session until the checkpoint is loaded. A worker exits when the process that started it
    exits. If a worker fails, the run ends, because the other ranks would wait for the worker forever.

    Attributes:
        devices: Devices of all ranks.
        folder: Folder of the run.
        config: Text of the resolved config.
        resume: Checkpoint to continue from.
        lost: Called with the reason when a worker fails.
        port: TCP port at which the ranks connect.
        config_file: Temporary file with ``config``.
        processes: The running workers.
    """

    devices: Devices
    folder: Path
    config: str
    resume: Path | None
    lost: Callable[[str], None]
    port: int = 0
    config_file: Path | None = None
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def __enter__(self) -> Workers:
        if self.devices.world_size > 1:
            self.port = free_port()
            descriptor, name = tempfile.mkstemp(prefix="scoredist3d-", suffix=".yaml")
            self.config_file = Path(name)
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(self.config)
            for rank in range(1, self.devices.world_size):
                self.processes.append(subprocess.Popen(self._command(rank), env=_worker_environment()))
            threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        processes, self.processes = self.processes, []
        for process in processes:
            if kind is not None:
                process.kill()  # The worker would wait for this rank forever; it writes no files.
            try:
                process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if self.config_file is not None:
            self.config_file.unlink(missing_ok=True)

    def _command(self, rank: int) -> list[str]:
        command = [sys.executable, "-P", "-m", "scoredist3d.training.worker", str(self.folder)]
        command += ["--config", str(self.config_file)]
        command += ["--rank", str(rank), "--devices", self.devices.argument(), "--port", str(self.port)]
        command += ["--parent", str(os.getpid())]
        for custom in loaded_folders():
            command += ["--custom", str(custom)]
        return command + (["--resume", str(self.resume)] if self.resume is not None else [])

    def _watch(self) -> None:
        while processes := list(self.processes):
            for rank, process in enumerate(processes, start=1):
                code = process.poll()
                if code not in (None, 0) and self.processes:
                    time.sleep(2.0)  # The same error usually stops this rank as well, with a better message.
                    if self.processes:
                        self.lost(f"rank {rank} failed with exit code {code}; see its message above")
                        os._exit(1)
            time.sleep(0.5)


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


def end_with_parent(parent: int) -> None:
    """End this process soon after its parent has exited."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()

"""Runs in processes of their own, to which tests send signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

from shared.tiny_runs import plain

HANG = 600.0  # seconds; not a measure of speed, but a limit for a test that hangs
ENDLESS = 10**6


@dataclass
class RunningCommand:
    """A command that runs in a process of its own, with its output in a file."""

    process: subprocess.Popen[bytes]
    output: Path
    runs: Path

    @property
    def folder(self) -> Path:
        (folder,) = self.runs.glob("*/*")
        return folder

    @property
    def text(self) -> str:
        return self.output.read_text()

    @property
    def workers(self) -> list[int]:
        """The processes of ranks 1 .. n-1."""
        children = psutil.Process(self.process.pid).children()
        return [child.pid for child in children if "scoredist3d.training.worker" in child.cmdline()]

    def wait_until(self, condition: Callable[[], Any], what: str) -> None:
        deadline = time.monotonic() + HANG
        while not condition():
            assert self.process.poll() is None and time.monotonic() < deadline, f"no {what}: {self.text}"
            time.sleep(0.05)

    def wait_for_steps(self) -> None:
        """Wait until a few steps are done."""
        self.wait_until(
            lambda: any(len(f.read_text().splitlines()) > 2 for f in self.runs.glob("*/*/metrics.csv")), "step"
        )

    def end(self) -> int:
        """Exit code of the process."""
        return self.process.wait(timeout=HANG)


@contextmanager
def training(folder: Path, devices: str = "cpu", *, prelude: str = "", **changes: Any) -> Iterator[RunningCommand]:
    """Context manager with a training that would take forever; ``prelude`` is code that its process runs first."""
    config = plain(folder / "out", "text-to-2d", **{"preview": {"every_n_steps": 0}, **changes})
    config["trainer"] = {"max_steps": ENDLESS} | changes.get("trainer", {})
    config["log"] = {"every_n_steps": 1, "tensorboard": False}
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    with command(folder, ["--config", str(file), "--train", "--gpu", devices], prelude=prelude) as run:
        yield run


@contextmanager
def command(folder: Path, arguments: list[str], *, prelude: str = "") -> Iterator[RunningCommand]:
    """Context manager with a command whose runs are in ``folder/out``, and which is killed at the end."""
    # SIGHUP is ignored where the tests run under nohup.
    default = "signal.signal(signal.SIGHUP, signal.SIG_DFL)"
    code = f"import signal, sys\n{default}\n{prelude}\nfrom scoredist3d.cli import main\nsys.exit(main(sys.argv[1:]))"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    output = folder / "output.txt"
    with (
        output.open("wb") as stream,
        subprocess.Popen(
            [sys.executable, "-c", code, *arguments], stdout=stream, stderr=stream, env=environment
        ) as process,
    ):
        children: list[psutil.Process] = []
        try:
            yield RunningCommand(process, output, folder / "out")
        finally:
            if process.poll() is None:
                children = psutil.Process(process.pid).children()
                process.send_signal(signal.SIGKILL)
            for child in children:
                if child.is_running():
                    child.kill()

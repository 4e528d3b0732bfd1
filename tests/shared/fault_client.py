"""The client of the process that runs commands with faults (:mod:`shared.fault_server`)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

_TESTS = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class CommandOutcome:
    """Exit code and output of a command."""

    code: int
    text: str


class FaultServer:
    """Context manager with a process that runs commands, one after another."""

    def __enter__(self) -> FaultServer:
        paths = [str(_TESTS), str(_TESTS.parent)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "shared.fault_server"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()

    def run(self, arguments: list[str], output: Path, **fault: Any) -> CommandOutcome:
        """Run a command with a fault; its output goes to the file ``output``."""
        request = {"fault": "none", **fault, "arguments": arguments, "output": str(output)}
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(f"{json.dumps(request)}\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, "the fault server has ended"
        return CommandOutcome(json.loads(answer)["code"], output.read_text(errors="replace"))

    def prepare(self, modules: list[str]) -> None:
        """Import modules in the server, so that its children need not."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{json.dumps({'modules': modules})}\n")
        self._process.stdin.flush()

"""A process that runs commands of the program in forked children, with a fault in each, and waits for their end.

Imports take seconds, and a run of the tests' size takes less. The server imports everything once, in one thread; a
forked child continues from there. Requests and answers are lines of JSON on the standard input and output.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import torch

from scoredist3d import cli
from scoredist3d.training import run, snapshot
from scoredist3d.training.fit import import_lightning
from shared.disk_records import DiskRecord
from shared.file_operations import FileOperations

KILLED = 137
_BECOME_SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER of prctl(2): orphans of a killed child become children of this process.


def main() -> None:
    """Answer requests until the standard input ends."""
    ctypes.CDLL(None).prctl(_BECOME_SUBREAPER, 1, 0, 0, 0)
    torch.set_num_threads(1)
    import_lightning()
    assert run is not None
    _keep_answers()
    for line in sys.stdin:
        request = json.loads(line)
        for name in request.get("modules", []):
            with suppress(Exception):  # Some modules can only be imported by their own packages.
                importlib.import_module(name)
        if "arguments" in request:
            print(json.dumps({"code": _run(request)}), flush=True)


def _keep_answers() -> None:
    """Ask only once for what does not depend on files of a run: packages and the state of the repository."""
    packages, state = snapshot.installed_packages(), snapshot.git_state(Path(snapshot.__file__).parent)
    snapshot.installed_packages = lambda: packages
    snapshot.git_state = lambda folder: state


def _run(request: dict[str, Any]) -> int:
    """Exit code of the command; programs that it has started have ended as well."""
    child = os.fork()
    if child == 0:
        _child(request)
    _, status = os.waitpid(child, 0)
    with suppress(ChildProcessError):
        while True:
            os.waitpid(-1, 0)
    return os.waitstatus_to_exitcode(status)


def _child(request: dict[str, Any]) -> NoReturn:
    code = 1
    try:
        output = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(output, 1)
        os.dup2(output, 2)
        with open("/dev/null") as nothing:
            os.dup2(nothing.fileno(), 0)
        finish = _FAULTS[request["fault"]](request)
        code = cli.main(request["arguments"])
        sys.stdout.flush()
        finish()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _count(request: dict[str, Any]) -> Callable[[], None]:
    """No fault: list the operations and the imported modules."""
    seen: list[str] = []
    operations = FileOperations(Path(request["root"]), lambda number, kind, path: seen.append(f"{kind} {path}"))
    operations.install()

    def finish() -> None:
        operations._busy = True
        Path(request["result"]).write_text(json.dumps({"operations": seen, "modules": sorted(sys.modules)}))

    return finish


def _kill(request: dict[str, Any]) -> Callable[[], None]:
    """End the process ahead of an operation, as SIGKILL does: nothing is flushed or cleaned up."""

    def before(number: int, kind: str, path: str) -> None:
        if number == request["at"]:
            os._exit(KILLED)

    FileOperations(Path(request["root"]), before).install()
    return lambda: None


def _record(request: dict[str, Any]) -> Callable[[], None]:
    """No fault: record the states of the disk for simulated power cuts."""
    record = DiskRecord(Path(request["root"]))
    operations = FileOperations(Path(request["root"]), record.before, record.after_sync)
    operations.install()

    def finish() -> None:
        operations._busy = True
        record.before(operations.count + 1, "end", request["root"])
        record.save(Path(request["result"]))

    return finish


def _fill(request: dict[str, Any]) -> Callable[[], None]:
    """Fill the disk ahead of the first operation whose description contains a text; ``spare`` bytes remain."""
    done: list[str] = []

    def before(number: int, kind: str, path: str) -> None:
        if done or request["text"] not in f"{kind} {path}":
            return
        done.append(path)
        disk = os.statvfs(request["disk"])
        size = disk.f_bavail * disk.f_frsize - request["spare"]
        with open(Path(request["disk"]) / "ballast", "wb") as file:
            os.posix_fallocate(file.fileno(), 0, size)

    FileOperations(Path(request["root"]), before).install()
    return lambda: None


def _nothing(request: dict[str, Any]) -> Callable[[], None]:
    return lambda: None


_FAULTS = {"count": _count, "kill": _kill, "record": _record, "fill": _fill, "none": _nothing}


if __name__ == "__main__":
    main()

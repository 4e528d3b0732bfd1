"""Operations on the files below a folder, seen before they take place, in this process.

An audit hook reports what Python does: files opened for writing, renames, links, deletions, folders and truncations,
and programs started with a path below the folder. ``os.fsync`` and the exchange of two folders have no audit event of
their own; they are replaced by functions that report them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scoredist3d.training import replacement

_NO_FOLDER = -1
_CHANGES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_PATHS: dict[str, list[tuple[int, int | None]]] = {
    "os.rename": [(0, 2), (1, 3)],
    "os.link": [(0, 2), (1, 3)],
    "os.symlink": [(1, 2)],
    "os.remove": [(0, 1)],
    "os.rmdir": [(0, 1)],
    "os.mkdir": [(0, 2)],
    "os.truncate": [(0, None)],
}
"""Positions of the paths, and of the folders they are relative to, in the arguments of audit events."""


class FileOperations:
    """Calls ``before(number, kind, path)`` ahead of every operation below ``root``, counted from 1.

    ``after_sync(descriptor)`` is called once a file or folder below ``root`` has been made durable. Operations of the
    two functions themselves do not count.
    """

    def __init__(
        self,
        root: Path,
        before: Callable[[int, str, str], None],
        after_sync: Callable[[int], None] = lambda descriptor: None,
    ) -> None:
        self.root, self.before, self.after_sync = str(root.absolute()), before, after_sync
        self.count = 0
        self._busy = False

    def install(self) -> None:
        """Begin; an audit hook cannot be removed, so this is for processes that end afterwards."""
        synchronize, exchange = os.fsync, replacement._exchange

        def fsync(descriptor: Any) -> None:
            number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
            path = _path_of(number)
            self._report("fsync", path)
            synchronize(descriptor)
            if self._is_below(path):
                self._run(self.after_sync, number)

        def exchange_folders(first: Path, second: Path) -> bool:
            self._report("exchange", str(second))
            return exchange(first, second)

        os.fsync = fsync
        replacement._exchange = exchange_folders
        sys.addaudithook(self._audit)

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self._busy:
            return
        if event == "open":
            path, _, flags = arguments
            if isinstance(path, (str, bytes, os.PathLike)) and flags & _CHANGES:
                self._report("open", _absolute(path))
        elif event in _PATHS:
            for place, relative_to in _PATHS[event]:
                path = arguments[place]
                folder = _NO_FOLDER if relative_to is None else arguments[relative_to]
                name = _path_of(path) if isinstance(path, int) else _absolute(path, folder)
                if self._is_below(name):
                    self._report(event.removeprefix("os."), name)
                    return
        elif event == "subprocess.Popen":
            named = [str(argument) for argument in arguments[1] if self._is_below(str(argument))]
            for path in named[:1]:
                self._report("program", path)

    def _report(self, kind: str, path: str) -> None:
        if self._is_below(path):
            self.count += 1
            self._run(self.before, self.count, kind, path)

    def _run(self, function: Callable[..., None], *arguments: Any) -> None:
        if self._busy:
            return
        self._busy = True
        try:
            function(*arguments)
        finally:
            self._busy = False

    def _is_below(self, path: str) -> bool:
        return path == self.root or path.startswith(f"{self.root}/")


def _absolute(path: Any, folder: int = _NO_FOLDER) -> str:
    name = os.fsdecode(path)
    return os.path.join(_path_of(folder) if folder != _NO_FOLDER else os.getcwd(), name)


def _path_of(descriptor: int) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}")
    except OSError:
        return ""

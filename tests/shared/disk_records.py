"""What a disk may hold after a power cut, from a record of the operations of a run.

A file is known by its inode. The record has the tree as the program sees it ahead of each operation, the content that
each file had when it was last made durable, and the entries that each folder had when it was. Content is read from the
disk, so files of other programs and of compiled code are covered.
"""

from __future__ import annotations

import os
import pickle
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

Key = tuple[int, int]
"""Inode number, and how often the number has been used before."""


class Survival(Enum):
    """What survives a power cut besides the data that was made durable.

    Attributes:
        SYNCED: Folders as they were when they were last synchronized; other data is lost.
        HALF: As SYNCED, but of a file that has grown since it was synchronized, half of the new data is there.
        NAMES: All changes of folders; data that was not made durable is lost.
    """

    SYNCED = "synced"
    HALF = "half"
    NAMES = "names"


@dataclass
class DiskState:
    """The disk ahead of one operation; contents are shared between states.

    Attributes:
        operation: Description of the operation.
        root: The folder of which the others are descendants.
        folders: Entries of all folders, as the program sees them.
        files: Contents of all files, as the program sees them.
        synced_folders: Entries of folders when they were last synchronized.
        synced_files: Contents of files when they were last synchronized.
    """

    operation: str
    root: Key
    folders: dict[Key, dict[str, Key]]
    files: dict[Key, bytes]
    synced_folders: dict[Key, dict[str, Key]]
    synced_files: dict[Key, bytes]

    def after_power_cut(self, survival: Survival) -> dict[str, bytes | None]:
        """Content of each file by relative path; None for folders."""
        found: dict[str, bytes | None] = {}
        places = {child: folder for folder, entries in self.folders.items() for child in entries.values()}

        def walk(folder: Key, prefix: str) -> None:
            entries = (self.folders if survival is Survival.NAMES else self.synced_folders).get(folder, {})
            for name, key in entries.items():
                if key not in self.all_folders:
                    found[prefix + name] = self._content(key, survival)
                    continue
                place = places.get(key, folder)
                if place != folder and key in self.synced_folders.get(place, {}).values():
                    continue  # A folder is never in two places: its move to the other one has become durable.
                found[prefix + name] = None
                walk(key, f"{prefix}{name}/")

        walk(self.root, "")
        return found

    @property
    def all_folders(self) -> set[Key]:
        """Folders that exist or have been synchronized."""
        return {*self.folders, *self.synced_folders}

    def entries(self, path: str) -> dict[str, Key]:
        """Entries of the folder at a relative path, as the program sees them."""
        key = self.root
        for part in path.split("/"):
            key = self.folders[key][part]
        return self.folders[key]

    def _content(self, key: Key, survival: Survival) -> bytes:
        synced = self.synced_files.get(key, b"")
        live = self.files.get(key, synced)
        if survival is Survival.HALF and live.startswith(synced):
            return live[: (len(synced) + len(live)) // 2]
        return synced


@dataclass
class DiskRecord:
    """Records the states of the disk below ``root``; what exists at the beginning counts as durable."""

    root: Path
    states: list[DiskState] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._uses: dict[int, int] = {}
        self._alive: set[int] = set()
        self._read: dict[Key, tuple[tuple[int, int], bytes]] = {}
        self._synced_folders, self._synced_files, _ = self._look()

    def before(self, number: int, kind: str, path: str) -> None:
        """Record the disk ahead of an operation."""
        folders, files, root = self._look()
        relative = os.path.relpath(path, self.root)
        self.states.append(
            DiskState(f"{kind} {relative}", root, folders, files, dict(self._synced_folders), dict(self._synced_files))
        )

    def after_sync(self, descriptor: int) -> None:
        """Note the content of the file or the entries of the folder that has been synchronized."""
        folders, files, _ = self._look()
        inode = os.fstat(descriptor).st_ino
        key = (inode, self._uses.get(inode, 0))
        if key in folders:
            self._synced_folders[key] = folders[key]
        elif key in files:
            self._synced_files[key] = files[key]

    def save(self, path: Path) -> None:
        """Write the states; :func:`load_states` reads them."""
        path.write_bytes(pickle.dumps(self.states))

    def _look(self) -> tuple[dict[Key, dict[str, Key]], dict[Key, bytes], Key]:
        """Folders and files as they are now, and the key of the root."""
        found: list[tuple[str, int, dict[str, os.DirEntry[str]]]] = []
        inodes: set[int] = set()
        todo = [(str(self.root), os.stat(self.root).st_ino)]
        while todo:
            path, inode = todo.pop()
            with os.scandir(path) as entries:
                children = {entry.name: entry for entry in entries}
            found.append((path, inode, children))
            inodes |= {inode, *(entry.inode() for entry in children.values())}
            todo += [(e.path, e.inode()) for e in children.values() if e.is_dir(follow_symlinks=False)]
        for inode in inodes - self._alive:
            self._uses[inode] = self._uses.get(inode, -1) + 1
        self._alive = inodes
        folders: dict[Key, dict[str, Key]] = {}
        files: dict[Key, bytes] = {}
        for _, inode, children in found:
            folders[self._key(inode)] = {name: self._key(entry.inode()) for name, entry in children.items()}
            for entry in children.values():
                if not entry.is_dir(follow_symlinks=False):
                    files[self._key(entry.inode())] = self._content(entry)
        return folders, files, self._key(found[0][1])

    def _key(self, inode: int) -> Key:
        return inode, self._uses[inode]

    def _content(self, entry: os.DirEntry[str]) -> bytes:
        key, status = self._key(entry.inode()), entry.stat(follow_symlinks=False)
        version = (status.st_size, status.st_mtime_ns)
        if self._read.get(key, (None, b""))[0] != version:
            self._read[key] = (version, Path(entry.path).read_bytes())
        return self._read[key][1]


def load_states(path: Path) -> list[DiskState]:
    """The states of a record, in the order of the operations."""
    states: list[DiskState] = pickle.loads(path.read_bytes())
    return states

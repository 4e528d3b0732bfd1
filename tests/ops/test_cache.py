"""Cache files: durable writing, folders that cannot be written, failures that leave nothing behind."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from scoredist3d.ops import cache


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    cache._temporary_folder.cache_clear()
    yield tmp_path / "cache" / "scoredist3d"
    cache._temporary_folder.cache_clear()


def write(path: Path) -> None:
    path.write_bytes(b"content")


def test_a_file_is_found_again_by_stem_and_suffix(folder: Path) -> None:
    assert cache.find("grid-8", ".bin") is None
    path = cache.store("grid-8", ".bin", write)
    assert path.parent == folder and re.fullmatch(r"grid-8-[0-9a-f]{24}\.bin", path.name)
    assert cache.find("grid-8", ".bin") == path and path.read_bytes() == b"content"
    assert cache.find("grid-8", ".so") is None and cache.find("grid", ".bin") is None


def test_the_content_is_on_the_disk_before_the_name(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: (calls.append("fsync"), fsync(descriptor))[1])
    monkeypatch.setattr(os, "replace", lambda old, new: (calls.append("replace"), replace(old, new))[1])
    cache.store("grid-8", ".bin", write)
    assert calls[:2] == ["fsync", "replace"]


def test_a_full_disk_leaves_nothing_behind(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        cache.store("grid-8", ".bin", write)
    assert list(folder.iterdir()) == []


def test_a_read_only_folder_is_read_and_another_one_is_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = cache.store("grid-8", ".bin", write)
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert cache.find("grid-8", ".bin") == path
    other = cache.store("grid-10", ".bin", write)
    assert other.parent != folder and cache.find("grid-10", ".bin") == other
    assert cache.store("grid-12", ".bin", write).parent == other.parent

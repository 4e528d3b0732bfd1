"""Full disks, read-only folders and unreadable files: one sentence with the path and what to do, never a traceback."""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import yaml
from faults.conftest import Mount
from shared.tiny_runs import Recorder, plain

from scoredist3d import cli
from scoredist3d.export import video
from scoredist3d.files import atomic_file, atomic_path, read_json, read_text, sync_tree, write_json
from scoredist3d.ops import native
from scoredist3d.reasons import os_reason, reason
from scoredist3d.training import session, snapshot, summary
from scoredist3d.training.console import log_to
from scoredist3d.training.folder import RunFolder, kept_checkpoints, step_of
from scoredist3d.training.metrics import MetricsFile
from scoredist3d.training.snapshot import save_snapshot

FULL = "the disk is full; free some space, or write to another disk"
AGAIN = "No checkpoint has been saved yet, so start the run again once there is space"


def full(*_: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def train(file: Path, root: Path, *, steps: int = 1, **changes: Any) -> int:
    file.write_text(yaml.safe_dump(plain(root, trainer={"max_steps": steps}, **changes)))
    return cli.main(["--config", str(file), "--train", "--gpu", "cpu"])


def one_sentence(text: str) -> str:
    """The error message that the command line printed, checked to be the only one."""
    assert "Traceback" not in text and "--verbose" not in text
    (line,) = text.strip().splitlines()
    assert line.startswith("error: ") and len(line) < 500
    return line


@pytest.mark.parametrize("writer", [atomic_file, atomic_path])
def test_a_full_disk_is_named_and_the_old_file_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writer: Any
) -> None:
    path = tmp_path / "file.json"
    path.write_text("old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError) as caught, writer(path) as opened:
        (opened.write if hasattr(opened, "write") else opened.write_bytes)(b"new")
    assert reason(caught.value) == f"{path}: {FULL}"
    assert os.listdir(tmp_path) == ["file.json"] and path.read_text() == "old"


def test_a_full_disk_without_a_mount(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "fsync", full)
    assert train(tmp_path / "config.yaml", tmp_path / "out") == cli.RUN_FAILED
    said = one_sentence(capsys.readouterr().err)
    assert re.fullmatch(rf"error: {tmp_path}/out/\S+/configs/\S+: {FULL}\. {AGAIN}", said)


@pytest.mark.parametrize("size", ["4k", "40k", "64k"])
def test_a_full_disk_is_one_sentence(
    tmp_path: Path, mount: Mount, capsys: pytest.CaptureFixture[str], size: str
) -> None:
    disk = mount(f"size={size}")
    assert train(tmp_path / "config.yaml", disk) == cli.RUN_FAILED
    said = one_sentence(capsys.readouterr().err)
    assert said.startswith(f"error: {disk}/") and said.endswith((FULL, f"{FULL}. {AGAIN}"))


def test_a_run_continues_once_there_is_space(
    tmp_path: Path, mount: Mount, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(snapshot, "git_state", lambda *_: {})  # Uncommitted changes may fill the disk.
    disk = mount("size=300k")
    changes = {"checkpoint": {"every_n_steps": 1, "keep": 100}, "preview": {"every_n_steps": 0}}
    assert train(tmp_path / "config.yaml", disk, steps=60, **changes) == cli.RUN_FAILED
    said = one_sentence(capsys.readouterr().err)
    (run,) = disk.glob("*/*")
    continuing = r"The checkpoint of step (\d+) is kept\. To continue once there is space: python launch\.py (.+)"
    found = re.search(continuing, said)
    assert FULL in said and found is not None and found[2] == f"--train --resume {run}"
    assert step_of(kept_checkpoints(run / "ckpts")[-1]) == int(found[1])
    subprocess.run(["mount", "-o", "remount,size=8m", disk], check=True)
    end = int(found[1]) + 1
    allowed = ["--allow-change", "trainer.max_steps", f"trainer.max_steps={end}", "--gpu", "cpu"]
    assert cli.main([*found[2].split(), *allowed]) == cli.OK
    assert read_json(run / "summary.json")["step"] == end and not list(run.rglob(".*"))


@pytest.mark.parametrize("filled", ["after the first stage", "in the second stage"])
def test_a_pipeline_on_a_full_disk_says_how_to_continue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], filled: str
) -> None:
    def after_first(path: Path, content: Any) -> Path:
        write_json(path, content)
        if path.parent.name == "coarse" and content["status"] == "done":
            monkeypatch.setattr(os, "fsync", full)
        return path

    def in_second(folder: RunFolder, *arguments: Any) -> int:
        if folder.root.name == "refine":
            monkeypatch.setattr(os, "fsync", full)
        return save_snapshot(folder, *arguments)

    between = filled == "after the first stage"
    if between:
        monkeypatch.setattr(summary, "write_json", after_first)
    else:
        monkeypatch.setattr(session, "save_snapshot", in_second)
    stages: dict[str, Any] = {"coarse": {}, "refine": {}}
    assert train(tmp_path / "config.yaml", tmp_path / "out", name="two", stages=stages) == cli.RUN_FAILED
    said = one_sentence(capsys.readouterr().err)
    (root,) = (tmp_path / "out").glob("*/*")
    assert FULL in said and said.endswith(f"To continue once there is space: python launch.py --train --resume {root}")
    assert said.startswith(f"error: {root}" if between else f"error: stage refine, {root}")
    monkeypatch.undo()
    assert cli.main(["--train", "--resume", str(root), "--gpu", "cpu"]) == cli.OK
    assert "coarse: already done" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("size", range(4, 160, 8))
def test_a_disk_that_fills_anywhere_is_one_sentence(
    tmp_path: Path, mount: Mount, capsys: pytest.CaptureFixture[str], size: int
) -> None:
    disk = mount(f"size={size}k")
    code = train(tmp_path / "config.yaml", disk, log={"tensorboard": True})
    out, err = capsys.readouterr()
    if code == cli.OK:
        return
    last = err.strip() or out.strip().splitlines()[-1]
    assert last.startswith("error: ") and "full" in last and "Traceback" not in out + err


def test_a_read_only_folder_is_one_sentence(tmp_path: Path, mount: Mount, capsys: pytest.CaptureFixture[str]) -> None:
    disk = mount("size=1m,ro")
    assert train(tmp_path / "config.yaml", disk) == cli.RUN_FAILED
    said = one_sentence(capsys.readouterr().err)
    advice = "write to another folder, or work on a copy of this one"
    assert said == f"error: {disk}/scoredist3d: the file system is read-only; {advice}"


def test_a_read_only_folder_without_a_mount(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(self: Path, *_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    assert train(tmp_path / "config.yaml", tmp_path / "out") == cli.RUN_FAILED
    said = one_sentence(capsys.readouterr().err)
    assert said.endswith("permission denied; change the permissions, or use another folder") and "/out" in said


def test_data_that_cannot_be_synced_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system may report a full disk only then, without a name."""
    metrics = MetricsFile(tmp_path / "metrics.csv")
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "a.glb").touch()
    monkeypatch.setattr(os, "fsync", full)
    for write, named in (
        (metrics.sync, "metrics.csv"),
        (lambda: sync_tree(tmp_path / "export"), "export/a.glb"),
        (lambda: write_json(tmp_path / "summary.json", {}), "summary.json"),
    ):
        with pytest.raises(OSError) as caught:
            write()
        assert reason(caught.value) == f"{tmp_path}/{named}: {FULL}"


def test_products_on_a_full_disk_name_their_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(video._Pillow, "add", full)
    monkeypatch.setattr(Path, "write_bytes", full)
    formats: dict[str, Any] = {"test": {"format": "webp"}, "exporter": {"formats": ["glb"]}}
    assert train(tmp_path / "config.yaml", tmp_path / "out", **formats) == cli.RUN_FAILED
    said = capsys.readouterr().out
    (run,) = (tmp_path / "out").glob("*/*")
    assert f"{run}/videos: {FULL}" in said and f"{run}/export: {FULL}" in said


def test_a_thread_that_cannot_write_is_one_line() -> None:
    console = Recorder()
    with log_to(console):
        thread = threading.Thread(target=full)
        thread.start()
        thread.join()
    assert console.text == f"warning: {FULL}\n"


def test_copied_folders_name_the_file_that_failed(tmp_path: Path, mount: Mount) -> None:
    (tmp_path / "custom").mkdir()
    (tmp_path / "custom" / "big.py").write_bytes(b"#" * 20000)
    disk = mount("size=8k")
    with pytest.raises(shutil.Error) as caught:
        shutil.copytree(tmp_path / "custom", disk / "custom")
    assert reason(caught.value) == f"{disk}/custom/big.py: {FULL}"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"step,loss\n1,\xff\xfe\n", "not a UTF-8 text file; save it with the encoding UTF-8"),
        ("step,loss\n1,2\n".encode("utf-16"), "not a UTF-8 text file"),
        (b"step,loss\nx,2\n", "a row has no step, a whole number; rename the file"),
        (b"loss\n2\n", "a row has no step, a whole number; rename the file"),
        (b"step," + b"9" * 200_000 + b"\n1,2\n", "not a CSV file (field larger than field limit (131072)); rename it"),
    ],
)
def test_unreadable_metrics_are_named(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "metrics.csv"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="metrics") as caught:
        MetricsFile(path, resume_step=1)
    assert str(caught.value).startswith(f"{path}: {said}")
    assert path.read_bytes() == content


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1"])
def test_a_config_in_another_encoding_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], encoding: str
) -> None:
    file = tmp_path / "config.yaml"
    file.write_bytes("prompt: ein grüner Krug\n".encode(encoding))
    assert cli.main(["--config", str(file), "--train"]) == cli.USAGE_ERROR
    said = one_sentence(capsys.readouterr().err)
    assert str(file) in said and "not a UTF-8 text file; save it with the encoding UTF-8" in said


def test_other_text_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"a\.txt: not a UTF-8 text file; save it"):
        read_text(tmp_path / "a.txt")


def test_reasons_of_system_errors() -> None:
    assert os_reason(OSError("written by this program")) == "written by this program"
    assert os_reason(FileNotFoundError(errno.ENOENT, "No such file", "/a/b")).startswith("/a/b: there is no such file")
    assert os_reason(OSError(errno.EBUSY, "Device or resource busy")) == (
        "Device or resource busy; check the disk and the path"
    )
    assert reason(RuntimeError()) == "RuntimeError" and reason(RuntimeError("a")) == "RuntimeError: a"


def test_a_missing_compiler_with_a_read_only_cache_is_a_sentence(tmp_path: Path, mount: Mount) -> None:
    """The operators then run in torch, and grids are generated in every process."""
    disk, empty = mount("size=1m,ro"), tmp_path / "empty"
    empty.mkdir()
    code = (
        "import logging, sys; logging.basicConfig(level=logging.INFO, format='%(message)s')\n"
        "from scoredist3d.ops import native\n"
        "from scoredist3d.ops.isosurface.tetrahedra import tetrahedral_grid\n"
        "print(native.available(), native.unavailable_reason()); print(len(tetrahedral_grid(4).tets))"
    )
    environment = {**os.environ, "XDG_CACHE_HOME": str(disk), "PATH": str(empty), "TMPDIR": str(disk)}
    environment.pop("CC", None)
    environment.pop("SCOREDIST3D_NATIVE", None)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "False no C compiler found; install one (for example `apt install gcc`) or set $CC",
        "144",
    ]


@pytest.mark.skipif(not native._compilers(), reason="no C compiler")
def test_kernels_that_cannot_be_stored_have_a_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("SCOREDIST3D_NATIVE", raising=False)
    monkeypatch.setattr(native, "_OPTIONAL_FLAGS", ((),))
    monkeypatch.setattr(native, "_compile", lambda command, path: path.write_bytes(b"library"))
    monkeypatch.setattr(os, "fsync", full)
    assert native._load.__wrapped__() == (
        None,
        f"{tmp_path}/scoredist3d: {FULL} ($XDG_CACHE_HOME chooses the cache folder)",
    )


def test_json_is_not_written_in_part(tmp_path: Path, mount: Mount) -> None:
    disk = mount("size=4k")
    write_json(disk / "a.json", {"a": 1})
    with pytest.raises(OSError) as caught:
        write_json(disk / "a.json", {"a": "x" * 10_000})
    assert reason(caught.value) == f"{disk}/a.json: {FULL}"
    assert (disk / "a.json").read_text() == '{\n  "a": 1\n}\n'

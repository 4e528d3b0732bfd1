"""Run folders: the lock, leftovers of killed runs, and sets of files that are replaced as one."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from shared.signalled_runs import HANG, training
from shared.tiny_runs import Recorder, make, plain

from scoredist3d import cli
from scoredist3d.files import make_folder, remove_leftovers, write_atomically, write_json
from scoredist3d.reasons import reason
from scoredist3d.training import replacement as replacement_module
from scoredist3d.training.checkpoint import read_checkpoint
from scoredist3d.training.folder import PIPELINE_CONFIG, find_run
from scoredist3d.training.lock import locked, locked_stage
from scoredist3d.training.replacement import Replacement, finish_replacement
from scoredist3d.training.run import run_training

HOLDER = """
import sys
from pathlib import Path
from scoredist3d.training.lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""

# The lock


@pytest.mark.parametrize("killed", [False, True])
def test_a_lock_names_its_holder_and_ends_with_it(tmp_path: Path, killed: bool) -> None:
    folder = tmp_path / "run"
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None and process.stdout is not None and process.stdout.readline() == "held\n"
        message = rf"run is in use by process {process.pid} on .+, started 2.+; wait"
        with pytest.raises(ValueError, match=message), locked(folder):
            pass
        assert set(json.loads((folder / ".lock").read_text())) == {"host", "pid", "started"}
        write_atomically(folder / "file", "content")
        if killed:
            process.send_signal(signal.SIGKILL)
        else:
            process.stdin.close()
        process.wait(timeout=HANG)
    assert (folder / ".lock").exists() is killed
    with locked(folder):
        pass
    assert [path.name for path in folder.iterdir()] == ["file"]


def test_a_lock_that_its_holder_deletes_is_not_taken_for_the_new_one(tmp_path: Path) -> None:
    first = locked(tmp_path / "run")
    first.__enter__()
    (tmp_path / "run" / ".lock").unlink()
    with locked(tmp_path / "run"):
        first.__exit__(None, None, None)


def test_a_stage_is_locked_with_its_pipeline(tmp_path: Path) -> None:
    write_atomically(tmp_path / PIPELINE_CONFIG, "stages: {}\n")
    with locked(tmp_path), pytest.raises(ValueError, match="is in use by process"), locked_stage(tmp_path / "refine"):
        pass
    with locked(tmp_path), locked(tmp_path / "refine"):  # an export of one stage while another is trained
        pass


def test_a_folder_in_use_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run_training(make(tmp_path, "text-to-2d"), devices="cpu", console=Recorder()).folder
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with locked(folder):
        for arguments in (["--train", "--resume", str(folder)], *([f"--{m}", str(folder)] for m in cli.MODES[1:])):
            assert cli.main([*arguments, "--gpu", "cpu"]) == cli.RUN_FAILED
            assert f"{folder} is in use by process {os.getpid()} on " in capsys.readouterr().err
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


@pytest.mark.slow
def test_a_run_in_training_is_not_exported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with training(tmp_path, checkpoint={"every_n_steps": 1}) as run:
        run.wait_until(lambda: list(run.runs.glob("*/*/ckpts/last.ckpt")), "checkpoint")
        assert cli.main(["--export", str(run.folder), "--gpu", "cpu"]) == cli.RUN_FAILED
        assert f"is in use by process {run.process.pid} on " in capsys.readouterr().err
        assert run.process.poll() is None


def test_a_pipeline_in_use_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "stages.yaml"
    stages = {"coarse": {}, "refine": {}}
    file.write_text(yaml.safe_dump({**plain(tmp_path / "out"), "name": "both", "stages": stages}))
    assert cli.main(["--config", str(file), "--train", "--gpu", "cpu", "trainer.max_steps=1"]) == cli.OK
    (folder,) = (tmp_path / "out" / "both").iterdir()
    with locked(folder):
        for resumed in (folder, folder / "refine"):
            assert cli.main(["--train", "--resume", str(resumed), "--gpu", "cpu"]) == cli.RUN_FAILED
            assert f"{folder} is in use by process {os.getpid()}" in capsys.readouterr().err


# Checkpoints and leftovers of killed runs


def test_a_run_killed_before_last_was_written_resumes_from_its_numbered_checkpoint(tmp_path: Path) -> None:
    options: dict[str, Any] = {"checkpoint": {"every_n_steps": 1, "keep": 3}}
    first = run_training(make(tmp_path, "text-to-2d", **options), devices="cpu", console=Recorder())
    whole = read_checkpoint(first.folder / "ckpts" / "last.ckpt")
    for name in ("last.ckpt", "step-000003.ckpt", "step-000001.ckpt"):
        (first.folder / "ckpts" / name).unlink()
    assert find_run(first.folder)[1].name == "step-000002.ckpt"
    again = run_training(
        make(tmp_path, "text-to-2d", **options), devices="cpu", resume=first.folder, console=Recorder()
    )
    state = read_checkpoint(again.folder / "ckpts" / "last.ckpt")
    assert state["global_step"] == whole["global_step"] == 3
    assert all(bool((state["state_dict"][name] == value).all()) for name, value in whole["state_dict"].items())


def test_the_next_start_removes_what_a_killed_run_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run_training(make(tmp_path, "text-to-2d"), devices="cpu", console=Recorder()).folder
    own = [folder / "notes.tmp", folder / ".hidden", folder / "images" / "mine.png"]
    leftovers = [
        folder / ".summary.json.abcd1234.tmp",
        folder / "configs" / ".resolved.yaml.abcd1234.tmp",
        folder / "ckpts" / ".step-000003.ckpt.x.tmp",
        folder / "images" / ".step-000002.77.tmp.png",
        folder / ".export.tmp" / "red.glb",
        folder / ".code.tmp" / "packages.txt",
    ]
    for path in (*own, *leftovers):
        path.parent.mkdir(exist_ok=True)
        path.write_text("")
    assert cli.main(["--validate", str(folder), "--gpu", "cpu"]) == cli.OK
    assert [path for path in leftovers if path.exists()] == [] and not (folder / ".export.tmp").exists()
    assert all(path.exists() for path in own)


def test_links_are_not_followed_when_leftovers_are_removed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / ".a.tmp").write_text("")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "run" / ".b.tmp").symlink_to(tmp_path / "elsewhere")
    remove_leftovers(tmp_path / "run", recursive=True)
    assert (tmp_path / "elsewhere" / ".a.tmp").exists() and not (tmp_path / "run" / ".b.tmp").is_symlink()


def test_a_lock_that_is_a_link_is_refused_and_what_it_leads_to_stays(tmp_path: Path) -> None:
    (tmp_path / "own").write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").symlink_to(tmp_path / "own")
    with pytest.raises(ValueError, match=r"\.lock is a link, which this program does not make; delete it"):
        locked(tmp_path / "run").__enter__()
    assert (tmp_path / "own").read_text() == "mine"


def test_a_lock_on_a_full_disk_names_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError) as caught:
        locked(tmp_path / "run").__enter__()
    assert reason(caught.value).startswith(f"{tmp_path / 'run' / '.lock'}: the disk is full")


@pytest.mark.parametrize("link", ["history", "configs", ".videos.old", ".videos.new", ".images.tmp"])
def test_a_folder_from_others_moves_and_deletes_nothing_behind_its_links(tmp_path: Path, link: str) -> None:
    for name in ("notes.txt", "below/.a.tmp", ".replaced.json"):
        write_atomically(tmp_path / "elsewhere" / name, "{}")
    for name in ("videos", "images"):
        (tmp_path / "run" / name).mkdir(parents=True)
    (tmp_path / "run" / link).symlink_to(tmp_path / "elsewhere")
    before = sorted((tmp_path / "elsewhere").rglob("*"))
    with locked(tmp_path / "run"):
        pass
    assert sorted((tmp_path / "elsewhere").rglob("*")) == before


@pytest.mark.parametrize("names", [["../../own", "..", "a\0", "", 1, "old"], "old", {"old": 1}, None])
def test_the_list_of_a_replaced_set_names_files_of_its_folder_only(tmp_path: Path, names: Any) -> None:
    for name in ("own", "run/export/new", "run/.export.old/old"):
        write_atomically(tmp_path / name, "mine")
    write_json(tmp_path / "run" / ".export.old" / ".replaced.json", {"files": names})
    finish_replacement(tmp_path / "run" / "export")
    assert (tmp_path / "own").exists() and not (tmp_path / "run" / ".export.old").exists()
    assert (tmp_path / "run" / "export" / "old").exists() is (not isinstance(names, list))


# Sets of files


class KilledError(BaseException):
    """Stands for the kill of the process: nothing is cleaned up after it."""


def contents(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): path.read_text()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".replaced.json"
    }


OLD = {"a.glb": "old a", "b.obj": "old b", "mine.blend": "mine", "previous-1/a.glb": "older a"}
NEW = {"a.glb": "new a", "c.ply": "new c"}
AFTER = NEW | {"mine.blend": "mine", "previous-1/a.glb": "older a"}
AFTER |= {f"previous-2/{name}": OLD[name] for name in ("a.glb", "b.obj")}


def prepared(root: Path) -> Replacement:
    shutil.rmtree(root, ignore_errors=True)
    for folder, files in ((root / "export", OLD), (root / ".export.tmp", NEW)):
        for name, text in files.items():
            write_atomically(folder / name, text)
    return Replacement.plan(root / ".export.tmp", root / "export", ["a.glb", "b.obj"])


@pytest.mark.parametrize("exchanges", [True, False])
def test_a_set_of_files_is_replaced_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchanges: bool) -> None:
    """Killed after any number of operations, the next start finds the old set or the new one, and all other files."""
    if not exchanges:
        monkeypatch.setattr(replacement_module, "_exchange", lambda *_: False)
    count = 0

    def counted(function: Any, limit: int) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            if count > limit:
                raise KilledError
            return function(*arguments, **options)

        return call

    outcomes = []
    for limit in range(100):
        replacement, count = prepared(tmp_path / "run"), 0
        try:
            with monkeypatch.context() as patch:
                for name in ("rename", "mkdir", "iterdir"):
                    patch.setattr(Path, name, counted(getattr(Path, name), limit))
                for module, name in ((replacement_module, "link_or_copy"), (replacement_module, "write_json")):
                    patch.setattr(module, name, counted(getattr(module, name), limit))
                for module, name in ((replacement_module, "_exchange"), (shutil, "rmtree")):
                    patch.setattr(module, name, counted(getattr(module, name), limit))
                replacement.apply()
        except KilledError:
            at_once = contents(tmp_path / "run" / "export") if (tmp_path / "run" / "export").exists() else None
            if exchanges:
                assert at_once is not None and (at_once == OLD or NEW.items() <= at_once.items())
            finish_replacement(tmp_path / "run" / "export")
            remove_leftovers(tmp_path / "run")
        else:
            break
        found = contents(tmp_path / "run" / "export")
        assert found in (OLD, AFTER) and [path.name for path in (tmp_path / "run").iterdir()] == ["export"]
        outcomes.append(found == AFTER)
    assert contents(tmp_path / "run" / "export") == AFTER
    assert outcomes == sorted(outcomes) and {True, False} == set(outcomes)


def test_a_linked_folder_stays_linked(tmp_path: Path) -> None:
    replacement = prepared(tmp_path / "run")
    (tmp_path / "run" / "export").rename(tmp_path / "elsewhere")
    (tmp_path / "run" / "export").symlink_to(tmp_path / "elsewhere")
    replacement.apply()
    assert (tmp_path / "run" / "export").is_symlink() and contents(tmp_path / "elsewhere") == AFTER


def test_the_first_set_needs_no_folder(tmp_path: Path) -> None:
    write_atomically(tmp_path / ".export.tmp" / "a.glb", "new")
    Replacement.plan(tmp_path / ".export.tmp", tmp_path / "export", []).apply()
    assert contents(tmp_path) == {"export/a.glb": "new"}


def test_folders_may_be_nested_deeply(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = Path("a/" * 1500)
    make_folder(folder)
    make_folder(folder)
    assert folder.is_dir()
    for path in (folder, *folder.parents[:-1]):  # pytest deletes folders recursively
        path.rmdir()
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError):
        make_folder(tmp_path / "file")


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="finds the names of open files in /proc")
def test_files_are_durable_before_they_get_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file and folder is synced; a power cut after the write leaves no empty file and no missing name."""
    from scoredist3d import files

    synced: list[str] = []
    sync, replace = os.fsync, os.replace

    def record_sync(descriptor: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        sync(descriptor)

    def record_replace(source: Any, target: Any) -> None:
        synced.append(f"-> {Path(target).name}")
        replace(source, target)

    monkeypatch.setattr(files.os, "fsync", record_sync)
    monkeypatch.setattr(files.os, "replace", record_replace)
    with files.atomic_path(tmp_path / "new" / "folder" / "a.png") as path:
        path.write_text("content")
        temporary = path.name
    assert synced == ["new", tmp_path.name, temporary, "-> a.png", "folder"]

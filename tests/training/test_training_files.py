"""Files of a run: atomic checkpoints, metrics rows, folders, snapshots, signals."""

from __future__ import annotations

import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import scoredist3d
from scoredist3d import files
from scoredist3d.files import read_json, remove_leftovers, write_atomically
from scoredist3d.guidance.core.checks import NonFiniteError
from scoredist3d.training import metrics, snapshot
from scoredist3d.training.checkpoint import (
    link_or_copy,
    load_weights,
    read_checkpoint,
    write_checkpoint,
)
from scoredist3d.training.console import duration
from scoredist3d.training.folder import RunFolder, find_run, kept_checkpoints, slug
from scoredist3d.training.interrupt import InterruptGuard
from scoredist3d.training.metrics import MetricBuffer, MetricsFile, read_rows
from scoredist3d.training.snapshot import git_state, save_snapshot


def test_checkpoint_round_trip_keeps_types_and_bits(tmp_path: Path) -> None:
    state = {
        "weights": {"a": torch.randn(3, generator=torch.Generator().manual_seed(0))},
        "step": 7,
        "window": [0.1, 2.0],
    }
    write_checkpoint(state, tmp_path / "last.ckpt")
    loaded = read_checkpoint(tmp_path / "last.ckpt")
    assert torch.equal(loaded["weights"]["a"], state["weights"]["a"])
    assert loaded["step"] == 7 and loaded["window"] == [0.1, 2.0]


@pytest.mark.parametrize("fails", ["torch.save", "os.fsync", "os.replace"])
def test_a_failed_write_leaves_the_old_checkpoint_and_no_leftovers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    path = tmp_path / "last.ckpt"
    write_checkpoint({"step": 1}, path)

    def disk_full(*arguments: Any, **_: Any) -> None:
        if fails == "torch.save":
            arguments[1].write(b"half a file")
        raise OSError("no space left on device")

    monkeypatch.setattr(fails, disk_full)
    with pytest.raises(OSError, match="no space left"):
        write_checkpoint({"step": 2}, path)
    monkeypatch.undo()
    assert read_checkpoint(path)["step"] == 1
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


def test_kill_while_writing_never_breaks_the_checkpoint(tmp_path: Path) -> None:
    script = (
        "import sys, torch; from pathlib import Path; from scoredist3d.training.checkpoint import *\n"
        "folder = Path(sys.argv[1])\n"
        "for step in range(10**6):\n"
        "    write_checkpoint({'step': step, 'x': torch.full((300_000,), float(step))}, folder / 'step.ckpt')\n"
        "    link_or_copy(folder / 'step.ckpt', folder / 'last.ckpt')\n"
    )
    chance = random.Random(0)
    for attempt in range(2):
        with subprocess.Popen([sys.executable, "-c", script, str(tmp_path)]) as process:
            deadline = time.monotonic() + 600
            (tmp_path / "last.ckpt").unlink(missing_ok=True)
            while not (tmp_path / "last.ckpt").exists() and time.monotonic() < deadline:
                time.sleep(0.01)
            time.sleep(chance.uniform(0.0, 0.3))
            process.send_signal(signal.SIGKILL)
            process.wait()
        state = read_checkpoint(tmp_path / "last.ckpt")
        assert bool((state["x"] == float(state["step"])).all()), attempt
    remove_leftovers(tmp_path)
    assert not list(tmp_path.glob(".*.tmp"))


def test_damaged_foreign_and_missing_checkpoints_say_what_to_do(tmp_path: Path) -> None:
    good = tmp_path / "step-000010.ckpt"
    write_checkpoint({"step": 1, "x": torch.zeros(1000)}, good)
    broken = tmp_path / "last.ckpt"
    content = good.read_bytes()
    for damaged in (b"", b"not a checkpoint", content[: len(content) // 2], content[:-30]):
        broken.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"last\.ckpt is damaged.*use another checkpoint.*step-000010\.ckpt"):
            read_checkpoint(broken)
    torch.save({"state_dict": {}}, broken)
    with pytest.raises(ValueError, match="was not written by this program"):
        read_checkpoint(broken)
    torch.save({"scoredist3d": {"format": 99, "version": "9.0"}}, broken)
    with pytest.raises(ValueError, match=r"format 99 \(version 9\.0\)"):
        read_checkpoint(broken)
    with pytest.raises(ValueError, match=r"gone\.ckpt does not exist"):
        read_checkpoint(tmp_path / "gone.ckpt")


class Trap:
    """An object whose unpickling creates a file."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, ("trap-was-sprung",))


def test_a_foreign_checkpoint_cannot_run_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, save in (("torch.ckpt", torch.save), ("pickle.ckpt", lambda o, p: p.write_bytes(pickle.dumps(o)))):
        save({"x": Trap()}, tmp_path / name)  # type: ignore[operator]
        with pytest.raises(ValueError, match="damaged or not a checkpoint"):
            read_checkpoint(tmp_path / name)
    assert not (tmp_path / "trap-was-sprung").exists()


def test_weights_of_another_configuration_are_refused() -> None:
    module = nn.utils.skip_init(nn.Linear, 2, 3)
    with pytest.raises(ValueError, match="missing: bias; unexpected: bias2; different sizes: weight"):
        load_weights(module, {"weight": torch.zeros(2, 2), "bias2": torch.zeros(3)})
    load_weights(module, {"weight": torch.ones(3, 2), "bias": torch.zeros(3)})
    assert float(module.weight.detach().sum()) == 6.0


def test_last_is_a_second_name_and_survives_the_first(tmp_path: Path) -> None:
    for step in (10, 9, 1200000, 999999):
        write_checkpoint({"step": step}, tmp_path / f"step-{step:06d}.ckpt")
    assert [path.stem for path in kept_checkpoints(tmp_path)] == [
        "step-000009",
        "step-000010",
        "step-999999",
        "step-1200000",
    ]
    for name in ("step-000009.ckpt", "step-000010.ckpt"):
        link_or_copy(tmp_path / name, tmp_path / "last.ckpt")
    (tmp_path / "step-000010.ckpt").unlink()
    assert read_checkpoint(tmp_path / "last.ckpt")["step"] == 10


def test_metrics_of_a_resumed_run_lose_later_and_torn_rows(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    file = MetricsFile(path)
    for step in (10, 20, 30):
        file.append(step, {"loss": step + 1 / 3})
    with path.open("a") as handle:
        handle.write("40,4")  # killed in the middle of a row
    resumed = MetricsFile(path, resume_step=20)
    resumed.append(30, {"loss": 1.5, "new": 2.0})
    columns, rows = read_rows(path)
    assert columns == ["step", "loss", "new"]
    assert [(row["step"], row["new"]) for row in rows] == [("10", ""), ("20", ""), ("30", "2.0")]
    assert float(rows[0]["loss"]) == 10 + 1 / 3  # no digit is lost


def test_a_new_run_starts_an_empty_metrics_file(tmp_path: Path) -> None:
    MetricsFile(tmp_path / "m.csv").append(1, {"loss": 1.0})
    MetricsFile(tmp_path / "m.csv").append(2, {"loss": 2.0})
    assert [row["step"] for row in read_rows(tmp_path / "m.csv")[1]] == ["2"]


def test_buffer_means_and_open_window() -> None:
    buffer = MetricBuffer()
    for step, value in enumerate((1.0, 2.0, 6.0)):
        buffer.add(step, {"loss": torch.tensor(value), "lr": 0.5, **({"late": torch.tensor(4.0)} if step == 2 else {})})
    continued = MetricBuffer()
    continued.load_state_dict(buffer.state_dict())
    assert buffer.mean_row() == continued.mean_row() == {"loss": 3.0, "lr": 0.5, "late": 4.0}
    assert buffer.mean_row() == {} and buffer.latest == {"loss": 6.0, "lr": 0.5, "late": 4.0}


def test_a_long_window_needs_no_more_memory_than_a_short_one() -> None:
    buffer = MetricBuffer()
    sizes = []
    for step in range(10 * metrics.MAX_PENDING):
        buffer.add(step, {"loss": torch.tensor(float(step))})
        sizes.append(len(buffer._pending))
    assert max(sizes) < metrics.MAX_PENDING
    assert buffer.state_dict() == {"loss": {"sum": float(sum(range(len(sizes)))), "count": len(sizes)}}
    assert buffer.mean_row() == {"loss": (len(sizes) - 1) / 2}


def test_a_window_of_an_earlier_version_is_restored() -> None:
    buffer = MetricBuffer()
    buffer.load_state_dict({"loss": [1.0, 2.0]})
    buffer.add(2, {"loss": 6.0})
    assert buffer.mean_row() == {"loss": 3.0}


def test_columns_that_a_spreadsheet_has_moved_keep_their_values(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text("loss,step\n0.5,1\n")
    MetricsFile(path, resume_step=1).append(2, {"loss": 0.25})
    assert path.read_text() == "step,loss\n1,0.5\n2,0.25\n"


def test_the_metrics_of_a_resumed_run_have_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text("step,loss\n1,0.5\n")
    monkeypatch.setattr(metrics, "MAX_METRICS_BYTES", path.stat().st_size)
    MetricsFile(path, resume_step=1)
    monkeypatch.setattr(metrics, "MAX_METRICS_BYTES", path.stat().st_size - 1)
    with pytest.raises(ValueError, match=r"metrics\.csv is too large: it has 16 bytes, .*; rename it, and the run"):
        MetricsFile(path, resume_step=1)


def test_summaries_are_regular_files_of_a_limited_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "summary.json"
    path.write_text('{"step": 3}')
    monkeypatch.setattr(files, "MAX_RUN_TEXT_BYTES", path.stat().st_size)
    assert read_json(path) == {"step": 3}
    monkeypatch.setattr(files, "MAX_RUN_TEXT_BYTES", path.stat().st_size - 1)
    assert read_json(path) == {}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_named_pipe_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "summary.json")
    assert read_json(tmp_path / "summary.json") == {}


def test_the_commands_of_a_run_have_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder(tmp_path / "run")
    save_snapshot(folder, "prompt: a mug\n", None, ["launch.py"])
    monkeypatch.setattr(snapshot, "MAX_RUN_TEXT_BYTES", (folder.configs / "command.txt").stat().st_size - 1)
    with pytest.raises(ValueError, match=r"command\.txt is too large: .*rename it"):
        save_snapshot(folder, "prompt: a mug\n", None, ["launch.py"])


def test_buffer_names_the_first_value_that_is_not_finite() -> None:
    buffer = MetricBuffer()
    buffer.add(4, {"loss/guidance": torch.tensor(1.0), "loss/sparsity": torch.tensor(float("nan"))})
    buffer.add(5, {"loss/guidance": torch.tensor(float("inf"))})
    with pytest.raises(NonFiniteError, match=r"step 4: NaN or infinity in loss/sparsity"):
        buffer.fetch()


def test_run_folders_do_not_collide_and_are_found_again(tmp_path: Path) -> None:
    now = datetime(2030, 1, 2, 3, 4, 5)
    first, second = (RunFolder.create(tmp_path, "my run", "a red/mug!", now=now) for _ in range(2))
    assert first.root == tmp_path / "my-run" / "a-red-mug@20300102-030405"
    assert second.root.name == "a-red-mug@20300102-030405-2"
    with pytest.raises(ValueError, match="not a run folder"):
        find_run(first.root)
    write_atomically(first.resolved_config, "prompt: x\n")
    with pytest.raises(ValueError, match="no checkpoint yet"):
        find_run(first.root)
    write_checkpoint({"step": 1}, first.last_checkpoint)
    for path in (first.root, first.checkpoints, first.last_checkpoint):
        folder, checkpoint = find_run(path)
        assert folder.root.resolve() == first.root.resolve() and checkpoint == first.last_checkpoint
    (tmp_path / "x.ckpt").touch()
    with pytest.raises(ValueError, match="not a checkpoint inside a run folder"):
        find_run(tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match="does not exist"):
        find_run(tmp_path / "nothing")


@pytest.mark.parametrize("link", [False, True])
def test_a_file_in_place_of_the_folder_of_runs_is_named(tmp_path: Path, link: bool) -> None:
    if link:
        (tmp_path / "runs").symlink_to("missing-disk")
    else:
        (tmp_path / "runs").touch()
    with pytest.raises(FileExistsError, match=re.escape(str(tmp_path / "runs"))):
        RunFolder.create(tmp_path, "runs", "a mug")


@pytest.mark.parametrize("linked", ["ckpts", "ckpts/last.ckpt"])
def test_a_checkpoint_on_another_disk_belongs_to_the_run_that_links_to_it(tmp_path: Path, linked: str) -> None:
    run = RunFolder(tmp_path / "run")
    write_atomically(run.resolved_config, "prompt: x\n")
    write_checkpoint({"step": 1}, run.last_checkpoint)
    (run.root / linked).rename(tmp_path / "moved")
    (run.root / linked).symlink_to(tmp_path / "moved")
    for path in (run.root, run.last_checkpoint, run.root / "configs" / ".." / "ckpts" / "last.ckpt"):
        folder, checkpoint = find_run(path)
        assert folder == run and checkpoint.samefile(run.last_checkpoint)


def test_slug_and_duration() -> None:
    assert slug("a red mug, très grand") == "a-red-mug-très-grand"
    assert slug("../..") == "run" and slug("x" * 99) == "x" * 60
    assert [duration(s) for s in (7, 750, 3723)] == ["0:07", "12:30", "1:02:03"]


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_snapshot_holds_command_config_code_and_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)  # nobody's hooks, signatures and templates
    monkeypatch.setenv("GIT_CONFIG_SYSTEM", os.devnull)
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@t", "-C", str(tmp_path)]
    (tmp_path / "code.py").write_text("x = 1\n")
    for command in (["init", "-q"], ["add", "code.py"], ["commit", "-q", "-m", "first"]):
        subprocess.run([*git, *command], check=True, capture_output=True)
    (tmp_path / "code.py").write_text("x = 2\n")
    state = git_state(tmp_path)
    assert len(state["commit.txt"].strip()) == 40 and "+x = 2" in state["changes.diff"]
    custom = tmp_path / "custom" / "mine"
    custom.mkdir(parents=True)
    (custom / "a.py").write_text("pass\n")
    (custom / "a.pyc").write_text("")
    folder = RunFolder(tmp_path / "run")
    save_snapshot(
        folder,
        "prompt: a mug\n",
        "prompt: ${name}\n",
        ["launch.py", "prompt=a mug"],
        [tmp_path / "custom", tmp_path / "none"],
    )
    assert folder.resolved_config.read_text() == "prompt: a mug\n"
    (line,) = (folder.configs / "command.txt").read_text().splitlines()
    time, version, command = line.split("  ", 2)
    assert datetime.fromisoformat(time).tzinfo is not None and version == f"scoredist3d {scoredist3d.__version__}"
    assert command == "launch.py 'prompt=a mug'"
    assert any(line.startswith("torch==") for line in (folder.code / "packages.txt").read_text().splitlines())
    assert [path.name for path in (folder.code / "custom" / "mine").iterdir()] == ["a.py"]


def test_later_sessions_do_not_replace_the_snapshot_of_the_first(tmp_path: Path) -> None:
    custom, folder = tmp_path / "custom", RunFolder(tmp_path / "run")

    def session(code: str, resolved: str, source: str | None) -> int:
        write_atomically(custom / "mine.py", code)
        return save_snapshot(folder, resolved, source, ["launch.py", "prompt=a\nmug"], [custom])

    def code(*session: str) -> str:
        return folder.code.joinpath(*session, "custom", "mine.py").read_text()

    assert session("x = 1\n", "seed: 1\n", "seed: 1\n") == 1
    assert session("x = 1\n", "seed: 1\n", "seed: 1\n") == 2
    assert not (folder.configs / "history").exists() and not list(folder.code.glob("session-*"))
    assert session("x = 2\n", "seed: 2\n", "seed: 2\n") == 3
    assert session("x = 2\n", "seed: 3\n", None) == 4
    assert session("x = 1\n", "seed: 3\n", None) == 5
    assert (code(), code("session-3"), code("session-5")) == ("x = 1\n", "x = 2\n", "x = 1\n")
    assert not (folder.code / "session-4").exists() and (folder.code / "session-3" / "packages.txt").is_file()
    kept = {str(path.relative_to(folder.configs)): path.read_text() for path in folder.configs.rglob("*.yaml")}
    assert kept == {
        "resolved.yaml": "seed: 3\n",
        "history/session-2/resolved.yaml": "seed: 1\n",
        "history/session-2/config.yaml": "seed: 1\n",
        "history/session-3/resolved.yaml": "seed: 2\n",
        "history/session-3/config.yaml": "seed: 2\n",  # session 4 has none, so that of session 3 is not its own
    }
    lines = (folder.configs / "command.txt").read_text().splitlines()
    assert len(lines) == 5 and all(line.endswith(r"""launch.py 'prompt=a'$'\n''mug'""") for line in lines)


def test_first_signal_is_graceful_and_handlers_are_put_back() -> None:
    said: list[str] = []
    before = signal.getsignal(signal.SIGINT)
    with InterruptGuard(said.append) as guard:
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert guard.requested and guard.exit_code == 130
    with InterruptGuard(said.append) as guard:
        guard.graceful = True
        signal.raise_signal(signal.SIGTERM)
        assert guard.requested and guard.exit_code == 143
    assert "Stopping after this step" in said[-1]
    assert signal.getsignal(signal.SIGINT) is before


def test_second_signal_ends_the_process_at_once() -> None:
    script = (
        "import signal; from scoredist3d.training.interrupt import InterruptGuard\n"
        "with InterruptGuard(lambda text: print(text, flush=True)) as guard:\n"
        "    guard.graceful = True\n"
        "    signal.raise_signal(signal.SIGINT); signal.raise_signal(signal.SIGINT)\n"
        "print('not reached')\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=600, check=False)
    assert result.returncode == 130 and "checkpoint is intact" in result.stdout and "not reached" not in result.stdout

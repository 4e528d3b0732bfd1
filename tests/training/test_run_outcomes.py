"""Outcomes of runs: exit codes, ``summary.json``, and the records of earlier sessions."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml
from shared.cli_runs import again, summary, train, written
from shared.tiny_runs import Recorder
from shared.tiny_runs import make as make_config

import scoredist3d
from scoredist3d import cli
from scoredist3d.files import write_json
from scoredist3d.losses.sparsity import Sparsity
from scoredist3d.training.callbacks import Checkpoints
from scoredist3d.training.folder import RunFolder
from scoredist3d.training.metrics import read_rows
from scoredist3d.training.run import run_training
from scoredist3d.training.summary import is_done

MOVING = {"from": 0.1, "to": 0.01, "end": "${trainer.max_steps}"}


def press_at(monkeypatch: pytest.MonkeyPatch, step: int, stage: str, number: int = signal.SIGINT) -> None:
    """Send Ctrl-C or another signal after a step of the run whose folder has the given name."""
    after_step = Checkpoints.after_step

    def press(self: Checkpoints, trainer: Any, module: Any, now: int) -> None:
        after_step(self, trainer, module, now)
        if now == step and stage in self.folder.parts:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(Checkpoints, "after_step", press)


# The summary


def test_the_summary_says_what_ran_and_where_it_is(tmp_path: Path) -> None:
    file = written(tmp_path, "text-to-2d", negative_prompt="green", seed=7)
    code, folder = train(file)
    assert code == cli.OK
    folder = folder.rename(tmp_path / "moved")
    told = summary(folder)
    assert {
        key: told[key] for key in ("status", "error", "prompt", "negative_prompt", "seed", "step", "max_steps")
    } == {
        "status": "done",
        "error": None,
        "prompt": "red left blob",
        "negative_prompt": "green",
        "seed": 7,
        "step": 1,
        "max_steps": 1,
    }
    assert told["version"] == scoredist3d.__version__ and told["peak_memory_gib"] > 0
    assert list(told["stages"]) == list(told["seconds"]) == ["start-up", "training", "optimisation"]
    assert told["paths"]["checkpoint"] == "ckpts/last.ckpt"
    assert all((folder / path).exists() for path in told["paths"].values())


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_an_interrupted_run_says_so_until_it_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, exit_code: int
) -> None:
    press_at(monkeypatch, 1, "out", number)
    before = signal.signal(number, signal.SIG_DFL)  # SIGHUP is ignored where the tests run under nohup
    code, folder = train(written(tmp_path, "text-to-2d"), "trainer.max_steps=2")
    signal.signal(number, before)
    told = summary(folder)
    assert code == exit_code and told["status"] == told["stages"]["training"]["status"] == "interrupted"
    assert (told["error"], told["step"], told["max_steps"]) == ("Stopped at step 1 of 2", 1, 2)
    monkeypatch.undo()
    assert again("train", folder) == cli.OK
    assert (summary(folder)["status"], summary(folder)["error"], summary(folder)["step"]) == ("done", None, 2)


def test_a_signal_in_the_last_step_leaves_the_export_to_the_next_session(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    press_at(monkeypatch, 1, "out", signal.SIGTERM)
    code, folder = train(written(tmp_path))
    assert code == 143 and summary(folder)["error"] == "Stopped at step 1 of 1" and not (folder / "export").exists()
    monkeypatch.undo()
    assert again("train", folder) == cli.OK
    assert summary(folder)["status"] == "done" and "glb" in summary(folder)["paths"]


def test_a_request_to_save_does_not_stop_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    press_at(monkeypatch, 1, "out", signal.SIGUSR1)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    code, folder = train(written(tmp_path, "text-to-2d"), "trainer.max_steps=2", "checkpoint.keep=2")
    assert code == cli.OK and "Saved a checkpoint at step 1 (SIGUSR1)" in capsys.readouterr().out
    assert {path.name for path in (folder / "ckpts").glob("step-*")} == {"step-000001.ckpt", "step-000002.ckpt"}


def test_a_failed_run_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Sparsity, "__call__", lambda *_: (_ for _ in ()).throw(RuntimeError("broken")))
    with pytest.raises(RuntimeError, match="broken"):
        run_training(make_config(tmp_path), devices="cpu", console=Recorder())
    (folder,) = (tmp_path / "scoredist3d").iterdir()
    told = summary(folder)
    assert (told["status"], told["error"], told["step"]) == ("failed", "RuntimeError: broken", 0)
    assert told["stages"]["training"]["status"] == "failed"


def test_a_pipeline_interrupted_in_its_second_stage_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = written(tmp_path, name="both", stages={"coarse": {}, "refine": {"trainer": {"max_steps": 2}}, "then": {}})
    press_at(monkeypatch, 1, "refine")
    code, folder = train(file, name="both")
    told = summary(folder)
    assert (code, told["status"], told["error"]) == (cli.INTERRUPTED, "interrupted", "Stopped at step 1 of 2")
    statuses = [stage["status"] for stage in told["stages"].values()]
    assert statuses == ["done", "interrupted", "not begun"] and told["stages"]["refine"]["step"] == 1


@pytest.mark.parametrize(
    ("content", "done"),
    [
        ({"step": 3}, True),  # of an earlier version
        ({"step": 2}, False),
        ({"step": "3"}, False),  # of another program
        ({"step": [3], "status": "done"}, False),
        ({"step": 3, "status": "done"}, True),
        ({"step": 3, "status": "interrupted"}, False),
        ({"step": 3, "status": "no mesh"}, False),
        (None, False),
    ],
)
def test_a_stage_is_done_when_its_summary_says_so(tmp_path: Path, content: dict[str, Any] | None, done: bool) -> None:
    if content is not None:
        write_json(tmp_path / "summary.json", content)
    assert is_done(RunFolder(tmp_path), 3) is done


# Resuming


def test_a_longer_run_keeps_its_schedules_and_the_records_of_earlier_sessions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = written(tmp_path, "text-to-2d", log={"every_n_steps": 1, "tensorboard": False})
    moving = f"system.optimizer.lr={yaml.safe_dump(MOVING, default_flow_style=True).strip()}"
    _, folder = train(file, "trainer.max_steps=2", moving, "system.guidance.weight={from: 1, to: 0.5, end: 2}")
    first = (folder / "configs" / "resolved.yaml").read_text()
    capsys.readouterr()
    assert again("train", folder, "trainer.max_steps=3") == cli.OK
    out = capsys.readouterr().out
    assert "still end at step 2; set trainer.schedule_steps=3 to stretch them" in out and "abruptly" not in out
    assert again("train", folder, "trainer.max_steps=5") == cli.OK
    rows = read_rows(folder / "metrics.csv")[1]
    assert [float(row["lr/canvas"]) for row in rows] == pytest.approx([0.1, 0.055, 0.01, 0.01, 0.01])

    assert again("train", folder, "trainer.max_steps=4") == cli.USAGE_ERROR
    assert "trainer.max_steps: 4 is less than the 5 steps" in capsys.readouterr().err
    assert again("train", folder, "trainer.max_steps=6", "trainer.schedule_steps=6") == cli.OK
    assert (
        "These scheduled values change abruptly at step 5: system.optimizer.lr 0.01 -> 0.025."
        in capsys.readouterr().out
    )

    lines = (folder / "configs" / "command.txt").read_text().splitlines()
    assert len(lines) == 4  # the refused session has not begun
    history = folder / "configs" / "history"
    assert (history / "session-1" / "resolved.yaml").read_text() == first
    assert sorted(path.name for path in history.iterdir()) == ["session-1", "session-2", "session-3"]
    latest = yaml.safe_load((folder / "configs" / "resolved.yaml").read_text())
    assert latest["trainer"]["max_steps"] == 6 and latest["system"]["optimizer"]["lr"]["end"] == 6


def test_a_refused_override_leaves_the_run_as_it_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, folder = train(written(tmp_path, "text-to-2d"))
    before = {path: path.read_bytes() for path in [*(folder / "configs").rglob("*.*"), folder / "summary.json"]}
    refused = again("train", folder, "system.geometry.particles=3", "trainer.max_steps=2")
    assert refused == cli.RUN_FAILED and "belongs to another configuration" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in before} == before
    assert sorted(path for path in (folder / "configs").rglob("*.*")) == sorted(set(before) - {folder / "summary.json"})
    assert again("train", folder, "trainer.max_steps=2") == cli.OK

"""Outcomes of runs: exit codes, ``summary.json``, and files of earlier sessions and exports."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml
from shared.tiny_runs import Recorder, plain
from shared.tiny_runs import make as make_config

import scoredist3d
from scoredist3d import cli
from scoredist3d.export.video import VideoError, VideoWriter
from scoredist3d.files import write_json
from scoredist3d.losses.sparsity import Sparsity
from scoredist3d.training import callbacks, products
from scoredist3d.training.callbacks import Checkpoints
from scoredist3d.training.folder import RunFolder
from scoredist3d.training.metrics import read_rows
from scoredist3d.training.run import run_training
from scoredist3d.training.summary import is_done

IMPOSSIBLE = "exporter.threshold=1e9"
MOVING = {"from": 0.1, "to": 0.01, "end": "${trainer.max_steps}"}


def written(folder: Path, system: str = "text-to-3d", **changes: Any) -> Path:
    """Write a config file to ``folder``; its runs are in ``folder/out``."""
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump({**plain(folder / "out", system, trainer={"max_steps": 1}), **changes}))
    return file


def train(file: Path, *overrides: str, name: str = "scoredist3d") -> tuple[int, Path]:
    code = cli.main(["--config", str(file), "--train", "--gpu", "cpu", *overrides])
    (folder,) = (file.parent / "out" / name).iterdir()
    return code, folder


def again(mode: str, folder: Path, *overrides: str) -> int:
    mode_and_run = ["--train", "--resume"] if mode == "train" else [f"--{mode}"]
    return cli.main([*mode_and_run, str(folder), "--gpu", "cpu", *overrides])


def summary(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return content


def last_line(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().out.strip().splitlines()[-1]


def press_at(monkeypatch: pytest.MonkeyPatch, step: int, stage: str, number: int = signal.SIGINT) -> None:
    """Send Ctrl-C or another signal after a step of the run whose folder has the given name."""
    after_step = Checkpoints.after_step

    def press(self: Checkpoints, trainer: Any, module: Any, now: int) -> None:
        after_step(self, trainer, module, now)
        if now == step and stage in self.folder.parts:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(Checkpoints, "after_step", press)


# No mesh


def test_a_run_without_a_mesh_fails_and_keeps_the_rest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, folder = train(written(tmp_path), IMPOSSIBLE)
    assert code == cli.RUN_FAILED
    message = last_line(capsys)
    why = "no mesh was written for red-left-blob: no surface: exporter.threshold is 1e+09"
    assert message.startswith(f"error: {why}")
    assert f"--export {folder} " in message and f"--resume {folder} trainer.max_steps=N" in message
    told = summary(folder)
    assert told["status"] == "no mesh" and told["error"].startswith(why)
    assert {name: stage["status"] for name, stage in told["stages"].items()} == {
        "start-up": "done",
        "training": "done",
        "turntable": "done",
        "export": "no mesh",
    }
    assert {"turntable", "checkpoint", "image grid"} <= set(told["paths"]) and "glb" not in told["paths"]
    assert all((folder / path).exists() for path in told["paths"].values())

    assert again("export", folder, "exporter.threshold=auto") == cli.OK
    told = summary(folder)
    assert (told["status"], told["error"], told["paths"]["glb"]) == ("done", None, "export/red-left-blob.glb")

    assert again("export", folder, IMPOSSIBLE) == cli.RUN_FAILED
    assert capsys.readouterr().err.startswith(f"error: {why}")
    assert summary(folder) == told and (folder / "export" / "red-left-blob.glb").is_file()

    # "blob" has no real-world height.
    assert again("export", folder, "exporter.height=real-world") == cli.RUN_FAILED
    assert "no mesh was written for red-left-blob: exporter.height: no height is known" in capsys.readouterr().err
    assert summary(folder) == told

    # The same mesh is not that of a later state.
    assert again("train", folder, "trainer.max_steps=2", IMPOSSIBLE) == cli.RUN_FAILED
    assert list((folder / "export").glob("*.*")) == []
    assert (folder / "export" / "previous-1" / "red-left-blob.glb").is_file()


def test_objects_without_a_mesh_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from scoredist3d.export.exporter import TexturedMeshExporter

    export = TexturedMeshExporter.export

    def some(self: Any, shape: Any, folder: Path, name: str, progress: Any = None) -> Any:
        if name == "red-left-blob-2":
            raise ValueError("nothing is solid")
        return export(self, shape, folder, name, progress)

    monkeypatch.setattr(TexturedMeshExporter, "export", some)
    code, folder = train(written(tmp_path), "system.particles=2")
    assert code == cli.RUN_FAILED
    assert last_line(capsys).startswith("error: no mesh was written for red-left-blob-2: nothing is solid.")
    assert summary(folder)["status"] == "no mesh" and "glb" in summary(folder)["paths"]
    assert again("export", folder) == cli.RUN_FAILED
    assert last_line(capsys) == "error: no mesh was written for red-left-blob-2: nothing is solid"
    monkeypatch.undo()
    assert again("export", folder) == cli.OK
    assert summary(folder)["status"] == "done" and "glb 2" in summary(folder)["paths"]


def test_a_pipeline_fails_without_the_mesh_of_its_last_stage_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = written(tmp_path, name="both", stages={"coarse": {}, "refine": {}})
    code, folder = train(file, IMPOSSIBLE, name="both")
    assert code == cli.RUN_FAILED
    assert f"--resume {folder} stages.refine.trainer.max_steps=N" in last_line(capsys)
    told = summary(folder)
    assert told["status"] == "no mesh" and told["error"].startswith("no mesh was written for red-left-blob")
    assert [(stage["path"], stage["status"]) for stage in told["stages"].values()] == [
        ("coarse", "done"),
        ("refine", "no mesh"),
    ]
    assert again("train", folder, "exporter.threshold=auto") == cli.OK
    assert "coarse: already done" in capsys.readouterr().out
    told = summary(folder)
    assert (told["status"], told["error"]) == ("done", None)
    assert told["paths"]["glb"] == "refine/export/red-left-blob.glb" and (folder / told["paths"]["glb"]).is_file()


# Products that fail on their own


def break_video(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def broken(self: VideoWriter, frame: Any) -> None:
        raise error

    monkeypatch.setattr(VideoWriter, "add", broken)


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (VideoError("ffmpeg failed with exit status 1"), "ffmpeg failed with exit status 1"),
        (OSError(errno.ENOSPC, "No space left on device", "/d/turntable.mp4"), "/d/turntable.mp4: the disk is full"),
        (RuntimeError("a bug\nin a frame"), "RuntimeError: a bug in a frame"),
    ],
)
def test_a_broken_video_costs_neither_the_mesh_nor_the_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception, why: str
) -> None:
    break_video(monkeypatch, error)
    code, folder = train(written(tmp_path))
    out = capsys.readouterr().out
    assert code == cli.RUN_FAILED and "Done, except for the video:" in out
    assert re.search(r"^  mesh +written$", out, re.MULTILINE) and re.search(r"^  images +written$", out, re.MULTILINE)
    assert re.search(rf"^  video +no video was written: {re.escape(why)}", out, re.MULTILINE)
    assert out.strip().splitlines()[-1].startswith(f"error: no video was written: {why}")
    assert f"Write the video again with python launch.py --test {folder} KEY=VALUE" in out
    told = summary(folder)
    assert told["status"] == "no video" and told["error"].startswith(f"no video was written: {why}")
    assert told["products"] == {
        "images": {"status": "done", "error": None},
        "mesh": {"status": "done", "error": None},
        "video": {"status": "failed", "error": told["error"]},
    }
    assert {"glb", "image grid", "checkpoint"} <= set(told["paths"]) and "turntable" not in told["paths"]
    assert again("test", folder) == cli.RUN_FAILED  # it is still broken
    assert summary(folder) == told
    monkeypatch.undo()
    assert again("test", folder) == cli.OK
    told = summary(folder)
    assert (told["status"], told["error"], told["paths"]["turntable"]) == ("done", None, "videos/turntable.mp4")
    assert told["products"]["video"] == {"status": "done", "error": None}


def test_an_interrupted_video_leaves_the_mesh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    break_video(monkeypatch, KeyboardInterrupt())  # type: ignore[arg-type]
    code, folder = train(written(tmp_path))
    assert code == cli.INTERRUPTED and summary(folder)["status"] == "interrupted"
    assert (folder / "export" / "red-left-blob.glb").is_file()


def test_several_products_that_fail_are_all_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any, **__: Any) -> Path:
        raise OSError(errno.ENOSPC, "No space left on device", "/d/step.png")

    break_video(monkeypatch, VideoError("ffmpeg failed"))
    for module in (callbacks, products):
        monkeypatch.setattr(module, "save_preview", full)
    code, folder = train(written(tmp_path), IMPOSSIBLE)
    told, out = summary(folder), capsys.readouterr().out
    assert code == cli.RUN_FAILED and told["status"] == "no mesh"
    assert "warning: preview of step 1: /d/step.png: the disk is full" in out
    assert [name for name, product in told["products"].items() if product["status"] == "failed"] == [
        "images",
        "mesh",
        "video",
    ]
    mesh, video, images = told["error"].split("; no ")
    assert mesh.startswith("no mesh was written for red-left-blob: no surface")
    assert video == "video was written: ffmpeg failed"
    assert images.startswith("images were written: /d/step.png: the disk is full; free some space")
    assert again("export", folder, "exporter.threshold=auto") == cli.OK
    assert summary(folder)["status"] == "no video"
    monkeypatch.undo()
    assert again("test", folder) == cli.OK
    assert summary(folder)["status"] == "no images"
    assert again("validate", folder) == cli.OK
    assert (summary(folder)["status"], summary(folder)["error"]) == ("done", None)


def test_a_stage_without_its_video_is_not_trained_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = written(tmp_path, name="both", stages={"coarse": {"test": {"enabled": True}}, "refine": {}})
    break_video(monkeypatch, VideoError("ffmpeg failed"))
    code, folder = train(file, name="both")
    told = summary(folder)
    assert code == cli.RUN_FAILED and told["status"] == "no video"
    assert [stage["status"] for stage in told["stages"].values()] == ["no video", "no video"]
    assert (folder / told["paths"]["glb"]).is_file()
    monkeypatch.undo()
    capsys.readouterr()
    assert again("train", folder) == cli.OK
    assert "coarse: already done" in capsys.readouterr().out
    assert (summary(folder)["status"], summary(folder)["paths"]["turntable"]) == (
        "done",
        "refine/videos/turntable.mp4",
    )


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


# Files that replace others


def test_a_second_export_and_video_keep_the_first_ones_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, folder = train(written(tmp_path))
    export, videos = folder / "export", folder / "videos"
    first = {path.name: path.read_bytes() for path in export.iterdir()}
    (export / "scene.blend").write_text("the user's own")
    assert again("export", folder) == cli.OK  # the same once more
    assert not (export / "previous-1").exists()
    first["report.json"] = (export / "report.json").read_bytes()
    capsys.readouterr()

    assert again("export", folder, "exporter.formats=[ply]") == cli.OK
    assert (
        f"replaced {', '.join(sorted(first))}; the earlier files are in {export / 'previous-1'}"
        in capsys.readouterr().out
    )
    assert {path.name: path.read_bytes() for path in (export / "previous-1").iterdir()} == first
    assert {path.name for path in export.iterdir()} == {
        "previous-1",
        "red-left-blob.ply",
        "report.json",
        "scene.blend",
    }
    report = json.loads((export / "report.json").read_text())
    assert report["replaced"] == {"files": sorted(first), "kept_in": "previous-1"}
    assert again("export", folder, "exporter.formats=[ply]", "exporter.resolution=12") == cli.OK
    assert (export / "previous-2" / "red-left-blob.ply").is_file()

    video = (videos / "turntable.mp4").read_bytes()
    assert again("test", folder, "test.format=gif", "test.frames=2") == cli.OK
    assert (videos / "previous-1" / "turntable.mp4").read_bytes() == video
    current = {path.name for path in videos.iterdir()}
    assert current == {"previous-1", "turntable.gif", "turntable-cameras.json"}
    paths = summary(folder)["paths"]
    assert paths["turntable"] == "videos/turntable.gif" and paths["ply"] == "export/red-left-blob.ply"
    assert "glb" not in paths and all((folder / path).exists() for path in paths.values())

"""Products of runs: each succeeds or fails on its own, and a newer one replaces the files of an earlier one."""

from __future__ import annotations

import errno
import json
import re
from pathlib import Path
from typing import Any

import pytest
from shared.cli_runs import again, last_line, summary, train, written

from scoredist3d import cli
from scoredist3d.export.video import VideoError, VideoWriter
from scoredist3d.training import callbacks, products

IMPOSSIBLE = "exporter.threshold=1e9"


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

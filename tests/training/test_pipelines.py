"""Whole pipelines: stages run in order, and interrupted pipelines continue."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from shared.tiny_runs import Recorder, plain

from scoredist3d import cli
from scoredist3d.config.fields import ConfigError
from scoredist3d.config.pipeline import Pipeline, load_pipeline
from scoredist3d.training import pipeline as pipeline_module
from scoredist3d.training.checkpoint import read_checkpoint
from scoredist3d.training.lock import locked
from scoredist3d.training.pipeline import run_pipeline


def written(folder: Path, **stages: dict[str, Any]) -> Path:
    file = folder / "stages.yaml"
    file.write_text(yaml.safe_dump({**plain(folder / "out"), "name": "both", "stages": stages}))
    return file


def tiny(folder: Path, *overrides: str) -> Pipeline:
    return load_pipeline([written(folder, coarse={}, refine={"trainer": {"max_steps": 2}})], overrides)


def state(folder: Path) -> dict[str, Any]:
    weights: dict[str, Any] = read_checkpoint(folder / "ckpts" / "last.ckpt")["state_dict"]
    return weights


def test_the_second_stage_goes_on_from_the_first_and_is_the_one_exported(tmp_path: Path) -> None:
    result = run_pipeline(tiny(tmp_path, "system.optimizer.lr=0.0"), devices="cpu", console=Recorder())
    coarse, refine = state(result.folder / "coarse"), state(result.folder / "refine")
    assert all(torch.equal(coarse[name], refine[name]) for name in coarse if name.startswith("scenes.0.geometry"))
    assert coarse["scenes.0.steps"].tolist() == [2, 0] and refine["scenes.0.steps"].tolist() == [3, 2]
    assert list((result.folder / "refine" / "export").glob("*.glb"))
    assert not (result.folder / "coarse" / "export").exists()
    summary = json.loads((result.folder / "summary.json").read_text())
    assert list(summary["stages"]) == ["coarse", "refine"] and summary["seconds"] > 0


def test_only_the_last_stage_writes_a_video_unless_another_one_asks_for_it(tmp_path: Path) -> None:
    def videos(*overrides: str) -> list[str]:
        result = run_pipeline(tiny(tmp_path, "trainer.max_steps=1", *overrides), devices="cpu", console=Recorder())
        return [path.parts[-3] for path in sorted(result.folder.glob("*/videos/turntable.mp4"))]

    assert videos() == ["refine"]
    assert videos("stages.coarse.test.enabled=true", "stages.refine.test.enabled=false") == ["coarse"]


def test_what_a_killed_process_left_in_a_finished_stage_is_removed(tmp_path: Path) -> None:
    root = run_pipeline(tiny(tmp_path), devices="cpu", console=Recorder()).folder
    lock, temporary = root / "coarse" / ".lock", root / "coarse" / "ckpts" / ".last.ckpt.12345.tmp"
    lock.write_text('{"host": "h", "pid": 1}')
    temporary.write_bytes(b"part")
    again = tiny(tmp_path, "stages.refine.trainer.max_steps=3")
    with locked(root / "coarse"):  # An export of the stage, which goes on undisturbed.
        assert run_pipeline(again, devices="cpu", resume=root, console=Recorder()).stages["refine"].step == 3
        assert lock.exists()
    lock.write_text('{"host": "h", "pid": 1}')
    temporary.write_bytes(b"part")
    run_pipeline(again, devices="cpu", resume=root, console=Recorder())
    assert not lock.exists() and not temporary.exists()
    assert not list(root.rglob(".*"))


def test_an_interrupted_pipeline_ends_like_an_uninterrupted_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "whole").mkdir()
    whole = run_pipeline(tiny(tmp_path / "whole"), devices="cpu", console=Recorder())

    run_training = pipeline_module.run_training

    def stop_in_refine(config: Any, **options: Any) -> Any:
        if options["output"].name == "refine":
            config.trainer.max_steps = 1
            run_training(config, **options).folder.joinpath("summary.json").unlink()
            raise KeyboardInterrupt
        return run_training(config, **options)

    (tmp_path / "half").mkdir()
    monkeypatch.setattr(pipeline_module, "run_training", stop_in_refine)
    with pytest.raises(KeyboardInterrupt):
        run_pipeline(tiny(tmp_path / "half"), devices="cpu", console=Recorder())
    monkeypatch.undo()
    (folder,) = (tmp_path / "half" / "out" / "both").iterdir()
    made = (folder / "coarse" / "ckpts" / "last.ckpt").stat().st_mtime_ns
    assert cli.main(["--train", "--resume", str(folder), "--gpu", "cpu"]) == cli.OK
    assert "coarse: already done" in capsys.readouterr().out
    assert (folder / "coarse" / "ckpts" / "last.ckpt").stat().st_mtime_ns == made
    first, second = state(whole.folder / "refine"), state(folder / "refine")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_command_line_runs_and_shows_pipelines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = written(tmp_path, coarse={}, refine={})
    arguments = ["--config", str(file), "--train", "--gpu", "cpu", "trainer.max_steps=1"]
    assert cli.main([*arguments, "--dry-run"]) == cli.OK
    shown = list(yaml.safe_load_all(capsys.readouterr().out))
    assert [stage["trainer"]["max_steps"] for stage in shown] == [1, 1]
    assert not (tmp_path / "out").exists()
    assert cli.main(arguments) == cli.OK
    (folder,) = (tmp_path / "out" / "both").iterdir()
    assert cli.main(["--export", str(folder), "--gpu", "cpu"]) == cli.OK
    assert "refine" in capsys.readouterr().out
    assert cli.main(["--config", str(file), "--export"]) == cli.USAGE_ERROR


def test_a_stage_whose_start_has_changed_begins_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = written(tmp_path, coarse={}, refine={})
    assert cli.main(["--config", str(file), "--train", "--gpu", "cpu", "trainer.max_steps=1"]) == cli.OK
    (folder,) = (tmp_path / "out" / "both").iterdir()
    first = state(folder / "refine")
    again = ["--train", "--resume", str(folder), "--gpu", "cpu", "stages.coarse.trainer.max_steps=3"]
    assert cli.main(again) == cli.OK
    assert "Stage coarse has changed, so stage refine starts again" in capsys.readouterr().out
    assert state(folder / "coarse")["scenes.0.steps"].tolist() == [2, 0]
    kept, second = state(folder / "refine-before-1"), state(folder / "refine")
    assert all(torch.equal(kept[name], first[name]) for name in first)
    assert any(not torch.equal(second[name], first[name]) for name in first)


def test_done_stages_are_not_taken_for_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = written(tmp_path, coarse={}, refine={})
    assert cli.main(["--config", str(file), "--train", "--gpu", "cpu", "trainer.max_steps=1"]) == cli.OK
    (folder,) = (tmp_path / "out" / "both").iterdir()
    other = ["--train", "--resume", str(folder), "--gpu", "cpu", "stages.refine.system.loss.sparsity=3"]
    assert cli.main(other) == cli.USAGE_ERROR
    assert "stages.refine: this stage is already done with other options" in capsys.readouterr().err
    assert cli.main(["--train", "--resume", str(folder), "--gpu", "cpu"]) == cli.OK  # the refused options are not kept


def test_an_extended_stage_keeps_its_schedules(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    moving = {"from": 0.1, "to": 0.01, "end": "${trainer.max_steps}"}
    file = written(tmp_path, coarse={}, refine={"system": {"optimizer": {"lr": moving}}})
    assert cli.main(["--config", str(file), "--train", "--gpu", "cpu", "trainer.max_steps=1"]) == cli.OK
    (folder,) = (tmp_path / "out" / "both").iterdir()
    again = ["--train", "--resume", str(folder), "--gpu", "cpu"]
    capsys.readouterr()
    assert cli.main([*again, "--dry-run", "stages.refine.trainer.max_steps=2"]) == cli.OK
    shown = list(yaml.safe_load_all(capsys.readouterr().out))
    assert [stage["trainer"]["max_steps"] for stage in shown] == [1, 2]
    assert shown[1]["system"]["optimizer"]["lr"]["end"] == 1
    assert cli.main([*again, "stages.refine.trainer.max_steps=2"]) == cli.OK
    assert "still end at step 1; set trainer.schedule_steps=2 to stretch them" in capsys.readouterr().out
    resolved = yaml.safe_load((folder / "refine" / "configs" / "resolved.yaml").read_text())
    assert resolved["trainer"]["max_steps"] == 2 and resolved["system"]["optimizer"]["lr"]["end"] == 1
    assert "max_steps: 1" in (folder / "history" / "pipeline-1.yaml").read_text()
    assert cli.main(again) == cli.OK
    assert "refine: already done" in capsys.readouterr().out


def test_missing_files_of_later_stages_are_found_before_the_first_one_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mesh = {"system": {"geometry": {"type": "implicit-sdf", "shape_init": "mesh", "shape_init_mesh": "none.glb"}}}
    file = written(tmp_path, coarse={}, sdf=mesh, other={"system": {"init_from": str(tmp_path / "nowhere")}})
    assert cli.main(["--config", str(file), "--train", "--gpu", "cpu"]) == cli.USAGE_ERROR
    message = capsys.readouterr().err
    assert "stages.sdf.system.geometry.shape_init_mesh: there is no file none.glb" in message
    assert "stages.other.system.init_from:" in message and "does not exist" in message
    assert not (tmp_path / "out").exists()


def test_a_stage_that_cannot_begin_says_which_and_how_to_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = written(
        tmp_path,
        coarse={},
        refine={
            "system": {"conversion": {"threshold": 1e9, "resolution": 16}, "geometry": {"network": {"hidden_width": 8}}}
        },
    )
    assert cli.main(["--config", str(file), "--train", "--gpu", "cpu", "trainer.max_steps=1"]) == cli.USAGE_ERROR
    captured = capsys.readouterr()
    assert "stages.refine." in captured.err and "system.conversion.threshold is 1e+09" in captured.err
    (folder,) = (tmp_path / "out" / "both").iterdir()
    assert f"--train --resume {folder}" in captured.out
    assert not (folder / "refine").exists()
    good = ["--train", "--resume", str(folder), "--gpu", "cpu", "stages.refine.system.conversion.threshold=auto"]
    assert cli.main(good) in (cli.OK, cli.USAGE_ERROR)  # a scene of one step may be too thin to find a surface in
    assert "coarse: already done" in capsys.readouterr().out


def test_a_pipeline_is_no_run_to_start_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = written(tmp_path, coarse={}, refine={})
    assert cli.main(["--config", str(file), "--train", "--gpu", "cpu", "trainer.max_steps=1"]) == cli.OK
    (folder,) = (tmp_path / "out" / "both").iterdir()
    single = tmp_path / "single.yaml"
    single.write_text(yaml.safe_dump(plain(tmp_path / "out")))
    capsys.readouterr()
    assert cli.main(["--config", str(single), "--train", f"system.init_from={folder}"]) == cli.USAGE_ERROR
    assert f"is a pipeline; give one of its stages: {folder}/coarse, {folder}/refine" in capsys.readouterr().err


def test_the_precision_of_every_stage_is_checked_before_the_first_one_runs(tmp_path: Path) -> None:
    file = written(tmp_path, coarse={}, refine={"trainer": {"precision": "16-mixed"}})
    with pytest.raises(
        ConfigError, match=r"^stages\.refine\.trainer\.precision: 16-mixed .*trainer\.precision=32-true"
    ):
        run_pipeline(load_pipeline([file]), devices="cpu", console=Recorder())
    assert not (tmp_path / "out").exists()


def test_a_stage_that_is_done_may_have_run_in_another_precision(tmp_path: Path) -> None:
    folder = run_pipeline(tiny(tmp_path), devices="cpu", console=Recorder()).folder
    later = tiny(tmp_path, "stages.coarse.trainer.precision=16-mixed")
    console = Recorder()
    run_pipeline(later, devices="cpu", resume=folder, console=console)
    assert "Stage 2 of 2, refine: already done" in console.text

"""Settings that a resumed run changes: named, refused or allowed, and results of earlier states."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from shared.tiny_runs import plain

from scoredist3d import cli
from scoredist3d.config.resume import changed_settings
from scoredist3d.config.validation import to_yaml, validate


def trained(folder: Path, system: str = "text-to-2d", **changes: Any) -> Path:
    """Train a short run on the command line; returns its folder."""
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(plain(folder / "out", system, **changes)))
    assert cli.main(["--config", str(file), "--train", "--gpu", "cpu"]) == cli.OK
    (run,) = (folder / "out").glob("*/*")
    return run


def resume(folder: Path, *arguments: str) -> int:
    return cli.main(["--train", "--resume", str(folder), "--gpu", "cpu", *arguments])


def configs(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*.yaml")}


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_weights_that_do_not_fit_leave_a_run_that_resumes_and_exports(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = trained(tmp_path, "text-to-3d", trainer={"max_steps": 1})
    before = configs(folder), names(folder / "export"), names(folder / "videos")
    assert resume(folder, "system.geometry.grid.num_levels=4", "trainer.max_steps=2") == cli.RUN_FAILED
    captured = capsys.readouterr()
    assert "belongs to another configuration" in captured.err
    assert "changed          system.geometry.grid.num_levels: 3 -> 4\n" in captured.out
    assert (configs(folder), names(folder / "export"), names(folder / "videos")) == before
    assert cli.main(["--export", str(folder), "--gpu", "cpu"]) == cli.OK
    assert resume(folder) == cli.OK


def test_changes_of_seed_and_prompt_are_refused_unless_allowed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = trained(tmp_path, trainer={"max_steps": 1})
    before = configs(folder)
    changes = ["trainer.max_steps=2", "seed=5", "prompt=red right blob"]
    capsys.readouterr()
    assert resume(folder, *changes) == cli.USAGE_ERROR
    error = capsys.readouterr().err
    assert "seed: the run was trained with 0, not 5;" in error and "add --allow-change seed\n" in error
    assert "prompt: the run was trained with 'red left blob', not 'red right blob'" in error
    assert resume(folder, *changes, "--allow-change", "seed") == cli.USAGE_ERROR
    error = capsys.readouterr().err
    assert "seed:" not in error and "add --allow-change prompt" in error and configs(folder) == before
    assert resume(folder, *changes, "--allow-change", "seed", "--allow-change", "prompt") == cli.OK
    told = [line.split(maxsplit=1)[1] for line in capsys.readouterr().out.splitlines() if line.startswith("changed")]
    assert sorted(told) == ['prompt: "red left blob" -> "red right blob"', "seed: 0 -> 5", "trainer.max_steps: 1 -> 2"]


def test_fewer_steps_than_are_done_are_refused_unless_allowed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = trained(tmp_path)
    assert resume(folder, "trainer.max_steps=2") == cli.USAGE_ERROR
    assert "trainer.max_steps: 2 is less than the 3 steps of" in capsys.readouterr().err
    assert resume(folder, "trainer.max_steps=2", "--allow-change", "trainer.max_steps") == cli.OK
    told = json.loads((folder / "summary.json").read_text())
    assert (told["status"], told["step"], told["max_steps"]) == ("done", 3, 2)


def test_the_stages_of_a_pipeline_keep_their_seeds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also the stage that is done, before another one starts."""
    folder = trained(tmp_path, "text-to-3d", name="both", stages={"coarse": {}, "refine": {}}, trainer={"max_steps": 1})
    before = configs(folder)
    more = ["stages.refine.trainer.max_steps=2", "seed=5"]
    assert resume(folder, *more) == cli.USAGE_ERROR
    error = capsys.readouterr().err
    assert "stages.coarse.seed: the run was trained with 0, not 5" in error and "stages.refine.seed:" in error
    assert resume(folder, *more, "--allow-change", "stages.refine.seed") == cli.USAGE_ERROR
    assert "stages.refine" not in capsys.readouterr().err and configs(folder) == before
    assert resume(folder, *more, "--allow-change", "seed") == cli.OK
    assert "changed          seed: 0 -> 5\n" in capsys.readouterr().out


def test_results_of_an_earlier_state_are_set_aside_when_training_continues(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = trained(tmp_path, "text-to-3d", checkpoint={"every_n_steps": 1, "keep": 9}, preview={"every_n_steps": 1})
    assert cli.main(["--validate", str(folder), "--gpu", "cpu"]) == cli.OK
    video, export = names(folder / "videos"), names(folder / "export")
    capsys.readouterr()
    early = folder / "ckpts" / "step-000001.ckpt"
    options = ["trainer.max_steps=2", "test.enabled=false", "exporter.threshold=1e9", "preview.every_n_steps=0"]
    assert resume(early, *options) == cli.RUN_FAILED  # no mesh
    out = capsys.readouterr().out
    assert f"video: replaced {', '.join(sorted(video))}; the earlier files are in" in out and "export: replaced" in out
    assert names(folder / "videos") == names(folder / "export") == {"previous-1"}
    assert names(folder / "videos" / "previous-1") == video and names(folder / "export" / "previous-1") == export
    assert names(folder / "images") == {"step-000001.png", "step-000002.png", "previous-1"}
    assert names(folder / "images" / "previous-1") == {"validation-000003.png"}
    assert names(folder / "ckpts") == {"step-000001.ckpt", "step-000002.ckpt", "last.ckpt"}


def test_changed_settings_are_leaves_of_the_configuration(tmp_path: Path) -> None:
    stored = tmp_path / "resolved.yaml"
    stored.write_text(to_yaml(validate(plain(tmp_path))))
    assert changed_settings(stored, validate(plain(tmp_path))) == []
    other = plain(tmp_path, trainer={"gradient_clip_norm": 1.0})
    other["system"] |= {"guidance": {"type": "sjc"}, "loss": {"sparsity": {"weight": 2}, "opaque": {"weight": 1}}}
    changed = changed_settings(stored, validate(other))
    assert 'system.guidance.type: "sds" -> "sjc"' in changed and "trainer.gradient_clip_norm: null -> 1.0" in changed
    assert any(line.startswith("system.loss.opaque: null -> ") for line in changed)
    assert not any(line.startswith("system.guidance.guidance_scale") for line in changed)

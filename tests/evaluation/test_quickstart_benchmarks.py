"""What the benchmarks of the quickstart take from a run and from a pipeline: seconds, memory and the last stage."""

from __future__ import annotations

import argparse
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import quickstart
import quickstart_quality
from overrides import split_overrides
from summaries import object_folder, phase_seconds, read_summary

COARSE = {"path": "coarse", "seconds": {"start-up": 1.0, "training": 20.0}, "peak_memory_gib": 0.75}
REFINE = {"path": "refine", "seconds": {"start-up": 2.0, "training": 30.0, "export": 4.0}, "peak_memory_gib": 0.5}
PIPELINE = {"seconds": 57.0, "peak_memory_gib": 0.75, "stages": {"coarse": COARSE, "refine": REFINE}}
RUN = {**REFINE, "stages": {"training": {"status": "done", "seconds": 30.0}}}


def write(folder: Path, summary: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def test_seconds_are_summed_over_the_stages_of_a_pipeline(tmp_path: Path) -> None:
    run, pipeline = write(tmp_path / "run", RUN), write(tmp_path / "pipeline", PIPELINE)
    assert phase_seconds(read_summary(run)) == REFINE["seconds"]
    assert phase_seconds(read_summary(pipeline)) == {"start-up": 3.0, "training": 50.0, "export": 4.0}
    assert (object_folder(run), object_folder(pipeline)) == (run, pipeline / "refine")


@pytest.mark.parametrize(("summary", "training"), [(RUN, 30.0), (PIPELINE, 50.0)], ids=["run", "pipeline"])
def test_a_timed_run(summary: dict[str, Any], training: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = []

    def launch(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        folder = write(tmp_path / "quickstart" / "a-red-mug@1", summary)
        if summary is PIPELINE:
            for stage in (COARSE, REFINE):
                write(folder / str(stage["path"]), stage)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", launch)
    asked = argparse.Namespace(config=Path("configs/fast.yaml"), no_compiler=False, gpu="cpu")
    figures = quickstart.run_once("a red mug", tmp_path, asked, [])
    assert (figures["training"], figures["export"]) == (training, 4.0)
    assert figures["peak GiB"] == summary["peak_memory_gib"]
    (command,) = commands
    assert command[command.index("--config") + 1] == str(Path("configs/fast.yaml").resolve())


@pytest.mark.slow
def test_a_new_pipeline_is_measured_by_its_last_stage(tmp_path: Path) -> None:
    short = ["trainer.max_steps=1", "test.frames=1", "exporter.resolution=24", "exporter.check=false"]
    short += ["exporter.max_faces=200", "exporter.texture_size=64", "preview.every_n_steps=0"]
    small = ["prompt=a red mug", f"output_root={tmp_path}", "data.height=16", "data.width=16", *short]
    small += ["data.resolution_milestones=[]", "test.height=16", "test.width=16", "log.tensorboard=false"]
    file = quickstart_quality.ROOT / "configs" / "quickstart.yaml"
    _, config, folder = quickstart_quality.trained(file, small, "cpu")
    assert (config.system.geometry.type, folder.parent.name) == ("flexicubes", "quickstart")  # type: ignore[attr-defined]
    assert list((object_folder(folder) / "export").glob("*.glb"))
    again, settings = quickstart_quality.finished(folder, "cpu")
    assert settings.system.geometry.type == "flexicubes"  # type: ignore[attr-defined]
    assert again.scenes[0].step == 1


def test_overrides_are_found_behind_an_option_with_several_values() -> None:
    given = ["--prompts", "a red mug", "a chair", "test.enabled=false", "--jobs", "2", "system.loss.x=1"]
    options, overrides = split_overrides(given)
    assert options == ["--prompts", "a red mug", "a chair", "--jobs", "2"]
    assert overrides == ["test.enabled=false", "system.loss.x=1"]

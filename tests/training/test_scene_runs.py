"""Whole runs with several scenes, and runs that are initialized from other runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from shared.tiny_runs import Recorder, make, plain

from scoredist3d.config.validation import validate
from scoredist3d.export.base import ExportResult
from scoredist3d.export.report import ExportReport
from scoredist3d.seeding import Rng
from scoredist3d.training.checkpoint import read_checkpoint
from scoredist3d.training.distributed import Devices
from scoredist3d.training.fit import RankContext, build_system
from scoredist3d.training.folder import RunFolder
from scoredist3d.training.lightning_module import TrainingModule
from scoredist3d.training.outputs import Exported, NoMeshError, export_objects
from scoredist3d.training.run import run_training


def weights(folder: Path) -> dict[str, Any]:
    state: dict[str, Any] = read_checkpoint(folder / "ckpts" / "last.ckpt")["state_dict"]
    return state


def several(folder: Path, **trainer: Any) -> Any:
    config = plain(folder, trainer={"max_steps": 4, **trainer})
    config["system"]["particles"] = 2
    return validate(config)


def test_several_scenes_train_resume_and_leave_one_object_each(tmp_path: Path) -> None:
    whole = run_training(several(tmp_path / "whole"), devices="cpu", console=Recorder())
    assert {"glb", "glb 2", "mesh report", "mesh report 2"} <= set(whole.paths)
    half = run_training(several(tmp_path / "half", max_steps=2), devices="cpu", console=Recorder())
    resumed = run_training(several(tmp_path / "half"), devices="cpu", resume=half.folder, console=Recorder())
    first, second = weights(whole.folder), weights(resumed.folder)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_two_processes_train_several_scenes(tmp_path: Path, one_thread: None) -> None:
    """Scenes that are not drawn in a step have no gradient on any rank."""
    both = run_training(several(tmp_path / "two"), devices="cpu:2", console=Recorder())
    one = run_training(several(tmp_path / "one", accumulate=2), devices="cpu", console=Recorder())
    first, second = weights(both.folder), weights(one.folder)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_run_starts_from_another_one(tmp_path: Path) -> None:
    done = run_training(make(tmp_path / "first"), devices="cpu", console=Recorder())
    config = plain(tmp_path / "second", trainer={"max_steps": 1})
    config["system"] |= {"init_from": str(done.folder), "optimizer": {"lr": 0.0}}
    again = run_training(validate(config), devices="cpu", console=Recorder())
    before, after = weights(done.folder), weights(again.folder)
    kept = [name for name in before if name.startswith("scenes.0.geometry")]
    assert kept and all(torch.equal(before[name], after[name]) for name in kept)


def test_a_missing_start_is_named_before_anything_is_written(tmp_path: Path) -> None:
    config = plain(tmp_path / "out")
    config["system"]["init_from"] = str(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"^system\.init_from: .*nowhere does not exist; give a run folder"):
        run_training(validate(config), devices="cpu", console=Recorder())
    assert not (tmp_path / "out").exists()


class Hollow:
    """An exporter that finds no surface in some of the objects."""

    def __init__(self, *empty: str) -> None:
        self.empty = empty

    def for_prompt(self, prompt: str) -> Hollow:
        return self

    def export(self, shape: Any, folder: Path, name: str, progress: Any) -> ExportResult:
        if name in self.empty:
            raise ValueError("nothing is solid")
        (folder / f"{name}.glb").write_bytes(name.encode())
        return ExportResult([folder / f"{name}.glb"], ExportReport({f"{name}.glb": len(name)}, {}))


def test_an_empty_scene_does_not_cost_the_others_their_meshes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, folder = several(tmp_path), RunFolder(tmp_path)
    system = build_system(config, RankContext(Devices.parse("cpu")))

    def export(*empty: str) -> Exported:
        monkeypatch.setattr("scoredist3d.training.outputs.registry.build", lambda block: Hollow(*empty))
        return export_objects(system, config, folder, lambda stage, fraction: None)

    def names(exported: Exported) -> list[str]:
        return [path.name for result in exported.results for path in result.paths]

    both = export()
    assert names(both) == ["red-left-blob.glb", "red-left-blob-2.glb"] and both.problem is None
    second = export("red-left-blob")
    assert names(second) == ["red-left-blob-2.glb"]
    assert second.problem == "no mesh was written for red-left-blob: nothing is solid"
    # What the first export made of the scene that is empty now does not stay among the files of the second.
    assert sorted(path.name for path in folder.export.glob("*.*")) == ["red-left-blob-2.glb", "report.json"]
    kept = sorted(path.name for path in (folder.export / "previous-1").iterdir())
    assert kept == ["red-left-blob-2.glb", "red-left-blob.glb", "report-2.json", "report.json"]
    with pytest.raises(NoMeshError, match="for red-left-blob: nothing is solid; for red-left-blob-2: nothing is solid"):
        export("red-left-blob", "red-left-blob-2")
    assert (folder.export / "red-left-blob-2.glb").is_file()


def test_a_network_of_the_guidances_own_refuses_accumulated_batches(tmp_path: Path) -> None:
    config = plain(tmp_path, trainer={"max_steps": 2, "accumulate": 2})
    config["system"]["guidance"] = {"type": "vsd", "phi": {"network": "unet", "channels": [8]}}
    with pytest.raises(ValueError, match=r"trainer\.accumulate: the guidance trains its own network"):
        run_training(validate(config), devices="cpu", console=Recorder())


def test_answers_of_finite_checks_are_waited_for_before_anything_is_saved(tmp_path: Path) -> None:
    """On CUDA the finite checks of the last step are still pending when training ends."""
    system = build_system(make(tmp_path), RankContext(Devices.parse("cpu")))
    asked = []
    system.guidance.check_finite = lambda: asked.append("guidance")  # type: ignore[method-assign, union-attr]
    module = TrainingModule(system, make(tmp_path).trainer, Rng())
    module.check_finite()
    assert asked == ["guidance"]

"""Runs that end because a value is not finite or the memory is full: one message, and the last checkpoint is kept."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from pytorch_lightning import LightningModule
from shared.tiny_runs import Recorder, make, plain

from scoredist3d import cli
from scoredist3d.export.exporter import TexturedMeshExporter
from scoredist3d.export.video import VideoWriter
from scoredist3d.files import read_json
from scoredist3d.guidance.core.checks import NonFiniteError
from scoredist3d.guidance.sds import ScoreDistillationSampling
from scoredist3d.losses.sparsity import Sparsity
from scoredist3d.priors.analytic import GaussianMixturePrior
from scoredist3d.reasons import is_disk_full, is_out_of_memory, part, part_of, reason
from scoredist3d.renderers.base import Render
from scoredist3d.systems.scene import Scene
from scoredist3d.training import callbacks, fit
from scoredist3d.training.checkpoint import read_trained
from scoredist3d.training.failures import OutOfMemoryError, explained
from scoredist3d.training.lightning_module import TrainingModule

CPU_FULL = (
    "[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
)
WINDOWS_FULL = "DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes"
GPU_FULL = "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 8.00 GiB"
STEP = 2
"""The step, from 0, in which the term breaks; a checkpoint has been saved after each step before."""

Break = Callable[[Any], Any]
"""Function that gets the result of a term and returns a broken one, or raises an exception."""


def raising(error: BaseException) -> Break:
    def breaks(result: Any) -> Any:
        raise error

    return breaks


def nan(result: Any) -> Any:
    """The result with NaN in its tensor."""
    if isinstance(result, Render):
        return replace(result, rgb=result.rgb * float("nan"))
    if hasattr(result, "gradient"):
        return replace(result, gradient=result.gradient * float("inf"))
    return result * float("nan")


TERMS: dict[str, tuple[type, str]] = {
    "render": (Scene, "forward"),
    "encode": (GaussianMixturePrior, "encode"),
    "predict": (GaussianMixturePrior, "predict"),
    "guidance": (ScoreDistillationSampling, "score_gradient"),
    "loss": (Sparsity, "__call__"),
    "backward": (LightningModule, "backward"),
    "optimizer": (torch.optim.Adam, "step"),
    "densification": (Scene, "post_backward"),
    "before": (Scene, "prepare_step"),
}


def break_term(monkeypatch: pytest.MonkeyPatch, term: str, breaks: Break, stage: str = "") -> None:
    """Break a term in step :data:`STEP` of the run whose folder has the given name."""
    cls, method = TERMS[term]
    original, begin = getattr(cls, method), TrainingModule.on_train_batch_start
    now = {"active": False}

    def started(self: TrainingModule, batch: Any, batch_idx: int) -> None:
        in_stage = not stage or Path(str(self.trainer.default_root_dir)).name == stage
        now["active"] = in_stage and self.global_step == STEP
        begin(self, batch, batch_idx)

    def broken(self: Any, *arguments: Any, **options: Any) -> Any:
        result = original(self, *arguments, **options)
        return breaks(result) if now["active"] else result

    monkeypatch.setattr(TrainingModule, "on_train_batch_start", started)
    monkeypatch.setattr(cls, method, broken)


def train(file: Path, **changes: Any) -> tuple[int, Path]:
    base = plain(file.parent / "out", checkpoint={"every_n_steps": 1, "keep": 2}, preview={"every_n_steps": 0})
    file.write_text(yaml.safe_dump({**base, **changes}))
    code = cli.main(["--config", str(file), "--train", "--gpu", "cpu"])
    (folder,) = (file.parent / "out").glob("*/*")
    return code, folder


def message(capsys: pytest.CaptureFixture[str]) -> str:
    """The error message, which is the only one and short."""
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err and "failed" not in out
    (line,) = err.strip().splitlines()
    assert line.startswith("error: ") and len(line) <= 507
    return line.removeprefix("error: ")


def check_state(folder: Path) -> None:
    """The checkpoint before the failure is there, and its weights are finite."""
    state = read_trained(folder / "ckpts" / "last.ckpt")
    assert state.step == STEP
    assert all(bool(v.isfinite().all()) for v in state.weights.values() if isinstance(v, torch.Tensor))
    assert not list((folder / "ckpts").glob(".*"))


NOT_FINITE = [
    ("render", "the render", "Lower system.optimizer.lr, system.guidance.guidance_scale or system.guidance.t_max"),
    ("encode", "the latents of the render", "system.guidance.guidance_scale"),
    ("guidance", "the gradient of sds", "system.guidance.guidance_scale"),
    ("loss", "loss/sparsity", "Lower system.optimizer.lr or system.loss.sparsity.weight"),
]
FULL = [
    ("render", MemoryError(), "the render"),
    ("encode", RuntimeError(CPU_FULL), "the encoding of the render"),
    ("predict", RuntimeError(WINDOWS_FULL), "the guidance"),
    ("loss", RuntimeError(CPU_FULL), "the loss sparsity"),
    ("backward", MemoryError(), "the backward pass"),
    ("optimizer", RuntimeError(CPU_FULL), "the optimizer"),
    ("densification", np._core._exceptions._ArrayMemoryError((9,), np.dtype(float)), "the densification"),
    ("before", OSError(12, "Cannot allocate memory"), "the update before a step"),
]
LESS = "Lower data.batch_size, data.height, data.width or system.particles_per_step, or use a computer with more memory"


@pytest.mark.parametrize(("term", "named", "remedy"), NOT_FINITE)
def test_a_value_that_is_not_finite_is_named(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    term: str,
    named: str,
    remedy: str,
) -> None:
    break_term(monkeypatch, term, nan)
    code, folder = train(tmp_path / "c.yaml")
    said = message(capsys)
    assert code == cli.RUN_FAILED and said.startswith(f"step {STEP}: NaN or infinity in {named}. ") and remedy in said
    how = f"--train --resume {folder} KEY=VALUE"
    assert f"The checkpoint of step {STEP} is kept. To continue: python launch.py {how}" in said
    check_state(folder)
    assert read_json(folder / "summary.json")["error"] == said
    monkeypatch.undo()
    assert cli.main([*how.replace("KEY=VALUE", "system.optimizer.lr=0.001").split(), "--gpu", "cpu"]) == cli.OK


@pytest.mark.parametrize(("term", "error", "named"), FULL)
def test_a_full_memory_names_the_part_and_what_needs_less(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    term: str,
    error: Exception,
    named: str,
) -> None:
    break_term(monkeypatch, term, raising(error))
    code, folder = train(tmp_path / "c.yaml")
    said = message(capsys)
    assert code == cli.RUN_FAILED and said.startswith(
        f"the memory is full in {named}. {LESS}. The checkpoint of step 2"
    )
    check_state(folder)
    monkeypatch.undo()
    assert cli.main(["--train", "--resume", str(folder), "data.batch_size=1", "--gpu", "cpu"]) == cli.OK


@pytest.mark.parametrize(
    ("term", "breaks", "said"),
    [
        ("guidance", nan, "step 2: NaN or infinity in the gradient of sds. "),
        ("loss", nan, "step 2: NaN or infinity in loss/sparsity. "),
        ("render", raising(torch.OutOfMemoryError(GPU_FULL)), "the memory of the GPU is full in the render. "),
        ("optimizer", raising(RuntimeError(CPU_FULL)), "the memory is full in the optimizer. "),
    ],
)
def test_the_stage_of_a_pipeline_is_named(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    term: str,
    breaks: Break,
    said: str,
) -> None:
    break_term(monkeypatch, term, breaks, stage="refine")
    code, folder = train(tmp_path / "c.yaml", name="both", stages={"coarse": {}, "refine": {}})
    told = message(capsys)
    assert code == cli.RUN_FAILED and told.startswith(f"stage refine, {said}")
    assert told.endswith(f"To continue: python launch.py --train --resume {folder} stages.refine.KEY=VALUE")
    check_state(folder / "refine")
    summary = read_json(folder / "summary.json")
    assert (summary["status"], summary["error"]) == ("failed", told)
    assert [stage["status"] for stage in summary["stages"].values()] == ["done", "failed"]
    monkeypatch.undo()
    how = ["--train", "--resume", str(folder), "stages.refine.system.optimizer.lr=0.001", "--gpu", "cpu"]
    assert cli.main(how) == cli.OK and "coarse: already done" in capsys.readouterr().out


def test_a_parameter_that_an_update_breaks_is_named_and_not_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = torch.optim.Adam.step
    calls = iter(range(100))

    def breaks(self: torch.optim.Adam, *arguments: Any, **options: Any) -> Any:
        result = original(self, *arguments, **options)
        if next(calls) == STEP:
            with torch.no_grad():
                self.param_groups[0]["params"][0].view(-1)[0] = float("inf")
        return result

    monkeypatch.setattr(torch.optim.Adam, "step", breaks)
    code, folder = train(tmp_path / "c.yaml")
    assert code == cli.RUN_FAILED
    assert message(capsys).startswith("step 3: NaN or infinity in the parameter scenes.0.geometry.table. Lower system.")
    check_state(folder)


def test_a_broken_parameter_is_the_cause_of_a_broken_render(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build = fit.build_system

    def poisoned(*arguments: Any) -> Any:
        system = build(*arguments)
        with torch.no_grad():
            system.geometry.table.fill_(float("nan"))
        return system

    monkeypatch.setattr("scoredist3d.training.run.build_system", poisoned)
    with pytest.raises(NonFiniteError, match=r"step 0: NaN or infinity in the parameter scenes\.0\.geometry\.table"):
        from scoredist3d.training.run import run_training

        run_training(make(tmp_path), devices="cpu", console=Recorder())


def test_a_run_without_a_checkpoint_starts_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(GaussianMixturePrior, "__init__", lambda *_, **__: raising(MemoryError())(None))
    code, _ = train(tmp_path / "c.yaml")
    said = message(capsys)
    assert code == cli.RUN_FAILED and said.startswith("the memory is full in the start-up. Lower data.batch_size")
    assert said.endswith("No checkpoint has been saved yet, so start the run again")


def test_a_full_memory_costs_a_preview_and_products_but_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(callbacks, "save_preview", lambda *_: raising(torch.OutOfMemoryError(GPU_FULL))(None))
    for cls, method in ((VideoWriter, "add"), (TexturedMeshExporter, "export")):
        monkeypatch.setattr(cls, method, lambda *_, **__: raising(RuntimeError(CPU_FULL))(None))
    code, folder = train(tmp_path / "c.yaml", preview={"every_n_steps": 2, "size": 8, "azimuths": [0.0]})
    out = capsys.readouterr().out
    assert code == cli.RUN_FAILED and "warning: preview of step 2: the memory is full; lower preview.size" in out
    told = read_json(folder / "summary.json")["products"]
    assert told["images"]["status"] == "done"
    assert told["mesh"]["error"].startswith(
        "no mesh was written: the memory is full in the export. Lower exporter.resolution or exporter.texture_size"
    )
    assert told["video"]["error"].startswith(
        "no video was written: the memory is full in the video. Lower test.height or test.width"
    )
    assert cli.main(["--export", str(folder), "--gpu", "cpu"]) == cli.RUN_FAILED
    assert message(capsys).startswith("the memory is full in the export. Lower exporter.resolution")


def test_settings_that_a_config_has_not_are_not_named(tmp_path: Path) -> None:
    images = make(tmp_path, "text-to-2d", trainer={"precision": "16-mixed"})
    said = str(explained(NonFiniteError(4, "loss"), images))
    assert said.endswith("system.guidance.t_max, or set trainer.precision=32-true.")
    said = str(explained(torch.OutOfMemoryError(GPU_FULL), make(tmp_path, "text-to-2d")))
    assert said == (
        "the memory of the GPU is full in this run. Lower system.geometry.particles or prior.image_size, or set "
        "trainer.precision=bf16-mixed, or use a GPU with more memory"
    )


def test_errors_are_classified() -> None:
    for text in (CPU_FULL, WINDOWS_FULL, GPU_FULL, "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"):
        assert is_out_of_memory(RuntimeError(text))
    assert not is_out_of_memory(ValueError(CPU_FULL)) and not is_out_of_memory(RuntimeError("out of range"))
    assert is_disk_full(OSError(28, "No space left on device")) and not is_disk_full(OSError(5, "Input/output error"))
    other = RuntimeError("a bug")
    assert explained(other, None) is other  # type: ignore[arg-type]
    assert reason(OutOfMemoryError("full")) == "full" and isinstance(OutOfMemoryError("full"), MemoryError)
    with pytest.raises(KeyError) as caught, part("the whole"), part("the piece", "data.height"):
        raise KeyError("x")
    found = part_of(caught.value)
    assert found is not None and (found.name, found.settings) == ("the piece", ("data.height",))
    assert re.fullmatch(r"step 3: NaN or infinity in loss/a\. Lower .+", str(NonFiniteError(3, "loss/a")))

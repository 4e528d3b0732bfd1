"""Whole runs: outputs, determinism, resuming, interrupts, several processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from shared.tiny_runs import Recorder, make, plain

from scoredist3d.guidance.core.checks import NonFiniteError
from scoredist3d.seeding import Rng
from scoredist3d.training import fit as fit_module
from scoredist3d.training.callbacks import Checkpoints
from scoredist3d.training.checkpoint import read_checkpoint
from scoredist3d.training.folder import find_run
from scoredist3d.training.metrics import read_rows
from scoredist3d.training.run import run_export, run_test, run_training, run_validation


def assert_same(first: Any, second: Any, path: str = "") -> None:
    """Check that two states have equal structure, types and bits."""
    assert type(first) is type(second), path
    if isinstance(first, torch.Tensor):
        assert torch.equal(first, second), f"{path} differs by {(first - second).abs().max()}"
    elif isinstance(first, dict):
        assert first.keys() == second.keys(), path
        for key in first:
            assert_same(first[key], second[key], f"{path}/{key}")
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second), path
        for index, (a, b) in enumerate(zip(first, second, strict=True)):
            assert_same(a, b, f"{path}/{index}")
    else:
        assert first == second, path


def last(folder: Path) -> dict[str, Any]:
    return read_checkpoint(find_run(folder)[1])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Recorder]:
    """A finished 3-step 3D run: result, config and console output."""
    console = Recorder()
    config = make(tmp_path_factory.mktemp("runs"), log={"every_n_steps": 1, "tensorboard": True})
    return run_training(config, devices="cpu", console=console), config, console


def test_a_run_ends_with_everything_it_promises(trained: Any) -> None:
    result, _, console = trained
    paths = result.paths
    expected = {"turntable", "image grid", "glb", "obj", "material", "texture", "metrics", "tensorboard", "config"}
    assert expected | {"code snapshot", "checkpoint", "mesh report", "summary"} == set(paths)
    assert all(path.exists() and str(path) in console.text for path in paths.values())
    assert paths["glb"].read_bytes()[:4] == b"glTF"
    assert [path.name for path in sorted((result.folder / "images").iterdir())] == [
        "step-000002.png",
        "step-000003.png",
    ]
    assert list(result.seconds) == ["start-up", "training", "export", "turntable"]
    for text in (
        "red left blob",
        "gaussian-mixture",
        "sds",
        "implicit-volume",
        "CPU",
        "step 3/3",
        "it/s",
        "GiB",
        "left",
    ):
        assert text in console.text
    assert console.text.index("prior ") < console.text.index("step 1/3") < console.text.index("Done:")
    assert list(paths["tensorboard"].glob("events.out.tfevents.*"))


def test_resolved_config_runs_again_by_itself(trained: Any) -> None:
    from scoredist3d.config.validation import load_experiment

    result, config, _ = trained
    assert load_experiment([result.paths["config"]]) == config


def test_metrics_hold_each_term_raw_and_weighted_and_the_rates(trained: Any) -> None:
    result, _, _ = trained
    columns, rows = read_rows(result.paths["metrics"])
    assert [row["step"] for row in rows] == ["1", "2", "3"]
    wanted = {"loss", "loss/guidance", "weighted/guidance", "loss/sparsity", "weighted/sparsity", "gradient_norm"}
    assert wanted | {"lr/geometry.encoding", "lr/geometry.network", "lr/background"} <= set(columns)
    ratios = [float(row["weighted/sparsity"]) / float(row["loss/sparsity"]) for row in rows]
    assert ratios == pytest.approx([0.1, 0.19, 0.28], rel=1e-5)


def test_checkpoint_holds_occupancy_and_optimiser_but_no_prior(trained: Any) -> None:
    state = last(trained[0].folder)
    assert state["global_step"] == 3
    assert "scenes.0.renderer.occupancy.occupied" in state["state_dict"]
    assert len(state["optimizer_states"][0]["state"]) == len(list(trained[0].system.parameters()))
    assert not any("prior" in name or "_means" in name for name in state["state_dict"])


def test_validate_test_and_export_of_a_finished_run(trained: Any) -> None:
    result, config, _ = trained
    files = {path: path.read_bytes() for path in (result.paths["glb"], result.paths["texture"])}
    exported = run_export(config, result.folder, devices="cpu", console=Recorder())
    assert exported.step == 3 and set(exported.paths) == {"glb", "obj", "material", "texture", "mesh report"}
    assert all(path.read_bytes() == content for path, content in files.items())
    frames = run_test(config, find_run(result.folder)[1], devices="cpu", console=Recorder())
    assert set(frames.paths) == {"turntable"}
    grid = run_validation(config, result.folder, devices="cpu", console=Recorder()).paths["image grid"]
    assert grid.name == "validation-000003.png"
    assert grid.read_bytes() == result.paths["image grid"].read_bytes()


def test_same_seed_gives_the_same_checkpoint_another_seed_another(trained: Any, tmp_path: Path) -> None:
    again = run_training(make(tmp_path, log={"every_n_steps": 1}), devices="cpu", console=Recorder())
    assert_same(last(trained[0].folder), last(again.folder))
    other = run_training(make(tmp_path, seed=1), devices="cpu", console=Recorder())
    assert not torch.equal(
        last(other.folder)["state_dict"]["scenes.0.geometry.table"],
        again.system.state_dict()["scenes.0.geometry.table"],
    )


def test_images_run_writes_grid_and_animation_and_resumes(tmp_path: Path) -> None:
    changes = {"checkpoint": {"every_n_steps": 2, "keep": 2}}
    whole = run_training(make(tmp_path, "text-to-2d", **changes), devices="cpu", console=Recorder())
    assert {"optimisation", "image grid", "metrics"} <= set(whole.paths) and "glb" not in whole.paths
    assert [path.name for path in sorted((whole.folder / "ckpts").glob("step-*"))] == [
        "step-000002.ckpt",
        "step-000003.ckpt",
    ]
    reference, metrics = last(whole.folder), whole.paths["metrics"].read_bytes()
    with pytest.raises(ValueError, match="no object to export"):
        run_export(make(tmp_path, "text-to-2d"), whole.folder, devices="cpu", console=Recorder())
    resumed = run_training(
        make(tmp_path, "text-to-2d", **changes),
        devices="cpu",
        resume=whole.folder / "ckpts" / "step-000002.ckpt",
        console=Recorder(),
    )
    assert resumed.folder.resolve() == whole.folder.resolve()
    assert_same(reference, last(resumed.folder))
    assert resumed.paths["metrics"].read_bytes() == metrics


def test_a_finished_run_resumes_to_nothing_or_to_more_steps(trained: Any, tmp_path: Path) -> None:
    first = run_training(make(tmp_path), devices="cpu", console=Recorder())
    again = run_training(make(tmp_path), devices="cpu", resume=first.folder, console=Recorder())
    assert again.step == 3
    longer = run_training(
        make(tmp_path, trainer={"max_steps": 5, "accumulate": 1}),
        devices="cpu",
        resume=first.folder,
        console=Recorder(),
    )
    assert longer.step == 5 and last(first.folder)["global_step"] == 5


def test_killed_and_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"checkpoint": {"every_n_steps": 1, "keep": 1}, "log": {"every_n_steps": 4}}
    config_file = tmp_path / "config.yaml"
    endless = plain(tmp_path / "killed", **changes, trainer={"max_steps": 10**6}, preview={"every_n_steps": 0})
    config_file.write_text(yaml.safe_dump(endless))
    command = [sys.executable, "-m", "scoredist3d.cli", "--config", str(config_file), "--train", "--gpu", "cpu"]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment) as process:
        deadline = time.monotonic() + 600
        try:
            # Ten steps or more: the folder keeps one checkpoint, and a fast machine leaves any single one behind.
            while not any(int(file.stem[5:]) >= 10 for file in (tmp_path / "killed").glob("*/*/ckpts/step-*.ckpt")):
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.02)
        finally:
            process.send_signal(signal.SIGKILL)
    (killed,) = (tmp_path / "killed").glob("*/*")
    steps = last(killed)["global_step"] + 3
    finish = changes | {"trainer": {"max_steps": steps}, "preview": {"every_n_steps": 0}}
    resumed = run_training(make(tmp_path, **finish), devices="cpu", resume=killed, console=Recorder())
    whole = run_training(make(tmp_path / "whole", **finish), devices="cpu", console=Recorder())
    assert resumed.step == whole.step == steps
    assert_same(last(whole.folder), last(resumed.folder))
    assert resumed.paths["metrics"].read_bytes() == whole.paths["metrics"].read_bytes()
    assert not list((killed / "ckpts").glob(".*.tmp"))


def test_ctrl_c_saves_a_checkpoint_and_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    after_step = Checkpoints.after_step

    def press(self: Checkpoints, trainer: Any, module: Any, step: int) -> None:
        after_step(self, trainer, module, step)
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Checkpoints, "after_step", press)
    before = signal.getsignal(signal.SIGINT)  # ignored where the tests run in the background of a shell
    config_file = tmp_path / "config.yaml"
    config_file.write_text(yaml.safe_dump(plain(tmp_path, trainer={"max_steps": 50})))
    from scoredist3d.cli import main

    said = Recorder()
    monkeypatch.setattr(sys, "stdout", said.stream)
    assert main(["--config", str(config_file), "--train", "--gpu", "cpu"]) == 130
    (run,) = tmp_path.glob("scoredist3d/*")
    assert f"Stopped at step 2 of 50. To continue: python launch.py --train --resume {run}" in said.text
    assert last(run)["global_step"] == 2 and not (run / "videos").exists()
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_while_loading_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import scoredist3d.training.run as run_module

    monkeypatch.setattr(run_module, "build_system", lambda *_: signal.raise_signal(signal.SIGINT))
    console = Recorder()
    with pytest.raises(KeyboardInterrupt):
        run_training(make(tmp_path), devices="cpu", console=console)
    assert "Stopped before the first checkpoint" in console.text


def test_divergence_stops_with_step_and_term_and_saves_nothing_broken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from scoredist3d.losses.sparsity import Sparsity

    calls = iter(range(100))
    original = Sparsity.__call__

    def breaks(self: Sparsity, render: Any, geometry: Any, step: int, rng: Rng) -> torch.Tensor:
        return original(self, render, geometry, step, rng) * (float("nan") if next(calls) == 2 else 1.0)

    monkeypatch.setattr(Sparsity, "__call__", breaks)
    config = make(tmp_path, checkpoint={"every_n_steps": 1}, trainer={"max_steps": 5})
    with pytest.raises(NonFiniteError, match=r"step 2: NaN or infinity in loss/sparsity"):
        run_training(config, devices="cpu", console=Recorder())
    (run,) = tmp_path.glob("*/*")
    state = last(run)
    assert state["global_step"] == 2
    assert all(bool(v.isfinite().all()) for v in state["state_dict"].values() if isinstance(v, torch.Tensor))


def test_a_gradient_that_is_not_finite_names_the_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build = fit_module.build_system

    def poisoned(*arguments: Any) -> Any:
        system = build(*arguments)
        system.geometry.table.register_hook(lambda gradient: gradient * float("inf"))
        return system

    monkeypatch.setattr("scoredist3d.training.run.build_system", poisoned)
    with pytest.raises(NonFiniteError, match=r"step 0: NaN or infinity in the gradient of scenes\.0\.geometry\.table"):
        run_training(make(tmp_path), devices="cpu", console=Recorder())


def test_mismatched_and_unreadable_checkpoints_are_one_sentence(trained: Any, tmp_path: Path) -> None:
    result, config, _ = trained
    other = make(tmp_path, "text-to-2d")
    with pytest.raises(ValueError, match="belongs to another configuration"):
        run_training(other, devices="cpu", resume=result.folder, console=Recorder())
    with pytest.raises(ValueError, match="GPU numbers such as"):
        run_training(config, devices="tpu", console=Recorder())


def test_accumulated_batches_and_clipping(tmp_path: Path) -> None:
    config = make(
        tmp_path, trainer={"max_steps": 2, "accumulate": 2, "gradient_clip_norm": 1e-3}, log={"every_n_steps": 1}
    )
    result = run_training(config, devices="cpu", console=Recorder())
    rows = read_rows(result.paths["metrics"])[1]
    assert [row["step"] for row in rows] == ["1", "2"] and result.step == 2
    assert float(rows[0]["gradient_norm"]) > 1e-3  # logged as it was before clipping
    first_moment = last(result.folder)["optimizer_states"][0]["state"]
    norm = torch.stack([entry["exp_avg"].norm() for entry in first_moment.values()]).norm()
    # m_2 = 0.9 * 0.1 g_1 + 0.1 g_2 with |g_i| <= 1e-3
    assert 0 < float(norm) <= 1.9e-4 * (1 + 1e-4)


def test_two_processes_train_one_scene_with_their_own_cameras(tmp_path: Path, one_thread: None) -> None:
    """Two ranks with averaged gradients compute the same as one rank that accumulates two batches.

    The run itself checks at every checkpoint that the weights of the ranks are equal.
    """
    both = run_training(make(tmp_path / "two"), devices="cpu:2", console=Recorder())
    one = run_training(
        make(tmp_path / "one", trainer={"max_steps": 3, "accumulate": 2}), devices="cpu", console=Recorder()
    )
    alone = run_training(make(tmp_path / "alone"), devices="cpu", console=Recorder())
    table = "scenes.0.geometry.table"
    states = [last(result.folder)["state_dict"] for result in (both, one, alone)]
    assert not torch.allclose(states[0][table], states[2][table], atol=1e-4)
    # Halving is exact in floating point: the mean over ranks and that over accumulated batches are the same bits.
    assert_same(states[0], states[1])


needs_two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@pytest.mark.parametrize(
    "devices", ["cpu:2", pytest.param([0, 1], marks=[pytest.mark.gpu, needs_two_gpus], id="two GPUs")]
)
def test_an_error_of_the_first_rank_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, devices: str | list[int]
) -> None:
    """A failed rank ends at once, although the other rank waits for it in the sum of gradients."""
    from scoredist3d.training.lightning_module import TrainingModule

    step = TrainingModule.training_step

    def broken(self: TrainingModule, batch: Any, batch_idx: int) -> Any:
        if batch_idx == 1:
            raise RuntimeError("this rank is broken")
        return step(self, batch, batch_idx)

    monkeypatch.setattr(TrainingModule, "training_step", broken)  # in this process, which is rank 0
    with pytest.raises(RuntimeError, match="this rank is broken"):
        run_training(make(tmp_path), devices=devices, console=Recorder())


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
def test_gpu_run_and_its_evaluation_on_the_cpu(tmp_path: Path, precision: str) -> None:
    config = make(tmp_path, trainer={"max_steps": 6, "precision": precision}, log={"every_n_steps": 3})
    result = run_training(config, devices=[0], console=Recorder())
    assert result.step == 6 and result.system is not None and result.system.device.type == "cuda"
    assert result.paths["turntable"].is_file()
    assert run_validation(config, result.folder, devices="cpu", console=Recorder()).paths["image grid"].is_file()


@pytest.mark.gpu
@needs_two_gpus
def test_two_gpus_train_one_scene(tmp_path: Path) -> None:
    result = run_training(make(tmp_path), devices=[0, 1], console=Recorder())
    assert result.step == 3 and last(result.folder)["global_step"] == 3

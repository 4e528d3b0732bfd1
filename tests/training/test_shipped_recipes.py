"""The recipes that ship, with the prior that ships, shortened: every part of the real path runs and repeats exactly."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from scoredist3d import cli
from scoredist3d.config.validation import load_experiment
from scoredist3d.training.checkpoint import read_checkpoint

ROOT = Path(__file__).resolve().parents[2]
SHORT = [
    "trainer.max_steps=3",
    "preview.every_n_steps=2",
    "preview.size=16",
    "checkpoint.every_n_steps=2",
    "test.frames=3",
    "test.height=32",
    "test.width=32",
    "data.height=32",
    "data.width=32",
    "data.resolution_milestones=[]",
    "exporter.resolution=24",
    "exporter.texture_size=64",
    "exporter.max_faces=500",
]


def train(recipe: str, output: Path, *overrides: str) -> Path:
    arguments = ["--config", str(ROOT / "configs" / recipe), "--train", "--gpu", "cpu", "prompt=a red mug"]
    assert cli.main([*arguments, f"output_root={output}", *SHORT, *overrides]) == cli.OK
    (summary,) = output.rglob("summary.json")
    return summary.parent


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train("quickstart.yaml", tmp_path_factory.mktemp("quickstart"))


def test_quickstart_leaves_everything_behind(quickstart: Path) -> None:
    for name in ("videos/turntable.mp4", "export/a-red-mug.glb", "export/a-red-mug.obj", "export/a-red-mug.mtl"):
        assert (quickstart / name).stat().st_size > 0
    for name in ("metrics.csv", "configs/resolved.yaml", "configs/config.yaml", "code/packages.txt", "summary.json"):
        assert (quickstart / name).stat().st_size > 0
    assert list((quickstart / "images").glob("step-*.png")) and list((quickstart / "tb").iterdir())


def test_quickstart_repeats_bit_by_bit(quickstart: Path, tmp_path: Path) -> None:
    first = read_checkpoint(quickstart / "ckpts" / "last.ckpt")["state_dict"]
    second = read_checkpoint(train("quickstart.yaml", tmp_path) / "ckpts" / "last.ckpt")["state_dict"]
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_resuming_with_more_steps_moves_what_is_written_in_terms_of_them(quickstart: Path) -> None:
    config = load_experiment([quickstart / "configs" / "config.yaml"], ["trainer.max_steps=600"])
    assert config.system.guidance.t_max.end == 600
    resolved = load_experiment([quickstart / "configs" / "resolved.yaml"])
    assert resolved.system.guidance.t_max.end == 3


def test_images_recipe_runs(tmp_path: Path) -> None:
    run = train("text-to-2d/sds.yaml", tmp_path)
    assert (run / "videos" / "optimisation.mp4").stat().st_size > 0
    assert not (run / "export").exists()


def test_sixteen_bit_on_a_cpu_is_refused_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--config", str(ROOT / "configs" / "quickstart.yaml"), "--train", "--gpu", "cpu", "prompt=a red mug"]
    code = cli.main([*arguments, f"output_root={tmp_path / 'out'}", "trainer.precision=bf16-mixed"])
    assert code == cli.USAGE_ERROR
    assert "trainer.precision=32-true" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_package_puts_waiting_threads_to_sleep_before_torch_loads() -> None:
    code = "import sys, os, scoredist3d; print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules)"
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert result.stdout.split() == ["PASSIVE", "False"], result.stderr

"""The shipped recipes with the embedded prior, shortened: all parts run, and runs repeat bit by bit."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from scoredist3d import cli
from scoredist3d.config.resume import load_resumed
from scoredist3d.config.validation import load_experiment
from scoredist3d.training.checkpoint import read_checkpoint
from scoredist3d.training.distributed import Devices
from scoredist3d.training.precision import slow_prior_warning

ROOT = Path(__file__).resolve().parents[2]
OUR_LINES = re.compile(
    r"(prompt|prior|guidance|representation|steps|device|output) +\S|step \d+/\d+ |"
    r"warning: the prompt is longer than the prior's|[a-z ]+ on cpu: backend|Stage \d of \d, \w+:$|system\.init_from: |"
    r"(export|turntable|optimisation): |mesh: |Done:$|  \S"
)

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
    "exporter.check=false",
]


def train(recipe: str, output: Path, *overrides: str) -> Path:
    arguments = ["--config", str(ROOT / "configs" / recipe), "--train", "--gpu", "cpu", "prompt=a red mug"]
    assert cli.main([*arguments, f"output_root={output}", *SHORT, *overrides]) == cli.OK
    (summary,) = output.rglob("summary.json")
    return summary.parent


@pytest.fixture(scope="module")
def fast(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train("fast.yaml", tmp_path_factory.mktemp("fast"))


def test_the_fast_recipe_leaves_everything_behind(fast: Path) -> None:
    for name in ("videos/turntable.mp4", "export/a-red-mug.glb", "export/a-red-mug.obj", "export/a-red-mug.mtl"):
        assert (fast / name).stat().st_size > 0
    for name in ("metrics.csv", "configs/resolved.yaml", "configs/config.yaml", "code/packages.txt", "summary.json"):
        assert (fast / name).stat().st_size > 0
    assert list((fast / "images").glob("step-*.png")) and list((fast / "tb").iterdir())


def test_the_fast_recipe_repeats_bit_by_bit(fast: Path, tmp_path: Path) -> None:
    first = read_checkpoint(fast / "ckpts" / "last.ckpt")["state_dict"]
    second = read_checkpoint(train("fast.yaml", tmp_path) / "ckpts" / "last.ckpt")["state_dict"]
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_longer_fast_run_keeps_its_schedules(fast: Path) -> None:
    longer = load_resumed(fast / "configs" / "config.yaml", overrides=["trainer.max_steps=600"])
    assert (longer.trainer.max_steps, longer.system.guidance.t_max.end, longer.system.optimizer.lr.end) == (600, 3, 3)
    new = load_experiment([fast / "configs" / "config.yaml"], ["trainer.max_steps=600"])
    assert new.system.guidance.t_max.end == 600


def test_images_recipe_runs(tmp_path: Path) -> None:
    run = train("text-to-2d/sds.yaml", tmp_path)
    assert (run / "videos" / "optimisation.mp4").stat().st_size > 0
    assert not (run / "export").exists()


@pytest.mark.parametrize(
    ("recipe", "overrides", "problem"),
    [
        (
            "fast.yaml",
            ["trainer.precision=bf16-mixed"],
            "bf16-mixed computes in bfloat16, which is many times slower",
        ),
        (
            "dreamfusion-sd.yaml",
            [],
            "16-mixed computes in float16, which is slower than float32 on a CPU and overflows",
        ),
        ("pipeline/magic3d-sd.yaml", [], "16-mixed computes in float16"),
    ],
)
def test_mixed_precision_on_a_cpu_is_refused_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], recipe: str, overrides: list[str], problem: str
) -> None:
    arguments = ["--config", str(ROOT / "configs" / recipe), "--train", "--gpu", "cpu", "prompt=a red mug"]
    code = cli.main([*arguments, f"output_root={tmp_path / 'out'}", *overrides])
    assert code == cli.USAGE_ERROR
    message = capsys.readouterr().err
    assert f"trainer.precision: {problem}" in message
    assert "Add trainer.precision=32-true to the command, or choose a GPU with --gpu 0." in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("precision", "device", "warned"), [("fp16", "cpu", True), ("auto", "cpu", False), ("bf16", "gpu", False)]
)
def test_a_prior_in_half_precision_on_a_cpu_gets_a_warning(precision: str, device: str, warned: bool) -> None:
    overrides = ["prompt=a red mug", f"prior.precision={precision}"]
    config = load_experiment([ROOT / "configs" / "fast.yaml"], overrides)
    warning = slow_prior_warning(config, Devices(device, (0,)))
    assert ("add prior.precision=fp32 to the command" in (warning or "")) == warned


LONG = "a red mug and a blue chair, " * 8


@pytest.mark.parametrize(("recipe", "prompt"), [("text-to-2d/vsd.yaml", LONG), ("quickstart.yaml", "a red mug")])
def test_every_line_of_a_run_is_ours(tmp_path: Path, recipe: str, prompt: str) -> None:
    """Nothing is written to standard error, even if it is a terminal, where libraries show progress bars."""
    pty = pytest.importorskip("pty")
    reader, writer = pty.openpty()
    arguments = ["--config", f"configs/{recipe}", "--train", "--gpu", "cpu", f"prompt={prompt}"]
    command = [sys.executable, "launch.py", *arguments, f"output_root={tmp_path}", *SHORT]
    result = subprocess.run(
        command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=writer, text=True
    )
    os.write(writer, b"end")
    leaked = os.read(reader, 1 << 16).decode()
    os.close(reader)
    os.close(writer)
    assert (result.returncode, leaked) == (0, "end")
    strange = [line for line in result.stdout.splitlines() if not OUR_LINES.match(line)]
    assert strange == []


def test_the_package_puts_waiting_threads_to_sleep_before_torch_loads() -> None:
    code = "import sys, os, scoredist3d; print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules)"
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert result.stdout.split() == ["PASSIVE", "False"], result.stderr

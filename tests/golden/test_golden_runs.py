"""Results and checkpoints of an earlier version: short runs end where they ended, and kept runs go on.

The tolerance leaves room for other hardware, which rounds differently; the values were made with one thread.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from shared.golden_cases import CHECKPOINTS, NAMES, SOURCE, kept_values, run_case, summary_of

from scoredist3d import cli

TOLERANCE = 1e-3
VALUES = kept_values()
RUNS = sorted(path.name for path in CHECKPOINTS.iterdir() if path.name != "pipeline")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scene that edits start from."""
    return run_case(SOURCE, tmp_path_factory.mktemp("source"))


def test_every_case_has_values() -> None:
    assert list(VALUES) == NAMES
    assert {"implicit-volume", "implicit-sdf", "neus", "gaussians", "dmtet", "flexicubes", "textured-mesh"} <= set(RUNS)


@pytest.mark.parametrize("name", NAMES)
def test_a_short_run_ends_where_it_ended(name: str, tmp_path: Path, source: Path) -> None:
    found, expected = summary_of(run_case(name, tmp_path, source)), VALUES[name]
    assert found.keys() == expected.keys()
    for key, entry in expected.items():
        assert found[key]["norm"] == pytest.approx(entry["norm"], rel=TOLERANCE, abs=1e-9), key
        scale = max(map(abs, entry["values"]), default=0.0)
        assert found[key]["values"] == pytest.approx(entry["values"], rel=0, abs=TOLERANCE * scale + 1e-9), key


@pytest.mark.parametrize("name", RUNS)
def test_a_kept_run_goes_on_and_exports(name: str, tmp_path: Path) -> None:
    run = tmp_path / name
    shutil.copytree(CHECKPOINTS / name, run)
    assert cli.main(["--export", str(run), "--gpu", "cpu", "exporter.check=false"]) == cli.OK
    assert list((run / "export").iterdir())
    before = summary_of(run)
    resume = ["--train", "--resume", str(run), "--gpu", "cpu", "trainer.max_steps=7", "exporter.check=false"]
    assert cli.main(resume) == cli.OK
    state = torch.load(run / "ckpts" / "last.ckpt", map_location="cpu", weights_only=True)
    assert state["global_step"] == 7
    assert summary_of(run) != before


def test_a_kept_pipeline_goes_on_and_exports(tmp_path: Path) -> None:
    root = tmp_path / "pipeline"
    shutil.copytree(CHECKPOINTS / "pipeline", root)
    resume = ["--train", "--resume", str(root), "--gpu", "cpu", "stages.refine.trainer.max_steps=5"]
    assert cli.main(resume) == cli.OK
    assert list((root / "refine" / "export").glob("*.glb"))
    state = torch.load(root / "refine" / "ckpts" / "last.ckpt", map_location="cpu", weights_only=True)
    assert state["global_step"] == 5
    assert cli.main(["--export", str(root / "refine"), "--gpu", "cpu"]) == cli.OK

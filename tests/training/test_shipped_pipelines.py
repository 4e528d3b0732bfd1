"""The shipped pipelines with the embedded prior, shortened: every stage trains, and the last one is exported."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from scoredist3d import cli

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
QUICKSTART = CONFIGS / "quickstart.yaml"
PIPELINES = [QUICKSTART, *sorted((CONFIGS / "pipeline").glob("*.yaml"))]
ON_THE_EMBEDDED_PRIOR = [file for file in PIPELINES if not file.stem.endswith("-sd")]
SHORT = [
    "trainer.max_steps=2",
    "preview.every_n_steps=2",
    "preview.size=16",
    "checkpoint.every_n_steps=0",
    "log.tensorboard=false",
    "test.frames=2",
    "test.height=32",
    "test.width=32",
    "data.batch_size=1",
    "exporter.resolution=24",
    "exporter.texture_size=64",
    "exporter.max_faces=200",
    "exporter.check=false",
    "system.conversion.resolution=24",
]
SMALL = {
    "dmtet": "system.geometry.resolution=16",
    "flexicubes": "system.geometry.resolution=16",
    "gaussians": "system.geometry.num_points=200",
    "textured-mesh": "system.geometry.max_faces=500",
}


def shortened(file: Path) -> list[str]:
    """Small sizes of the stages, by representation."""
    from scoredist3d.config.pipeline import load_pipeline

    stages = load_pipeline([file], ["prompt=x"]).stages
    kinds = {name: config.system.geometry.type for name, config in stages.items()}
    return [f"stages.{name}.{SMALL[kind]}" for name, kind in kinds.items() if kind in SMALL]


def test_the_field_s_recipes_are_there() -> None:
    wanted = {"dreamfusion", "magic3d", "fantasia3d", "prolificdreamer", "textmesh", "latent-nerf", "sketch-shape"}
    assert wanted | {"gaussiandreamer", "sdi", "dsd", "quickstart"} <= {file.stem for file in PIPELINES}


@pytest.mark.parametrize("file", ON_THE_EMBEDDED_PRIOR, ids=lambda file: file.stem)
def test_every_stage_trains(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--config", str(file), "--train", "--gpu", "cpu", "prompt=a red mug", f"output_root={tmp_path}"]
    assert cli.main([*arguments, *SHORT, *shortened(file)]) == cli.OK, capsys.readouterr().err
    (folder,) = (tmp_path / file.stem).iterdir()
    stages = list(yaml.safe_load(file.read_text())["stages"])
    summary = json.loads((folder / "summary.json").read_text())
    assert list(summary["stages"]) == stages
    assert all(stage["step"] == 2 for stage in summary["stages"].values())
    assert [path.parts[-3] for path in folder.glob("*/videos/turntable.mp4")] == stages[-1:]
    assert len(list((folder / stages[-1] / "export").glob("*.glb"))) == 1
    converted = capsys.readouterr().out.count("system.init_from:")
    assert converted >= len(stages) - 1


def test_the_folder_of_the_quickstart_stands_for_its_newest_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = tmp_path / "quickstart"
    arguments = ["--config", str(QUICKSTART), "--train", "--gpu", "cpu", "prompt=a red mug", f"output_root={tmp_path}"]
    assert cli.main([*arguments, *SHORT, *shortened(QUICKSTART)]) == cli.OK, capsys.readouterr().err
    (folder,) = runs.iterdir()
    (glb,) = (folder / "refine" / "export").glob("*.glb")
    glb.unlink()
    assert cli.main(["--export", str(runs), "--gpu", "cpu"]) == cli.OK, capsys.readouterr().err
    assert glb.is_file() and f"using the newest, {folder / 'refine'}" in capsys.readouterr().err
    resumed = ["--train", "--resume", str(runs), "--gpu", "cpu", "stages.refine.trainer.max_steps=3"]
    assert cli.main(resumed) == cli.OK, capsys.readouterr().err
    captured = capsys.readouterr()
    assert captured.err == f"the newest run in {runs} is the pipeline {folder}, which continues\n"
    assert "Stage 1 of 2, coarse: already done" in captured.out
    stages = json.loads((folder / "summary.json").read_text())["stages"]
    assert {name: stage["step"] for name, stage in stages.items()} == {"coarse": 2, "refine": 3}

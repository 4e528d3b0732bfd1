"""GLB files of benchmarks/methods.py: figures of a miniature run, failed exports, and means in the report."""

from __future__ import annotations

import json
import math
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import methods_glb
import methods_means
import methods_references
import methods_report
import methods_runs
import numpy as np
import pytest
import quickstart_truth
import torch
from methods_runs import Job, Task
from PIL import Image
from shared.embedded import IMAGE_SIZE
from shared.exports import break_format

from scoredist3d.evaluation.nearest_object import Effort

PROMPT = "a red mug"
SMALL = [
    *("data.height=16", "data.width=16", "data.resolution_milestones=[]", "data.batch_size=1"),
    *("system.renderer.num_samples=8", "trainer.max_steps=1"),
    *("exporter.resolution=32", "exporter.max_faces=300", "exporter.texture_size=64", "exporter.check=false"),
]


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """A short search for the true object, and small views."""
    effort = Effort(candidates=32, rounds=2, children=8, parents=4, rays=128)
    monkeypatch.setattr(quickstart_truth, "true_object", partial(quickstart_truth.true_object, effort=effort))
    monkeypatch.setattr(methods_glb, "TRUTH_SIZE", 32)


def results(out: Path) -> tuple[dict[str, Any], Path]:
    path = methods_runs.folder_of(out, "3d", "sds") / f"{Task(PROMPT, 0).name}.json"
    return json.loads(path.read_text()), path


def test_a_3d_run_is_measured_as_it_is_delivered(tmp_path: Path) -> None:
    assert methods_runs.work(Job("3d", "sds", (Task(PROMPT, 0),)), tmp_path, "cpu", SMALL) == 0
    found, path = results(tmp_path)
    glb = found["glb"]
    assert glb["error"] is None and glb["seconds"].keys() == {"export", "comparison"}
    numbers = [glb[name] for name in methods_glb.DIFFERENCES]
    numbers += [glb[side][name] for side in ("ours", "true") for name in methods_glb.PROPERTIES]
    assert all(math.isfinite(number) for number in numbers) and 0 < glb["faces"] <= 300
    strip = methods_glb.read_strip(path)
    assert strip is not None and strip.shape == (4, IMAGE_SIZE, IMAGE_SIZE, 3)
    assert all(0.0 < float((view < 0.99).any(-1).float().mean()) < 0.9 for view in strip)
    names = {file.name for file in (path.parent / "runs" / path.stem / "export").iterdir()}
    assert names == {"a-red-mug.glb", "report.json"}
    done = partial(methods_runs.is_done, tmp_path, "3d", "sds", Task(PROMPT, 0), found["recipe"])
    assert done()
    path.write_text(json.dumps({name: value for name, value in found.items() if name != "glb"}))
    assert not done()


def test_a_failed_export_keeps_the_other_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    break_format(monkeypatch, "glb")
    assert methods_runs.work(Job("3d", "sds", (Task(PROMPT, 0),)), tmp_path, "cpu", SMALL) == 0
    found, path = results(tmp_path)
    assert "OSError: disk full" in capsys.readouterr().err
    assert found["glb"]["error"] == "OSError: disk full" and found["glb"]["psnr"] is found["glb"]["ours"] is None
    assert found["steps"] == 1 and found["seconds"] > 0 and methods_glb.read_strip(path) is None
    assert methods_report.parts_of(path.parent)[PROMPT][0].shape == (1, 8, IMAGE_SIZE, IMAGE_SIZE, 3)
    row = methods_glb.summary(path.parent)
    assert row == {"glb": {"runs": 1, "errors": ["'a red mug', seed 0: OSError: disk full"]}}
    assert methods_glb.cells(row) == ["-"] * len(methods_glb.COLUMNS)


def test_a_prompt_without_a_color_has_views_but_no_truth(tmp_path: Path) -> None:
    config = methods_runs.configured("3d", "sds", "a mug", SMALL)
    system, _ = methods_runs.train(config, tmp_path, "cpu")
    glb = methods_glb.deliver(system, config, tmp_path, torch.device("cpu"))
    assert glb.figures["error"] is None and glb.strip is not None and glb.figures["faces"] > 0
    assert all(glb.figures[name] is None for name in (*methods_glb.DIFFERENCES, "ours", "true"))


def figures_of(psnr: float, genus: int, clipped: float | None) -> dict[str, Any]:
    ours = {"mean_dihedral_deg": psnr / 2, "sharp_edges": 0.125, "genus": genus, "saturation": 0.5}
    differences = dict.fromkeys(methods_glb.DIFFERENCES, 0.25) | {"psnr": psnr, "clipped_texels": clipped}
    return {"error": None, **differences, "ours": ours, "true": {**ours, "genus": 1}}


def test_the_report_shows_means_and_standard_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods_references, "REAL_3D", 2)
    monkeypatch.setitem(methods_report.NUM_REAL, "3d", 2)
    references = tuple(Task(PROMPT, seed) for seed in range(2))
    assert methods_runs.work(Job("3d", "real renders", references), tmp_path, "cpu", []) == 0
    glbs = [figures_of(10.0, 0, 0.0), figures_of(12.0, 1, 0.02), figures_of(14.0, 5, None)]
    failed = {"error": "ValueError: no mesh", **dict.fromkeys((*methods_glb.DIFFERENCES, "ours", "true"))}
    folder = methods_runs.folder_of(tmp_path, "3d", "sds")
    images = methods_references.real("3d", PROMPT, 0)[2:]
    strip = torch.full((4, IMAGE_SIZE, IMAGE_SIZE, 3), 0.25)
    for seed, glb in enumerate([*glbs, failed]):
        figures = {"recipe": "x", "device": "d", "steps": 3, "seconds": 1.0 + seed, "memory_mib": 8.0, "glb": glb}
        methods_runs.save(folder, Task(PROMPT, seed), images * (1 - 0.2 * seed), figures, strip if seed == 0 else None)
    assert methods_report.write(tmp_path, "command", ("3d",), None)
    row = json.loads((tmp_path / "methods.json").read_text())["3d"]["sds"]
    assert row["glb"]["runs"] == 4 and row["glb"]["psnr"] == pytest.approx(12.0)
    assert row["glb"]["psnr_error"] == pytest.approx(2.0 / math.sqrt(3))
    assert row["seconds_error"] == pytest.approx(statistics.stdev([1, 2, 3, 4]) / 2)
    text = (tmp_path / "methods.md").read_text()
    head, reference, line = (
        next(x for x in text.splitlines() if x.startswith(start)) for start in ("|  |", "| real", "| sds")
    )
    by_column = dict(zip(head.split(" | "), line.split(" | "), strict=True))
    assert by_column["PSNR"] == "12.0 ± 1.2" and by_column["depth off (%)"] == "25.0 ± 0.0"
    assert by_column["genus"] == "2.0 ± 1.5 / 1.0 ± 0.0" and by_column["dihedral (deg)"] == "6.0 ± 0.6 / 6.0 ± 0.6"
    assert by_column["edges over 45 deg (%)"] == "12.5 ± 0.0 / 12.5 ± 0.0"
    assert by_column["clipped texels (%)"] == "1.0 ± 1.0" and by_column["s per run"] == "2.5 ± 0.6"
    assert dict(zip(head.split(" | "), reference.split(" | "), strict=True))["PSNR"] == "-"
    assert "- sds, 'a red mug', seed 3: ValueError: no mesh" in text
    sheet = np.asarray(Image.open(tmp_path / "sheet-3d.png"))
    assert sheet.shape == (3 * (IMAGE_SIZE + 14), 4 * IMAGE_SIZE + 6, 3) and (sheet[-1, 0] == 64).all()


def test_the_standard_error_of_a_ratio_follows_both_means() -> None:
    values, references = [1.0, 2.0, 6.0], [2.0, 4.0, 12.0]
    exact = methods_means.with_errors({"ratio": methods_means.ratio_terms(values, references)})
    assert exact == {"ratio": pytest.approx(0.5), "ratio_error": pytest.approx(0.0, abs=1e-12)}
    fixed = methods_means.with_errors({"ratio": methods_means.ratio_terms(values, [4.0] * 3)})
    assert fixed["ratio"] == pytest.approx(0.75)
    assert fixed["ratio_error"] == pytest.approx(statistics.stdev(values) / 4.0 / math.sqrt(3))
    assert methods_means.with_errors({"one": [2.0], "none": []}) == {"one": 2.0}
    row = {"share": 0.968, "share_error": 0.0123, "one": 2.0}
    assert methods_means.cell(row, "share") == "0.97 ± 0.01" and methods_means.cell(row, "absent") == ""
    assert methods_means.cell(row, "share", 1, scale=100.0) == "96.8 ± 1.2" and methods_means.cell(row, "one", 0) == "2"

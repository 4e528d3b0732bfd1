"""Parts of benchmarks/methods.py whose errors would go unnoticed."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean
from typing import Any
from xml.etree import ElementTree

import methods
import methods_plots
import methods_references
import methods_report
import methods_runs
import pytest
import torch
from shared.embedded import IMAGE_SIZE

from scoredist3d import registry
from scoredist3d.config.validation import parse_component
from scoredist3d.evaluation.measures import saturation
from scoredist3d.seeding import Rng


def test_prompts_are_read_as_captions() -> None:
    assert methods_references.caption_of("a green pine tree") == ("pine tree", "green")
    assert methods_references.caption_of("an ice cream cone") == ("ice cream cone", None)
    with pytest.raises(ValueError, match="'a red sofa' must be"):
        methods_references.caption_of("a red sofa")


@pytest.mark.parametrize("prompt", [*methods.PROMPTS_2D, *methods.PROMPTS_3D])
def test_an_edit_changes_the_colour_or_else_the_category(prompt: str) -> None:
    category, color = methods_references.caption_of(prompt)
    from_category, from_color = methods_references.caption_of(methods_references.source_prompt(prompt))
    assert (from_category == category) == (color is not None)
    assert (from_color is None) == (color is None) and (color is None or from_color != color)


def test_every_recipe_is_measured_and_a_wrong_name_is_told() -> None:
    assert "compare" not in methods_runs.recipes("2d", [])
    assert {"sds", "vsd"} <= set(methods_runs.recipes("2d", [])) and methods_runs.recipes("3d", ["sds"]) == ["sds"]
    with pytest.raises(ValueError, match="no recipe is called 'sdz'"):
        methods_runs.recipes("2d", ["sdz"])


def test_a_run_is_made_again_only_if_its_recipe_has_changed(tmp_path: Path) -> None:
    task = methods_runs.Task("a red mug", 2)
    job = methods_runs.Job("2d", "sds", (task,))
    assert methods_runs.Job.from_text(job.to_text()) == job
    recipe = methods_runs.fingerprint("2d", "sds", [])
    assert recipe == methods_runs.fingerprint("2d", "sds", [])
    folder = methods_runs.folder_of(tmp_path, "2d", "sds")
    images = torch.rand(2, 1, 4, 4, 3, generator=torch.Generator().manual_seed(0))
    methods_runs.save(folder, task, images, {"recipe": recipe})
    assert methods_runs.is_done(tmp_path, "2d", "sds", task, recipe)
    changed = methods_runs.fingerprint("2d", "sds", ["system.guidance.guidance_scale=4"])
    assert not methods_runs.is_done(tmp_path, "2d", "sds", task, changed)
    assert not methods_runs.is_done(tmp_path, "2d", "sds", methods_runs.Task("a red mug", 3), recipe)


def test_counted_evaluations_are_those_of_the_method_alone() -> None:
    canvas = {"type": "image-canvas", "particles": 3, "init_prompt": "red left blob", "init_steps": 4}
    block = {"type": "text-to-2d", "geometry": canvas, "guidance": {"type": "sds", "guidance_scale": 5}}
    prior = registry.build(parse_component("prior", {"type": "gaussian-mixture", "image_size": 8}))
    system: Any = registry.build(parse_component("system", block), prior=prior, prompt="blue blob", rng=Rng())
    with methods_runs.Counter(system).counting() as counter:
        for step in range(2):
            system.training_step(step, Rng())
    assert counter.per_image() == {"prior_nfe": 2.0, "declared_nfe": 2.0, "own_nfe": 0.0}
    assert "predict" not in vars(prior) and "forward" not in vars(system.guidance)


def test_real_renders_measure_as_real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods_references, "REAL_2D", 32)
    task, prompt = methods_runs.Task("a red mug", 6), "a red mug"
    images = methods_references.real("2d", prompt, 2)
    assert images.shape == (34, 1, IMAGE_SIZE, IMAGE_SIZE, 3)
    folder = methods_runs.folder_of(tmp_path, "2d", "something")
    methods_runs.save(folder, task, images[:6], {"recipe": "x", "seconds": 1.0, "steps": 3})
    (made,) = methods_report.parts_of(folder)[prompt]
    torch.testing.assert_close(made, images[:6], rtol=0, atol=0.5 / 255 + 1e-6)
    probe = methods_report.Probe.load()
    real = methods_report.read(probe, images)
    row = methods_report.measure(prompt, methods_report.read(probe, made), real, float(real.features.std()))
    assert fmean(row["category"]) >= 4 / 6 and fmean(row["color"]) >= 4 / 6
    assert row["saturation"] == pytest.approx(saturation(made[:, 0]).tolist())
    table = methods_report.means([row, {**row, "saturation": [3 * value for value in row["saturation"]]}])
    assert table["saturation_ratio"] == pytest.approx(2 * fmean(row["saturation"]) / fmean(row["real_saturation"]))
    assert methods_report.costs(folder) == {"seconds": 1.0, "steps": 3.0}
    text = "\n".join(methods_report.markdown("2d", {"something": table}))
    assert "| something | " in text and text.count("\n| ---") == 1


def test_plots_are_whole_and_hold_every_name() -> None:
    points = [("a & b", 0.1, 2.0), ("c", 1.2, -0.1), ("d", 0.11, 2.0)]
    for text in (methods_plots.scatter(points, "x", "y"), methods_plots.bars(points, "cost")):
        names = {node.text for node in ElementTree.fromstring(text).iter() if node.tag.endswith("text")}
        assert {"a & b", "c", "d"} <= names


def test_a_failure_is_told_and_the_rest_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(methods_references, "REAL_2D", 4)
    tasks = (methods_runs.Task("a red sofa", 2), methods_runs.Task("a red mug", 2))
    assert methods_runs.work(methods_runs.Job("2d", "real renders", tasks), tmp_path, "cpu", []) == 1
    assert "FAILED: 2d real renders 'a red sofa'" in capsys.readouterr().out
    (path,) = (tmp_path / "2d" / "real-renders").glob("*.json")
    assert json.loads(path.read_text())["prompt"] == "a red mug"


def test_an_edit_in_3d_starts_from_its_source(tmp_path: Path) -> None:
    small = ["data.height=16", "data.width=16", "data.resolution_milestones=[]", "data.batch_size=1"]
    small += ["system.renderer.num_samples=8", "trainer.max_steps=1"]
    source = methods_runs.configured("3d", "sds", "a blue mug", small)
    made, _ = methods_runs.train(source, tmp_path / "source", "cpu")
    start = [f"system.init_from={tmp_path / 'source'}", "system.guidance.source_prompt=a blue mug"]
    edit = methods_runs.configured("3d", "dds", "a red mug", [*small, *start, "system.optimizer.lr=0"])
    edited, _ = methods_runs.train(edit, tmp_path / "edit", "cpu")
    pairs = zip(made.scenes[0].geometry.parameters(), edited.scenes[0].geometry.parameters(), strict=True)
    assert all(torch.equal(before, after) for before, after in pairs)

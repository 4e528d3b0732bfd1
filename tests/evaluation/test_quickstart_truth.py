"""A delivered mesh beside the true object: an object that is exported and compared with itself, and known spheres."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import glb_quality
import numpy as np
import pytest
import quickstart_quality
import quickstart_truth
import torch
import trimesh
from quickstart_truth import compare
from shared.exports import make_exporter
from torch import Tensor

from scoredist3d.cameras import Cameras
from scoredist3d.config.experiment import ExperimentConfig
from scoredist3d.config.validation import validate
from scoredist3d.evaluation.fidelity import coverage
from scoredist3d.evaluation.nearest_object import Effort
from scoredist3d.evaluation.true_objects import Stated, object_mesh, object_views
from scoredist3d.export.delivered import Delivered, read_delivered
from scoredist3d.meshes.exportable import SurfaceChannels
from scoredist3d.meshes.mesh import Mesh, topology
from scoredist3d.meshes.quality import genus
from scoredist3d.ops.shading.directional import directional_lighting
from scoredist3d.procedural import CATEGORIES, COLORS, DEFAULT_LIGHT, PATTERNS, Objects, sample_objects, shape_match
from scoredist3d.procedural.probe import Probe

COLOR = (0.8, 0.3, 0.1)
PROMPT = "a red mug"
RESOLUTION, MAX_FACES = 64, 3000
SHORT = Effort(candidates=64, rounds=4, children=12, parents=4, rays=512)


def members() -> Objects:
    """Four mugs whose parts all have the same color."""
    mug = CATEGORIES.index("mug")
    mugs = sample_objects(4, torch.Generator().manual_seed(0), category=mug, **Stated.of(PROMPT).look)
    surface = mugs.surface.clone()
    surface[..., :6] = torch.tensor(COLOR * 2)
    return replace(mugs, surface=surface)


@dataclass
class Exported:
    """A procedural object of one color as exporters see it, with or without the light of its renders."""

    member: Objects
    baked_lighting: bool
    radius: float = 1.0
    iso_level: float = 1.0

    @property
    def device(self) -> torch.device:
        return self.member.device

    def density(self, points: Tensor) -> Tensor:
        return 1e6 * self.member.occupancy(points[None])[0]

    def channels(self, points: Tensor, normals: Tensor | None = None) -> SurfaceChannels:
        color = torch.tensor(COLOR).expand(len(points), 3)
        if not self.baked_lighting:
            return SurfaceChannels(color)
        assert normals is not None
        light = torch.nn.functional.normalize(torch.tensor(DEFAULT_LIGHT), dim=0)
        return SurfaceChannels((color * directional_lighting(normals, light)[:, None]).clamp(0.0, 1.0))

    def surface(self) -> None:
        return None

    def splats(self) -> None:
        return None


def export(shape: Exported, folder: Path, **options: object) -> dict[str, object]:
    """Export to ``folder/asset.glb``; returns the report."""
    exporter = make_exporter(resolution=RESOLUTION, max_faces=MAX_FACES, refine_steps=10, **options)
    report: dict[str, object] = exporter.export(shape, folder, "asset").report.to_dict()
    (folder / "report.json").write_text(json.dumps(report))
    return report


@pytest.mark.parametrize("light", [False, True])
def test_an_object_that_was_exported_is_found_to_be_itself(tmp_path: Path, light: bool) -> None:
    member = members()[1]
    report = export(Exported(member, light), tmp_path, height=2.5)
    assert report["scale"] != pytest.approx(1.0, abs=0.1)
    delivered = read_delivered(tmp_path / "asset.glb", scale=float(str(report["scale"])))
    assert delivered.unlit == light
    cameras = quickstart_quality.held_out(128, torch.device("cpu"))
    found = compare(delivered, member, cameras, Probe.load(), resolution=RESOLUTION, max_faces=MAX_FACES)
    figures, ours, true = found.figures, found.figures["ours"], found.figures["true"]
    # A cell of the grid has 1.7 pixels, and marching cubes cuts off the edges within a cell: outlines differ.
    assert figures["psnr"] > 28.0 and figures["ssim"] > (0.9 if light else 0.97)
    assert figures["off_depth"] < 0.01 and figures["see_through"] < 0.02
    assert figures["normal_angle_deg"] < 2.0 and figures["clipped_texels"] == 0.0
    assert ours["genus"] == true["genus"] == 1
    for name, allowed in (("mean_dihedral_deg", 0.5), ("sharp_edges", 0.01), ("saturation", 0.02)):
        assert ours[name] == pytest.approx(true[name], abs=allowed)
    other = compare(delivered, members()[0], cameras, Probe.load(), resolution=RESOLUTION, max_faces=MAX_FACES)
    assert other.figures["psnr"] < figures["psnr"] - 5 and other.figures["ssim"] < figures["ssim"]
    assert other.figures["feature_distance"] > figures["feature_distance"]
    assert found.ours.shape == found.truth.shape == (8, 128, 128, 3)


def ball(radius: float) -> Delivered:
    found = trimesh.creation.icosphere(subdivisions=4, radius=radius)
    vertices = np.asarray(found.vertices, np.float32)
    colors = np.full((len(vertices), 3), 128, np.uint8)
    return Delivered(Mesh(vertices, np.asarray(found.faces, np.int64), vertex_colors=colors), None, unlit=True)


def depth_of_ball(radius: float, cameras: Cameras) -> Tensor:
    """Distance (V, H, W) along the rays to a ball at the origin; NaN beside it."""
    rays = cameras.rays()
    along = -(rays.origins * rays.directions).sum(-1)
    return along - (along.square() - rays.origins.square().sum(-1) + radius**2).sqrt()


def test_a_scaled_ball_is_off_where_the_rays_say_so() -> None:
    cameras = quickstart_quality.held_out(128, torch.device("cpu"))[torch.tensor([0, 1])]
    small, large = (ball(radius).views(cameras) for radius in (0.5, 0.55))
    found = coverage(small.opacity, small.depth, large.opacity, large.depth, tolerance=0.08)
    apart = depth_of_ball(0.5, cameras) - depth_of_ball(0.55, cameras)
    expected = float((apart[~apart.isnan()] > 0.08).double().mean())
    assert 0.2 < expected < 0.8
    assert found.off_depth == found.behind == pytest.approx(expected, abs=0.02)
    same = coverage(small.opacity, small.depth, small.opacity, small.depth, tolerance=0.08)
    assert same.off_depth == same.see_through == 0.0


def test_the_mesh_of_a_true_object_is_closed_and_has_its_handles() -> None:
    member = members()[2]
    mesh = object_mesh(member, resolution=RESOLUTION, max_faces=MAX_FACES, least_volume=0.02)
    assert len(mesh.faces) <= MAX_FACES and genus(mesh) == 1
    assert topology(mesh).watertight and mesh.volume > 0
    outward = 0.03 * torch.from_numpy(mesh.vertex_normals())
    vertices = torch.from_numpy(mesh.vertices)
    sides = member.occupancy(torch.stack([vertices - outward, vertices + outward]).flatten(0, 1)[None])[0]
    inside, outside = sides.chunk(2)
    assert inside.float().mean() > 0.95 and outside.float().mean() < 0.05


def test_prompts_state_a_look() -> None:
    assert Stated.of(PROMPT) == Stated("mug", "red")
    assert Stated.of("a wooden chair") == Stated("chair", "brown", pattern="wooden")
    assert Stated.of("a metal robot") == Stated("robot", "gray", finish="metal")
    assert Stated.of("a shiny blue teddy bear") == Stated("teddy bear", "blue", finish="shiny")
    look = Stated.of("a striped pink mug").look
    assert (COLORS[look["second_color"]], PATTERNS[look["pattern"]]) == ("white", "striped")
    red = COLORS.index("red")
    assert Stated.of(PROMPT).look == {"color": red, "second_color": red, "pattern": 0, "finish": 0}
    for prompt in ("a red sofa", "a red blue mug", "a mug with stripes", "mug"):
        with pytest.raises(ValueError, match=f"prompt '{prompt}' must be"):
            Stated.of(prompt)
    with pytest.raises(ValueError, match="the color of the mug is not stated"):
        _ = Stated.of("a mug").look


class Scene:
    """A finished scene that shows a procedural object."""

    step = 3

    def __init__(self, member: Objects) -> None:
        self.member = member

    def __call__(self, cameras: Cameras, *, step: int, rng: None) -> SimpleNamespace:
        render = object_views(self.member, cameras)
        return SimpleNamespace(rgb=render.over(torch.ones(3)), opacity=render.rgba[..., 3:])


def config() -> ExperimentConfig:
    exporter = {"type": "textured-mesh", "resolution": RESOLUTION, "max_faces": MAX_FACES}
    prior = {"type": "gaussian-mixture", "image_size": 8}
    data = {"type": "random-camera", "batch_size": 2, "height": 8, "width": 8}
    system = {"type": "text-to-3d", "guidance": {"guidance_scale": 7.5}}
    return validate({"prompt": PROMPT, "seed": 5, "prior": prior, "data": data, "system": system, "exporter": exporter})


ONE_STAGE = {"seconds": {"training": 2.0, "export": 1.0}}
TWO_STAGES = {
    "seconds": 3.0,
    "stages": {
        "coarse": {"path": "coarse", "seconds": {"training": 1.5}},
        "refine": {"path": "refine", "seconds": {"training": 0.5, "export": 1.0}},
    },
}


@pytest.mark.parametrize(("summary", "last"), [(ONE_STAGE, "."), (TWO_STAGES, "refine")], ids=["run", "pipeline"])
def test_a_run_becomes_a_row_of_the_table_and_two_rows_of_the_sheet(
    summary: dict[str, Any],
    last: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    few = partial(shape_match.best_family_match, members=4)
    monkeypatch.setattr(shape_match, "best_family_match", few)
    monkeypatch.setattr(quickstart_truth, "true_object", partial(quickstart_truth.true_object, effort=SHORT))
    monkeypatch.setattr(quickstart_quality, "TRUTH_SIZE", 64)
    member, run, out = members()[1], tmp_path / "run", tmp_path / "out"
    (run / last / "export").mkdir(parents=True)
    export(Exported(member, True), run / last / "export")
    (run / "summary.json").write_text(json.dumps(summary))
    system = SimpleNamespace(scenes=[Scene(member)])
    quickstart_quality.record(system, config(), run, out / "asset", torch.device("cpu"), rivals=False)
    row = json.loads((out / "asset" / "asset.json").read_text())
    assert (row["prompt"], row["seed"], row["seconds"], row["category"]) == (PROMPT, 5, 3.0, 1.0)
    assert row["pattern"] is None and row["glb"]["pattern"] is None and row["glb"]["category"] == 1.0
    assert row["off_depth"] < 0.1 and row["see_through"] < 0.1
    assert row["iou"] > 0.95  # the scene is smoothed with 4 rays per pixel, the family has one
    assert row["ours"]["genus"] == row["true"]["genus"] == 1
    assert quickstart_quality.summarise(out, 1) == 0
    header, _, line, *_ = (out / "quality.md").read_text().splitlines()
    assert header.count("|") == line.count("|") and "| 1 / 1 |" in line and "SSIM" in header
    assert line in capsys.readouterr().out
    assert quickstart_quality.sheet([out / "asset" / "asset.json"]).shape[1] == 8 * 64 + 7 * 2
    assert quickstart_quality.summarise(out, 2) == 1


def test_means_of_patterns_are_those_of_the_prompts_with_patterns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(quickstart_quality, "sheet", lambda assets: np.zeros((2, 2, 3), np.uint8))
    surface = {"mean_dihedral_deg": 5.0, "sharp_edges": 0.0, "genus": 0, "saturation": 0.5}
    figures = ("psnr", "ssim", "feature_distance", "normal_angle_deg", "off_depth", "see_through", "iou", "seconds")
    row: dict[str, Any] = dict.fromkeys(figures, 1.0) | {"ours": surface, "true": surface, "clipped_texels": 0.0}
    row |= {"seed": 0, "mesh": {"watertight": True, "holes": 0, "faces": 4, "components": 1, "bytes": 1}}
    read = {"category": 1.0, "color": 0.5}
    for name, pattern, in_glb in (("plain", None, None), ("striped", 0.75, 0.25)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "views.png").touch()
        asset = row | read | {"prompt": name, "name": name, "pattern": pattern, "glb": read | {"pattern": in_glb}}
        (tmp_path / name / "asset.json").write_text(json.dumps(asset))
    assert quickstart_quality.summarise(tmp_path, 2) == 0
    shown = capsys.readouterr().out
    assert "pattern 0.75 (GLB 0.25)" in shown and "| 0.75 / 0.25 |" in shown and "| - |" in shown
    (tmp_path / "plain" / "asset.json").write_text(json.dumps(row | read | {"prompt": "plain", "pattern": None}))
    assert quickstart_quality.summarise(tmp_path, 2) == 1
    assert "earlier version" in capsys.readouterr().err


def test_the_pattern_is_read_if_the_prompt_names_one() -> None:
    views = quickstart_quality.held_out(128, torch.device("cpu"))[torch.arange(4)]
    for prompt, pattern in (("a red striped barrel", 1.0), ("a red dotted barrel", 0.0), ("a red barrel", None)):
        stated = Stated.of(prompt)
        look = Stated.of("a red striped barrel").look
        barrel = sample_objects(1, torch.Generator().manual_seed(2), category=CATEGORIES.index(stated.category), **look)
        images = object_views(barrel, views).over(torch.ones(3)).clamp(0, 1)
        found = quickstart_truth.shares(Probe.load()(images), stated)
        assert found == {"category": 1.0, "color": 1.0, "pattern": pattern}


def test_a_file_alone_is_measured_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(glb_quality, "true_object", partial(quickstart_truth.true_object, effort=SHORT))
    monkeypatch.setattr(glb_quality, "TRUTH_SIZE", 128)
    export(Exported(members()[1], True), tmp_path)
    file = (tmp_path / "asset.glb").rename(tmp_path / "a-red-mug.glb")
    assert glb_quality.main([str(file), "--out", str(tmp_path / "out")]) == 0
    (row,) = json.loads((tmp_path / "out" / "glb.json").read_text())
    assert (row["prompt"], row["category"]) == (PROMPT, 1.0) and row["off_depth"] < 0.1
    text = (tmp_path / "out" / "glb.md").read_text()
    assert text in capsys.readouterr().out and "1 files: category 1.000" in text
    assert (tmp_path / "out" / "sheet.png").is_file()
    with pytest.raises(ValueError, match="prompt 'asset' must be"):
        glb_quality.measured(file.rename(tmp_path / "asset.glb"), Probe.load(), torch.device("cpu"))

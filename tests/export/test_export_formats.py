"""STL, USDZ and splats read back; axes and units in every format; formats that are unavailable or fail."""

import json

import numpy as np
import pytest
import torch
import trimesh
from shared.export_fields import (
    AnalyticField,
    box,
    sphere,
)
from shared.exports import break_format, make_exporter
from shared.pbr_shapes import MeshShape, PbrBall, uv_sphere

from scoredist3d.export.delivered import read_delivered
from scoredist3d.meshes.loading import load_mesh
from scoredist3d.meshes.splats import Splats, read_splats


@pytest.mark.parametrize("up", ["y", "z"])
def test_scale_height_and_axis_in_every_format(tmp_path, up):
    field = AnalyticField(box((0.4, 0.2, 0.1)))
    result = make_exporter(formats=["glb", "obj", "ply", "stl"], height=0.5, up_axis=up).export(field, tmp_path, "box")
    assert result.report.mesh.scale == pytest.approx(2.5, rel=0.05)
    extent = {"y": (1.0, 0.5, 2.0), "z": (2.0, 1.0, 0.5)}
    for suffix in ("glb", "obj", "ply", "stl"):
        size = np.ptp(trimesh.load(tmp_path / f"box.{suffix}", force="mesh").bounds, axis=0)
        np.testing.assert_allclose(size, extent["y" if suffix == "glb" else up], rtol=0.06)
        # The loader finds the up axis in the header.
        low, high = load_mesh(tmp_path / f"box.{suffix}").mesh.bounds
        np.testing.assert_allclose(high - low, extent["z"], rtol=0.06)


@pytest.mark.parametrize(("pivot", "lowest"), [("scene", -0.1), ("center", -0.25), ("base", 0.0)])
def test_pivot_in_every_format(tmp_path, pivot, lowest):
    """A box of height 0.5 whose center is 0.15 above and 0.1 in front of that of the scene, at two meters per unit."""
    shift = torch.tensor([0.1, 0.0, 0.15])
    field = AnalyticField(lambda x: box((0.3, 0.3, 0.25))(x - shift))
    formats = ["glb", "obj", "ply", "stl"]
    report = make_exporter(formats=formats, scale=2.0, pivot=pivot).export(field, tmp_path, "box").report.mesh
    front = 0.1 if pivot == "scene" else 0.0
    for suffix in formats:
        low, high = load_mesh(tmp_path / f"box.{suffix}").mesh.bounds
        np.testing.assert_allclose((low + high)[:2] / 2, [2 * front, 0.0], atol=0.02)
        assert low[2] == pytest.approx(2 * lowest, abs=0.03)
    world = read_delivered(tmp_path / "box.glb", scale=report.scale, origin=report.origin).mesh.bounds
    np.testing.assert_allclose(world, report.bounds, atol=1e-5)


def test_stl_is_the_whole_surface(tmp_path):
    result = make_exporter(formats=["stl"], max_faces=200).export(AnalyticField(sphere(0.5)), tmp_path, "ball")
    solid = trimesh.load(tmp_path / "ball.stl")
    assert solid.is_watertight and len(solid.faces) > result.report.mesh.faces and solid.volume > 0.5
    assert result.report.mesh.channels == () and list(result.report.seconds) == ["surface", "simplify", "write"]


class Cloud(MeshShape):
    def splats(self):
        count = 5
        return Splats(
            means=torch.rand(count, 3, generator=torch.Generator().manual_seed(0)),
            scales=torch.full((count, 3), 0.1),
            quaternions=torch.eye(4)[:1].expand(count, 4),
            opacities=torch.full((count,), 0.5),
            colors=torch.full((count, 3), 0.5),
        )


def test_splats_alone_need_no_surface(tmp_path):
    cloud = Cloud(None)
    result = make_exporter(formats=["splats"]).export(cloud, tmp_path, "cloud")
    assert [path.name for path in result.paths] == ["cloud-splats.ply"]
    assert result.report.splats.gaussians == 5 and result.report.mesh is None
    assert result.report.describe().startswith("splats: 5 Gaussians")
    told = json.loads(json.dumps(result.report.to_dict()))
    assert set(told) == {"gaussians", "bounds", "scale", "origin", "bytes", "seconds", "notes"}
    assert len(trimesh.load(result.paths[0]).vertices) == 5


def test_real_world_height_and_pivot_in_every_format(tmp_path):
    shape = Cloud(uv_sphere())
    formats = ["glb", "obj", "ply", "stl", "splats"]
    exporter = make_exporter(formats=formats, height="real-world", pivot="base").for_prompt("a yellow duck")
    report = exporter.export(shape, tmp_path, "ball").report
    assert ", 0.35 m high, " in report.describe()
    for suffix in formats[:-1]:
        low, high = load_mesh(tmp_path / f"ball.{suffix}").mesh.bounds
        np.testing.assert_allclose([low[2], high[2], low[0] + high[0]], [0.0, 0.35, 0.0], atol=1e-6)
    # The Gaussians keep their place beside the mesh.
    scale, origin = report.mesh.scale, torch.tensor(report.mesh.origin)
    assert (report.splats.scale, report.splats.origin) == (scale, report.mesh.origin)
    read, made = read_splats(tmp_path / "ball-splats.ply"), shape.splats()
    torch.testing.assert_close(read.means, (made.means - origin) * scale)
    torch.testing.assert_close(read.scales, made.scales * scale)


def test_height_of_splats_alone(tmp_path):
    exporter = make_exporter(formats=["splats"], height="real-world", pivot="base")
    exporter.export(Cloud(None), tmp_path, "a-red-car")  # without for_prompt, the name has to contain the noun
    low, high = read_splats(tmp_path / "a-red-car-splats.ply").extent
    np.testing.assert_allclose([low[2], high[2], *(low + high)[:2]], [0.0, 1.5, 0.0, 0.0], atol=1e-6)


def test_splats_of_an_object_without_gaussians(tmp_path):
    with pytest.raises(ValueError, match=r"exporter\.formats: the object is not made of Gaussians"):
        make_exporter(formats=["splats"]).export(MeshShape(uv_sphere()), tmp_path / "out", "ball")
    assert not (tmp_path / "out").exists()
    result = make_exporter(formats=["splats", "stl"]).export(MeshShape(uv_sphere()), tmp_path, "ball")
    assert [path.name for path in result.paths] == ["ball.stl"] and "no splats were written" in result.report.notes[0]


def test_usdz_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"usdz needs the package usd-core.*pip install usd-core"):
        make_exporter(formats=["glb", "usdz"]).export(AnalyticField(sphere(0.5)), tmp_path / "out", "ball")
    assert not (tmp_path / "out").exists()


def test_usdz_round_trip(tmp_path):
    usd = pytest.importorskip("pxr.Usd", reason="usd-core is not installed")
    from pxr import UsdGeom, UsdShade, UsdUtils, UsdValidation

    shape = PbrBall("roughness", "metallic", "normal")
    result = make_exporter(formats=["usdz"], height=1.2, pivot="base").export(shape, tmp_path, "ball")
    path = str(result.paths[0])
    stage = usd.Stage.Open(path)
    assert UsdGeom.GetStageUpAxis(stage) == "Y" and UsdGeom.GetStageMetersPerUnit(stage) == 1.0
    mesh = UsdGeom.Mesh(stage.GetPrimAtPath("/Asset/Mesh"))
    points = np.array(mesh.GetPointsAttr().Get())
    assert (
        np.ptp(points[:, 1]) == pytest.approx(1.2, rel=1e-5)
        and abs(points[:, 1].min()) < 1e-5
        and len(points) == result.report.mesh.vertices
    )
    st = UsdGeom.PrimvarsAPI(mesh).GetPrimvar("st").ComputeFlattened()
    assert len(st) == 3 * result.report.mesh.faces
    surface = UsdShade.MaterialBindingAPI(mesh).ComputeBoundMaterial()[0].ComputeSurfaceSource()[0]
    assert {i.GetBaseName() for i in surface.GetInputs()} == {"diffuseColor", "roughness", "metallic", "normal"}
    _, assets, missing = UsdUtils.ComputeAllDependencies(path)
    assert missing == [] and len(assets) == 4
    validators = UsdValidation.ValidationRegistry().GetOrLoadAllValidators()
    errors = UsdValidation.ValidationContext(validators).Validate(stage)
    assert len(validators) > 5 and [error.GetMessage() for error in errors] == []


@pytest.mark.parametrize("broken", ["obj", "stl", "splats"])
def test_a_failing_writer_leaves_nothing(tmp_path, monkeypatch, broken):
    break_format(monkeypatch, broken)
    with pytest.raises(OSError, match="disk full"):
        make_exporter(formats=["glb", "obj", "stl", "splats"], max_faces=5000).export(Cloud(uv_sphere()), tmp_path, "x")
    assert list(tmp_path.iterdir()) == []

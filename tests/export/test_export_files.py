"""GLB, OBJ and PLY read back by trimesh; the exporter as a whole."""

import json
import struct

import numpy as np
import pytest
import torch
import trimesh
from shared.export_fields import (
    AnalyticField,
    box,
    position_color,
    random_surface_points,
    sample_texture,
    sphere,
    torus,
    union,
)
from shared.exports import break_format

from scoredist3d import registry
from scoredist3d.export import exporter as exporter_module
from scoredist3d.export.files import safe_name
from scoredist3d.meshes.mesh import Mesh, topology

# An object without symmetry: longest along +x (front), with a small cube on +y, flat in z.
BODY = union(box((0.4, 0.2, 0.1), (0.3, 0.0, 0.0)), box((0.1, 0.1, 0.1), (0.0, 0.3, 0.0)))


def make_exporter(**options):
    entry = registry.lookup("exporter", "textured-mesh")
    defaults = {"resolution": 64, "texture_size": 512, "max_faces": 1500, "formats": ["glb", "obj", "ply"]}
    return entry.cls(entry.config_cls(check=False, **(defaults | options)))


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "made" / "here"
    stages = []
    result = make_exporter().export(
        AnalyticField(BODY), folder, "Ein grüner Würfel/über", lambda stage, fraction: stages.append((stage, fraction))
    )
    return folder, result, stages


def expected_color(points_y_up):
    """The analytic color at points of the file: (x, y, z) of the world = (z, x, y) of the file."""
    return 255 * position_color(torch.from_numpy(np.asarray(points_y_up)[:, [2, 0, 1]])).numpy()


def check_textured(geometry, texture):
    low, high = geometry.bounds
    np.testing.assert_allclose(low, [-0.2, -0.1, -0.1], atol=0.02)  # world axes: y, z, x
    np.testing.assert_allclose(high, [0.4, 0.1, 0.7], atol=0.02)
    assert geometry.volume == pytest.approx(0.8 * 0.4 * 0.2 + 0.2**3, rel=0.03)
    points, face, weights = random_surface_points(geometry.vertices, geometry.faces, 5000, np.random.default_rng(2))
    uv = np.einsum("nk,nkc->nc", weights, geometry.visual.uv[geometry.faces[face]])
    error = np.abs(sample_texture(texture, uv) - expected_color(points))
    assert error.mean() < 1.0


def test_glb_round_trip(exported):
    folder, _, _ = exported
    scene = trimesh.load(folder / "Ein-gruner-Wurfel-uber.glb")
    (geometry,) = scene.geometry.values()
    material = geometry.visual.material
    assert material.metallicFactor == 0.0 and material.roughnessFactor == 1.0
    assert material.baseColorFactor is None or tuple(material.baseColorFactor) == (255, 255, 255, 255)
    check_textured(geometry, np.asarray(material.baseColorTexture.convert("RGB")))
    # The vertex normals in the file agree with the faces, and the front face (+x in the world) faces +z.
    front = geometry.vertices[:, 2] > 0.69
    flat = front & (np.abs(geometry.vertices[:, 0]) < 0.15) & (np.abs(geometry.vertices[:, 1]) < 0.06)
    assert front.any() and geometry.vertex_normals[front][:, 2].mean() > 0.5
    assert (geometry.vertex_normals[flat][:, 2] > 0.99).all()


def test_glb_file_follows_the_format(exported):
    folder, _, _ = exported
    data = (folder / "Ein-gruner-Wurfel-uber.glb").read_bytes()
    magic, version, length = struct.unpack("<4sII", data[:12])
    size, kind = struct.unpack("<I4s", data[12:20])
    assert (magic, version, length, kind) == (b"glTF", 2, len(data), b"JSON")
    document = json.loads(data[20 : 20 + size])
    (primitive,) = document["meshes"][0]["primitives"]
    assert set(primitive["attributes"]) == {"POSITION", "NORMAL", "TEXCOORD_0"}
    assert document["materials"][0]["pbrMetallicRoughness"]["baseColorTexture"]["index"] == 0
    assert document["images"][0]["mimeType"] == "image/png"
    assert not document["materials"][0].get("doubleSided", False)
    assert data.isascii() is False and json.dumps(document).isascii()


@pytest.mark.parametrize("unlit", [False, True])
def test_glb_says_whether_viewers_may_light_it(tmp_path, unlit):
    field = AnalyticField(sphere(0.5))
    result = make_exporter(formats=["glb"], unlit=unlit, resolution=24, max_faces=200).export(field, tmp_path, "ball")
    data = result.paths[0].read_bytes()
    tree = json.loads(data[20 : 20 + struct.unpack("<I", data[12:16])[0]])
    assert tree.get("extensionsUsed", []) == (["KHR_materials_unlit"] if unlit else [])
    assert ("KHR_materials_unlit" in tree["materials"][0].get("extensions", {})) is unlit
    assert "baseColorTexture" in tree["materials"][0]["pbrMetallicRoughness"]


def test_obj_round_trip(exported):
    folder, _, _ = exported
    name = "Ein-gruner-Wurfel-uber"
    assert f"map_Kd {name}.png" in (folder / f"{name}.mtl").read_text()
    text = (folder / f"{name}.obj").read_text()
    assert f"mtllib {name}.mtl" in text and f"usemtl {name}" in text and text.isascii()
    geometry = trimesh.load(folder / f"{name}.obj", process=False)
    check_textured(geometry, np.asarray(geometry.visual.material.image.convert("RGB")))
    # In the file the surface is closed: seams exist only in the texture indices.
    rows = [line.split()[1:] for line in text.splitlines() if line.startswith("f ")]
    faces = np.array([[int(corner.split("/")[0]) - 1 for corner in row] for row in rows])
    vertices = np.zeros((text.count("\nv "), 3), dtype=np.float32)
    assert topology(Mesh(vertices, faces)).watertight


def test_ply_holds_the_full_surface_with_colors(exported):
    folder, result, _ = exported
    geometry = trimesh.load(folder / "Ein-gruner-Wurfel-uber.ply", process=False)
    assert len(geometry.faces) > result.report.mesh.faces and geometry.is_watertight and geometry.volume > 0
    colors = np.asarray(geometry.visual.vertex_colors)[:, :3]
    assert np.abs(colors - expected_color(geometry.vertices)).max() <= 0.51


def test_report_and_progress(exported):
    folder, result, stages = exported
    report = result.report
    assert sorted(path.name for path in result.paths) == sorted(path.name for path in folder.iterdir())
    assert report.bytes == {path.name: path.stat().st_size for path in result.paths}
    assert report.mesh.watertight and report.mesh.components == 1 and report.mesh.holes == 0 and report.notes == ()
    assert 0 < report.mesh.faces <= 1500
    assert report.mesh.density_range == (0.0, 500.0) and 0 < report.mesh.threshold < 500
    assert list(report.seconds) == ["surface", "simplify", "unwrap", "texture", "write"]
    for stage in report.seconds:
        fractions = [fraction for name, fraction in stages if name == stage]
        assert fractions[0] == 0.0 and fractions[-1] == 1.0 and fractions == sorted(fractions)
    told = json.loads(json.dumps(report.to_dict()))
    assert {"faces", "watertight", "components", "bounds", "channels", "bytes", "gaussians"} < set(told)


def test_the_same_field_gives_the_same_bytes(tmp_path):
    field = AnalyticField(torus(0.5, 0.2), softness=0.02)
    results = [make_exporter(resolution=32).export(field, tmp_path / str(k), "ring") for k in range(2)]
    for first, second in zip(results[0].paths, results[1].paths, strict=True):
        assert first.read_bytes() == second.read_bytes()


def test_floaters_and_fallback_are_reported(tmp_path, caplog):
    field = AnalyticField(union(sphere(0.5), sphere(0.06, (0.0, 0.0, 0.7))))
    result = make_exporter(formats=["glb"], unwrap_timeout=0.0, max_faces=400).export(field, tmp_path, "ball")
    assert result.report.mesh.dropped_components == 1 and result.report.mesh.components == 1
    assert len(result.report.notes) == 1 and "xatlas was not used" in result.report.notes[0]
    assert [path.name for path in tmp_path.iterdir()] == ["ball.glb"]


@pytest.mark.parametrize("broken", ["glb", "ply", "bake_textures", "clean_surface", "simplify_surface"])
def test_a_failure_changes_nothing_in_the_folder(tmp_path, monkeypatch, broken):
    (tmp_path / "ball.obj").write_text("the previous export")

    def fail(*args, **kwargs):
        raise OSError("disk full")

    if broken in ("glb", "ply"):
        break_format(monkeypatch, broken)
    else:
        monkeypatch.setattr(exporter_module, broken, fail)
    with pytest.raises(OSError, match="disk full"):
        exporter = make_exporter(resolution=16, unwrap_timeout=0.0, max_faces=300)
        exporter.export(AnalyticField(sphere(0.5)), tmp_path, "ball")
    assert [path.name for path in tmp_path.iterdir()] == ["ball.obj"]
    assert (tmp_path / "ball.obj").read_text() == "the previous export"


def test_an_empty_field_leaves_no_folder(tmp_path):
    field = AnalyticField(lambda p: torch.ones(len(p)))
    with pytest.raises(ValueError, match=r"densities lie in \[0, 0\].*exporter\.threshold"):
        make_exporter(resolution=16).export(field, tmp_path / "out", "nothing")
    with pytest.raises(ValueError, match=r"exporter\.threshold is 5 "):
        make_exporter(resolution=16, threshold=5.0).export(field, tmp_path / "out", "nothing")
    assert not (tmp_path / "out").exists()


def test_names_are_safe_for_files():
    assert safe_name("a DSLR photo of a “mug”, 4k/8k") == "a-DSLR-photo-of-a-mug-4k-8k"
    assert safe_name("../../etc/passwd") == "etc-passwd"
    assert safe_name("杯子") == "asset" and safe_name("") == "asset"
    assert len(safe_name("x" * 500)) == 80


def test_a_config_without_formats_is_refused():
    config_cls = registry.lookup("exporter", "textured-mesh").config_cls
    assert config_cls().validate() == []
    assert config_cls(formats=[]).validate()[0].startswith("formats:")

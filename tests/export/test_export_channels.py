"""Roughness, metal, normal maps, occlusion and own texture coordinates, in every format."""

import json
import re
from dataclasses import replace

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
    union,
)
from shared.gltf_files import GlbFile
from shared.pbr_shapes import MeshShape, PbrBall, bent_normal, metallic_at, roughness_at, uv_sphere

from scoredist3d import registry
from scoredist3d.export import exporter as exporter_module
from scoredist3d.export.exporter import DEFAULT_FACES
from scoredist3d.meshes.exportable import SurfaceChannels
from scoredist3d.meshes.holes import boundary_loops, fill_holes
from scoredist3d.meshes.loading import load_mesh
from scoredist3d.meshes.mesh import Mesh, topology
from scoredist3d.meshes.occlusion import ambient_occlusion
from scoredist3d.meshes.splats import Splats
from scoredist3d.meshes.uv import unusable_uvs


def make_exporter(**options):
    entry = registry.lookup("exporter", "textured-mesh")
    defaults = {"resolution": 48, "texture_size": 256, "max_faces": 1200, "formats": ["glb"]}
    return entry.cls(entry.config_cls(**(defaults | options)))


def to_world(y_up):
    return np.asarray(y_up)[:, [2, 0, 1]]


def surface_samples(file, count=3000):
    """World points on a GLB's faces, their texture coordinates (v upwards), and the interpolated frame there."""
    attributes = file.attributes
    points, face, weights = random_surface_points(attributes["POSITION"], file.faces, count, np.random.default_rng(5))
    corners = {name: values[file.faces[face]] for name, values in attributes.items()}
    mixed = {name: np.einsum("nk,nkc->nc", weights, values) for name, values in corners.items()}
    uv = mixed["TEXCOORD_0"] * [1, -1] + [0, 1]
    return torch.from_numpy(to_world(points)).float(), uv, mixed, corners


@pytest.fixture(scope="module")
def ball(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pbr")
    shape = PbrBall("roughness", "metallic", "normal", "occlusion")
    result = make_exporter(formats=["glb", "obj"]).export(shape, folder, "ball")
    return folder, result, GlbFile(folder / "ball.glb")


def test_channels_are_packed_as_gltf_wants(ball):
    _, result, file = ball
    assert set(result.report.channels) == {"base_color", "roughness", "metallic", "normal", "occlusion"}
    material = file.material
    surface = material["pbrMetallicRoughness"]
    assert surface["metallicFactor"] == surface["roughnessFactor"] == 1.0
    assert material["occlusionTexture"]["index"] == surface["metallicRoughnessTexture"]["index"]
    packed = file.image(surface["metallicRoughnessTexture"])
    points, uv, _, _ = surface_samples(file)
    seen = sample_texture(packed, uv) / 255
    for channel, expected in enumerate((0.5 + 0.5 * points[:, 1], roughness_at(points), metallic_at(points))):
        assert np.abs(seen[:, channel] - expected.numpy()).mean() < 0.01
    color = sample_texture(file.image(surface["baseColorTexture"]), uv) / 255
    assert np.abs(color - position_color(points).numpy()).mean() < 0.01


def unit(vectors):
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def degrees_between(one, other):
    return np.degrees(np.arccos((np.asarray(one) * np.asarray(other)).sum(axis=1).clip(-1, 1)))


def normals_seen(file):
    """World normals as a viewer has them, with the file's tangents and with frames from the coordinates alone."""
    points, uv, mixed, corners = surface_samples(file)
    local = sample_texture(file.image(file.material["normalTexture"]), uv) / 127.5 - 1
    normal = unit(mixed["NORMAL"])
    frames = []
    tangent = unit(mixed["TANGENT"][:, :3])
    frames.append((tangent, mixed["TANGENT"][:, 3:].round() * np.cross(normal, tangent)))
    # Without TANGENT a viewer solves for +u and +v of each face; v of the file grows downwards.
    edges = corners["POSITION"][:, 1:] - corners["POSITION"][:, :1]
    steps = (corners["TEXCOORD_0"][:, 1:] - corners["TEXCOORD_0"][:, :1]).astype(float) * [1, -1]
    along = np.linalg.solve(steps, edges)
    frames.append((unit(along[:, 0]), unit(along[:, 1])))
    for t, b in frames:
        yield points, to_world(unit(local[:, :1] * t + local[:, 1:2] * b + local[:, 2:] * normal))


def test_normal_maps_give_the_materials_normals_in_every_viewer(ball):
    _, _, file = ball
    tangents = file.attributes["TANGENT"]
    np.testing.assert_allclose(np.linalg.norm(tangents[:, :3], axis=1), 1.0, atol=1e-5)
    assert set(np.unique(tangents[:, 3])) <= {-1.0, 1.0}
    assert np.abs((tangents[:, :3] * file.attributes["NORMAL"]).sum(axis=1)).max() < 1e-3
    for points, seen in normals_seen(file):
        error = degrees_between(seen, bent_normal(points))
        assert error.mean() < 1.5 and np.quantile(error, 0.95) < 5.0
        # The bend itself is far larger.
    flat = torch.nn.functional.normalize(points, dim=-1)
    assert degrees_between(flat, bent_normal(points)).mean() > 8.0


class Bumped(AnalyticField):
    """Bends the normals it is given; without them it has none to tell."""

    def channels(self, points, normals=None):
        look = super().channels(points)
        if normals is None:
            return look
        torch.testing.assert_close(normals.norm(dim=1), torch.ones(len(points)))
        tilt = 0.3 * torch.sin(4 * points[:, [1, 2, 0]])
        return SurfaceChannels(look.base_color, normal=torch.nn.functional.normalize(normals + tilt, dim=-1))


@pytest.mark.parametrize("source", ["auto", "surface"])
def test_bumps_of_the_material_lie_on_the_surface_normals(tmp_path, source):
    make_exporter(normal_map=source).export(Bumped(sphere(0.6), softness=0.01), tmp_path, "ball")
    for points, seen in normals_seen(GlbFile(tmp_path / "ball.glb")):
        assert degrees_between(seen, bent_normal(points)).mean() < 2.0


def test_mirrored_texture_coordinates_keep_their_normals(tmp_path):
    mesh = uv_sphere()
    flipped = Mesh(mesh.vertices, mesh.faces, mesh.uvs * [-1, 1] + np.float32([1, 0]), mesh.uv_faces)
    shape = MeshShape(flipped)
    shape.channels = PbrBall("normal").channels
    make_exporter(max_faces=5000).export(shape, tmp_path, "mirror")
    file = GlbFile(tmp_path / "mirror.glb")
    assert (file.attributes["TANGENT"][:, 3] == -1).all()
    for points, seen in normals_seen(file):
        error = degrees_between(seen, bent_normal(points))
        assert np.quantile(error, 0.9) < 5.0  # the poles have no frame


def test_obj_and_the_loader_agree_with_the_glb(ball):
    folder, result, _ = ball
    names = [path.name for path in result.paths]
    assert names[-1] == "ball.glb" and {"ball-roughness.png", "ball-metallic.png", "ball-normal.png"} < set(names)
    text = (folder / "ball.mtl").read_text()
    for line in ("map_Kd ball.png", "map_Pr ball-roughness.png", "map_Pm ball-metallic.png", "norm ball-normal.png"):
        assert line in text.splitlines()
    directions = torch.nn.functional.normalize(torch.randn(400, 3, generator=torch.Generator().manual_seed(1)), dim=-1)
    for suffix in ("obj", "glb"):
        loaded = load_mesh(folder / f"ball.{suffix}")
        # The iso-surface of the soft ball lies a little outside of its radius.
        points = directions * float(np.linalg.norm(loaded.mesh.vertices, axis=1).mean())
        look = loaded.appearance(points)
        assert (look.base_color - position_color(points)).abs().mean() < 0.01
        assert (look.roughness - roughness_at(points)).abs().mean() < 0.01
        assert (look.metallic - metallic_at(points)).abs().mean() < 0.01
        cosine = (look.normal * bent_normal(points)).sum(dim=1).clamp(-1, 1)
        assert cosine.arccos().mean() < np.radians(1.5)


def test_only_channels_that_exist_are_written(tmp_path):
    result = make_exporter(normal_map="none").export(PbrBall("roughness", "normal"), tmp_path, "ball")
    file = GlbFile(result.paths[0])
    assert result.report.channels == ("base_color", "roughness")
    assert "normalTexture" not in file.material and "occlusionTexture" not in file.material
    assert set(file.attributes) == {"POSITION", "NORMAL", "TEXCOORD_0"}
    packed = file.image(file.material["pbrMetallicRoughness"]["metallicRoughnessTexture"])
    assert (packed[..., 2] == 0).all() and (packed[..., 0] == 255).all() and packed[..., 1].std() > 5


def test_detail_lost_in_simplification_returns_as_a_normal_map(tmp_path):
    ripples = AnalyticField(lambda p: p.norm(dim=-1) - 0.6 - 0.02 * torch.sin(18 * p[:, 2]), softness=0.01)
    make_exporter(max_faces=300, resolution=96, normal_map="surface", texture_size=512).export(
        ripples, tmp_path, "ball"
    )
    file = GlbFile(tmp_path / "ball.glb")
    points, seen = next(normals_seen(file))
    points.requires_grad_(True)
    (true,) = torch.autograd.grad(ripples.sdf(points).sum(), points)
    true = torch.nn.functional.normalize(true, dim=-1).numpy()
    _, _, mixed, _ = surface_samples(file)
    plain = to_world(mixed["NORMAL"])
    lost = degrees_between(plain, true).mean()
    assert degrees_between(seen, true).mean() < 0.5 * lost and lost > 10


def test_own_texture_coordinates_are_kept(tmp_path):
    mesh = uv_sphere()
    result = make_exporter(max_faces=5000, formats=["glb", "obj"]).export(MeshShape(mesh), tmp_path, "own")
    assert (
        result.report.notes == () and result.report.faces == len(mesh.faces) and "unwrap" not in result.report.seconds
    )
    file = GlbFile(tmp_path / "own.glb")
    kept = file.attributes["TEXCOORD_0"] * [1, -1] + [0, 1]
    assert {tuple(row) for row in kept.round(5)} == {tuple(row) for row in mesh.uvs.astype(float).round(5)}
    points, uv, _, _ = surface_samples(file)
    color = sample_texture(file.image(file.material["pbrMetallicRoughness"]["baseColorTexture"]), uv) / 255
    assert np.abs(color - position_color(points).numpy()).mean() < 0.01


def test_own_texture_coordinates_that_cannot_stay_are_reported(tmp_path):
    mesh = uv_sphere()
    result = make_exporter(max_faces=400).export(MeshShape(mesh), tmp_path, "own")
    assert result.report.faces <= 400
    (note,) = result.report.notes
    assert note.startswith("the mesh's texture coordinates were replaced by new ones: the faces changed (2,208 before")
    assert unusable_uvs(mesh) == ""
    assert "beyond the texture" in unusable_uvs(Mesh(mesh.vertices, mesh.faces, mesh.uvs * 2, mesh.uv_faces))
    assert "100 % of the surface" in unusable_uvs(Mesh(mesh.vertices, mesh.faces, mesh.uvs * 0, mesh.uv_faces))
    folded = 1.0 - np.abs(2.0 * mesh.uvs - 1.0) * [1, 0] - [0, 1] * (1.0 - mesh.uvs)
    folded = Mesh(mesh.vertices, mesh.faces, folded.astype(np.float32), mesh.uv_faces)
    assert re.fullmatch(r"\d\d % of the used texels belong to several faces", unusable_uvs(folded))
    result = make_exporter(max_faces=5000).export(MeshShape(folded), tmp_path, "folded")
    (note,) = result.report.notes
    assert re.search(r"replaced by new ones: \d\d % of the used texels belong to several faces", note)
    assert result.report.faces == len(mesh.faces) and "unwrap" in result.report.seconds


def authored(mesh):
    return replace(mesh, authored=True)


@pytest.mark.parametrize("uvs", [True, False])
def test_a_user_s_mesh_keeps_its_faces(tmp_path, uvs):
    """More faces than the default budget, and a piece that is smaller than the default of pieces to drop."""
    mesh = authored(beside(uv_sphere(40, 130), uv_sphere(8, 12, radius=0.05)))
    mesh = mesh if uvs else replace(mesh, uvs=None, uv_faces=None)
    assert len(mesh.faces) > DEFAULT_FACES
    options = {"max_faces": None, "unwrap_timeout": 0.0, "texture_size": 1024, "formats": ["glb", "obj"]}
    result = make_exporter(**options).export(MeshShape(mesh), tmp_path, "own")
    notes = [note for note in result.report.notes if "xatlas" not in note]
    assert notes == [] and result.report.faces == len(mesh.faces) and result.report.dropped_components == 0
    file = GlbFile(tmp_path / "own.glb")
    corners = to_world(file.attributes["POSITION"])[file.faces]
    np.testing.assert_array_equal(corners, mesh.vertices[mesh.faces])
    if uvs:
        places = (file.attributes["TEXCOORD_0"] * [1, -1] + [0, 1])[file.faces]
        np.testing.assert_allclose(places, mesh.uvs[mesh.uv_faces], atol=1e-6)
    # The OBJ has the user's vertices in their order too.
    rows = [line.split() for line in (tmp_path / "own.obj").read_text().splitlines()]
    vertices = np.array([row[1:] for row in rows if row[0] == "v"], dtype=float)
    np.testing.assert_allclose(to_world(vertices), mesh.vertices, atol=1e-6)


def test_a_user_s_mesh_is_simplified_on_request(tmp_path):
    mesh = authored(beside(uv_sphere(), uv_sphere(8, 12, radius=0.05)))
    result = make_exporter(max_faces=400).export(MeshShape(mesh), tmp_path, "own")
    assert result.report.faces <= 400
    said = f"your mesh was simplified from {len(mesh.faces):,} to {result.report.faces} faces"
    assert result.report.notes[0] == f"{said}, because exporter.max_faces is 400"
    result = make_exporter(max_faces=None, min_component_volume=0.1).export(MeshShape(mesh), tmp_path, "own")
    assert result.report.dropped_components == 1 and result.report.faces == len(uv_sphere().faces)


def test_a_user_s_mesh_may_be_open_or_inside_out(tmp_path):
    mesh = uv_sphere()
    inverted = authored(replace(mesh, faces=mesh.faces[:, ::-1], uv_faces=mesh.uv_faces[:, ::-1]))
    for shape in (inverted, authored(open_box())):
        result = make_exporter(max_faces=None).export(MeshShape(shape), tmp_path, "own")
        assert result.report.faces == len(shape.faces)


def beside(one, other):
    """Two meshes as one; the second at a distance, and in a corner of the texture of its own."""
    shift = np.float32([0.8, 0.0, 0.0])
    uvs = [one.uvs * np.float32([0.85, 1.0]), other.uvs * np.float32([0.1, 0.1]) + np.float32([0.88, 0.0])]
    return Mesh(
        np.concatenate([one.vertices, other.vertices + shift]),
        np.concatenate([one.faces, other.faces + len(one.vertices)]),
        np.concatenate(uvs),
        np.concatenate([one.uv_faces, other.uv_faces + len(one.uvs)]),
    )


def open_box():
    """A box whose top is missing, and whose faces are large enough to see."""
    shape = trimesh.creation.box((0.8, 0.8, 0.8)).subdivide().subdivide()
    faces = shape.faces[shape.triangles_center[:, 2] < 0.39]
    return Mesh(shape.vertices.astype(np.float32), faces.astype(np.int64))


def test_holes_are_closed_on_request(tmp_path):
    mesh = open_box()
    (loop,) = boundary_loops(mesh)
    filled, count = fill_holes(mesh)
    assert count == 1 and len(loop) == 16 and topology(filled).watertight and filled.volume == pytest.approx(0.512)
    open_result = make_exporter().export(MeshShape(mesh), tmp_path, "open")
    assert open_result.report.holes == 1 and "1 holes; exporter.fill_holes" in open_result.report.notes[0]
    assert GlbFile(tmp_path / "open.glb").material["doubleSided"] is True
    closed = make_exporter(fill_holes=True).export(MeshShape(mesh), tmp_path, "closed")
    assert closed.report.watertight and closed.report.notes == ("1 holes of the surface were closed",)
    assert GlbFile(tmp_path / "closed.glb").material["doubleSided"] is False


def test_two_holes_that_touch_in_a_vertex_are_closed():
    grid = trimesh.creation.icosphere(subdivisions=2, radius=0.5)
    faces = np.asarray(grid.faces)
    vertex = 20
    around = np.flatnonzero((faces == vertex).any(axis=1))
    # Remove two faces at one vertex that share no edge.
    other = next(f for f in around[1:] if len(set(faces[f]) & set(faces[around[0]])) == 1)
    mesh = Mesh(grid.vertices.astype(np.float32), np.delete(faces, [around[0], other], axis=0).astype(np.int64))
    filled, count = fill_holes(mesh)
    assert count == 2 and topology(filled).watertight and len(filled.faces) == len(faces)


def test_only_the_largest_piece_is_kept_on_request(tmp_path):
    field = AnalyticField(union(sphere(0.4, (-0.4, 0, 0)), sphere(0.3, (0.5, 0, 0))))
    assert make_exporter().export(field, tmp_path, "two").report.components == 2
    report = make_exporter(largest_component=True).export(field, tmp_path, "one").report
    assert (report.components, report.dropped_components) == (1, 1)


@pytest.mark.parametrize("up", ["y", "z"])
def test_scale_height_and_axis_in_every_format(tmp_path, up):
    field = AnalyticField(box((0.4, 0.2, 0.1)))
    result = make_exporter(formats=["glb", "obj", "ply", "stl"], height=0.5, up_axis=up).export(field, tmp_path, "box")
    assert result.report.scale == pytest.approx(2.5, rel=0.05)
    extent = {"y": (1.0, 0.5, 2.0), "z": (2.0, 1.0, 0.5)}
    for suffix in ("glb", "obj", "ply", "stl"):
        size = np.ptp(trimesh.load(tmp_path / f"box.{suffix}", force="mesh").bounds, axis=0)
        np.testing.assert_allclose(size, extent["y" if suffix == "glb" else up], rtol=0.06)
        # Read back without being told: the header says which axis is up.
        low, high = load_mesh(tmp_path / f"box.{suffix}").mesh.bounds
        np.testing.assert_allclose(high - low, extent["z"], rtol=0.06)


def test_stl_is_the_whole_surface(tmp_path):
    result = make_exporter(formats=["stl"], max_faces=200).export(AnalyticField(sphere(0.5)), tmp_path, "ball")
    solid = trimesh.load(tmp_path / "ball.stl")
    assert solid.is_watertight and len(solid.faces) > result.report.faces and solid.volume > 0.5
    assert result.report.channels == () and list(result.report.seconds) == ["surface", "simplify", "write"]


def test_occlusion_knows_free_and_shadowed_places(tmp_path):
    ball = trimesh.creation.icosphere(subdivisions=3, radius=0.5)
    mesh = Mesh(ball.vertices.astype(np.float32), ball.faces.astype(np.int64))
    assert ambient_occlusion(mesh, mesh.vertices, mesh.vertex_normals()).min() > 0.97
    # The middle of the floor of a cube's shell: the light through its open top arrives in the share of the form factor
    # between a point and a parallel square above its middle, at a distance of its side.
    box_ = trimesh.creation.box((1.0, 1.0, 1.0))
    inside = np.asarray(box_.faces)[:, ::-1][box_.triangles_center[:, 2] < 0.49]
    room = Mesh(box_.vertices.astype(np.float32), inside.astype(np.int64))
    seen = ambient_occlusion(
        room, np.array([[0.0, 0.0, -0.5]], np.float32), np.array([[0.0, 0.0, 1.0]], np.float32), directions=600
    )
    half = 0.5
    corner = half / np.sqrt(1 + half**2) * np.arctan(half / np.sqrt(1 + half**2)) * 2 / (2 * np.pi)
    assert seen[0] == pytest.approx(4 * corner, abs=0.03)
    report = make_exporter(occlusion=True, resolution=24).export(AnalyticField(sphere(0.5)), tmp_path, "ball").report
    assert "occlusion" in report.channels


def test_untrained_and_cut_fields_are_found_out(tmp_path):
    fog = AnalyticField(sphere(0.6), peak=0.3)
    (note,) = make_exporter().export(fog, tmp_path, "fog").report.notes
    assert "the object is fog" in note and "densities lie in [0, 0.3]" in note and "exporter.threshold" in note
    solid = AnalyticField(sphere(2.0))
    (note,) = make_exporter().export(solid, tmp_path, "solid").report.notes
    assert "was not trained" in note and "densities lie in [500, 500]" in note
    cut = AnalyticField(box((0.3, 0.3, 1.2)))
    (note,) = make_exporter().export(cut, tmp_path, "cut").report.notes
    assert "cut off by the ball of radius 1" in note and "geometry.radius" in note


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
    assert result.report.gaussians == 5 and result.report.faces == 0
    assert result.report.describe().startswith("splats: 5 Gaussians")
    json.dumps(result.report.to_dict())
    assert len(trimesh.load(result.paths[0]).vertices) == 5


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
    result = make_exporter(formats=["usdz"], height=1.2).export(shape, tmp_path, "ball")
    path = str(result.paths[0])
    stage = usd.Stage.Open(path)
    assert UsdGeom.GetStageUpAxis(stage) == "Y" and UsdGeom.GetStageMetersPerUnit(stage) == 1.0
    mesh = UsdGeom.Mesh(stage.GetPrimAtPath("/Asset/Mesh"))
    points = np.array(mesh.GetPointsAttr().Get())
    assert np.ptp(points[:, 1]) == pytest.approx(1.2, rel=1e-5) and len(points) == result.report.vertices
    st = UsdGeom.PrimvarsAPI(mesh).GetPrimvar("st").ComputeFlattened()
    assert len(st) == 3 * result.report.faces
    surface = UsdShade.MaterialBindingAPI(mesh).ComputeBoundMaterial()[0].ComputeSurfaceSource()[0]
    assert {i.GetBaseName() for i in surface.GetInputs()} == {"diffuseColor", "roughness", "metallic", "normal"}
    _, assets, missing = UsdUtils.ComputeAllDependencies(path)
    assert missing == [] and len(assets) == 4
    validators = UsdValidation.ValidationRegistry().GetOrLoadAllValidators()
    errors = UsdValidation.ValidationContext(validators).Validate(stage)
    assert len(validators) > 5 and [error.GetMessage() for error in errors] == []


@pytest.mark.parametrize("broken", ["write_obj", "write_stl", "write_splats"])
def test_a_failing_writer_leaves_nothing(tmp_path, monkeypatch, broken):
    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(exporter_module, broken, fail)
    with pytest.raises(OSError, match="disk full"):
        make_exporter(formats=["glb", "obj", "stl", "splats"], max_faces=5000).export(Cloud(uv_sphere()), tmp_path, "x")
    assert list(tmp_path.iterdir()) == []

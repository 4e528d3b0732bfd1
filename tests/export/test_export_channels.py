"""Roughness, metal, normal maps and occlusion in GLB and OBJ files."""

import numpy as np
import pytest
import torch
import trimesh
from shared.export_fields import (
    AnalyticField,
    position_color,
    sample_texture,
    sphere,
)
from shared.exports import make_exporter, surface_samples, to_world
from shared.gltf_files import GlbFile
from shared.pbr_shapes import MeshShape, PbrBall, bent_normal, metallic_at, roughness_at, uv_sphere

from scoredist3d.meshes.exportable import SurfaceChannels
from scoredist3d.meshes.loading import load_mesh
from scoredist3d.meshes.mesh import Mesh
from scoredist3d.meshes.occlusion import ambient_occlusion


@pytest.fixture(scope="module")
def ball(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pbr")
    shape = PbrBall("roughness", "metallic", "normal", "occlusion")
    result = make_exporter(formats=["glb", "obj"]).export(shape, folder, "ball")
    return folder, result, GlbFile(folder / "ball.glb")


def test_channels_are_packed_as_gltf_wants(ball):
    _, result, file = ball
    assert set(result.report.mesh.channels) == {"base_color", "roughness", "metallic", "normal", "occlusion"}
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
    """World normals as viewers compute them: with the tangents of the file, and with frames from the coordinates."""
    points, uv, mixed, corners = surface_samples(file)
    local = sample_texture(file.image(file.material["normalTexture"]), uv) / 127.5 - 1
    normal = unit(mixed["NORMAL"])
    frames = []
    tangent = unit(mixed["TANGENT"][:, :3])
    frames.append((tangent, mixed["TANGENT"][:, 3:].round() * np.cross(normal, tangent)))
    # Without TANGENT, viewers solve for +u and +v of each face; v of the file increases downwards.
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
        # The perturbation itself is far larger.
    flat = torch.nn.functional.normalize(points, dim=-1)
    assert degrees_between(flat, bent_normal(points)).mean() > 8.0


class Bumped(AnalyticField):
    """Object that perturbs the given normals; without them it has no shading normals."""

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
        assert np.quantile(error, 0.9) < 5.0  # the tangent frame is undefined at the poles


def test_obj_and_the_loader_agree_with_the_glb(ball):
    folder, result, _ = ball
    names = [path.name for path in result.paths]
    assert names[0] == "ball.glb" and names[-1] == "ball.obj"
    assert {"ball-roughness.png", "ball-metallic.png", "ball-normal.png"} < set(names)
    text = (folder / "ball.mtl").read_text()
    for line in ("map_Kd ball.png", "map_Pr ball-roughness.png", "map_Pm ball-metallic.png", "norm ball-normal.png"):
        assert line in text.splitlines()
    directions = torch.nn.functional.normalize(torch.randn(400, 3, generator=torch.Generator().manual_seed(1)), dim=-1)
    for suffix in ("obj", "glb"):
        loaded = load_mesh(folder / f"ball.{suffix}")
        # The iso-surface of the soft ball lies slightly outside its radius.
        points = directions * float(np.linalg.norm(loaded.mesh.vertices, axis=1).mean())
        look = loaded.look(points)
        assert (look.base_color - position_color(points)).abs().mean() < 0.01
        assert (look.roughness - roughness_at(points)).abs().mean() < 0.01
        assert (look.metallic - metallic_at(points)).abs().mean() < 0.01
        cosine = (look.normal * bent_normal(points)).sum(dim=1).clamp(-1, 1)
        assert cosine.arccos().mean() < np.radians(1.5)


def test_only_channels_that_exist_are_written(tmp_path):
    result = make_exporter(normal_map="none").export(PbrBall("roughness", "normal"), tmp_path, "ball")
    file = GlbFile(result.paths[0])
    assert result.report.mesh.channels == ("base_color", "roughness")
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


def test_occlusion_knows_free_and_shadowed_places(tmp_path):
    ball = trimesh.creation.icosphere(subdivisions=3, radius=0.5)
    mesh = Mesh(ball.vertices.astype(np.float32), ball.faces.astype(np.int64))
    assert ambient_occlusion(mesh, mesh.vertices, mesh.vertex_normals()).min() > 0.97
    # In the middle of the floor of an open box, the visible share of the light is the form factor between a point and a
    # parallel square above it, at a distance equal to its side.
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
    assert "occlusion" in report.mesh.channels

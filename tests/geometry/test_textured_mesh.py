"""Textured meshes from files and stages: known pixels, textures from images, moved vertices, saved states."""

import logging

import numpy as np
import pytest
import torch
from PIL import Image
from shared.export_fields import position_color
from shared.surface_scenes import SIDE_COLORS, around, build, cube, icosphere, renderer_of, views, write_cube
from torch import Tensor

from scoredist3d.config import ConfigError
from scoredist3d.config.validation import parse_component
from scoredist3d.export.bake import bake_textures
from scoredist3d.geometry.base import GeometryInit, SurfacePoints
from scoredist3d.geometry.textured_mesh import DEFAULT_FACES
from scoredist3d.materials.base import logit
from scoredist3d.meshes.mesh import Mesh
from scoredist3d.meshes.uv import unusable_uvs
from scoredist3d.seeding import Rng
from scoredist3d.systems.conversion import ConversionConfig, convert
from scoredist3d.systems.scene import Scene, SceneShape
from scoredist3d.training.checkpoint import load_weights

SMALL = {"num_levels": 4, "log2_hashmap_size": 10}
# Views that see the sides +x, +y, -x and -y of the cube.
ROUND = {0: 0.0, 2: 90.0, 1: 180.0, 3: 270.0}


def textured(**options):
    material = build("material", "unlit")
    options = {"texture_size": 128, "grid": SMALL} | options
    return build("geometry", "textured-mesh", {"rng": Rng(1), "material": material}, **options)


def look(points: Tensor) -> Tensor:
    return logit(position_color(points))


@pytest.fixture
def file(tmp_path) -> str:
    return str(write_cube(tmp_path))


@pytest.mark.parametrize("texture", ["image", "field"])
def test_a_cube_from_a_file_renders_its_colors(file, texture):
    geometry = textured(mesh=file, texture=texture)
    render = renderer_of(geometry)(views(*ROUND.values(), size=33), step=0)
    for view, side in enumerate(ROUND):
        seen = 255 * render.rgb[view, 16, 16]
        assert np.abs(seen.detach().numpy() - SIDE_COLORS[side]).max() < (1.5 if texture == "image" else 12)
    assert render.depth[0, 16, 16].item() == pytest.approx(3.0 - 0.9 / 3**0.5, abs=1e-3)


@pytest.mark.parametrize(("up", "side"), [("z", 0), ("y", 4), ("auto", 0)])
def test_the_upward_axis(file, up, side):
    """With y up, the front of the file (+z) becomes the front of the scene (+x); the format itself is z up."""
    render = renderer_of(textured(mesh=file, up=up))(views(0.0, size=33), step=0)
    np.testing.assert_allclose(255 * render.rgb[0, 16, 16].detach(), SIDE_COLORS[side], atol=1.5)


def test_the_size_in_the_ball(file):
    assert textured(mesh=file, radius=2.0, fit_size=0.5).surface().bounds[1] == pytest.approx(1 / 3**0.5, rel=1e-5)
    assert textured(mesh=file, fit=False).surface().bounds[1] == pytest.approx(0.5)
    with pytest.raises(ValueError, match="outside the ball"):
        textured(mesh=file, fit=False, radius=0.5)


def test_own_texture_coordinates_survive(file):
    surface = textured(mesh=file).surface()
    expected = cube()
    found = surface.uvs[surface.uv_faces]
    centres = surface.vertices[surface.faces].mean(axis=1)
    wanted = expected.vertices[expected.faces].mean(axis=1) * np.abs(surface.vertices).max() / 0.5
    for centre, uv in zip(centres, found, strict=True):
        face = np.linalg.norm(wanted - centre, axis=1).argmin()
        np.testing.assert_allclose(np.sort(uv, 0), np.sort(expected.uvs[expected.uv_faces[face]], 0), atol=1e-6)


def test_vertex_colors_become_the_texture(tmp_path):
    import trimesh

    ball = trimesh.creation.icosphere(subdivisions=3, radius=1.0)
    colors = (255 * position_color(torch.tensor(ball.vertices, dtype=torch.float32) * 0.9)).numpy().astype(np.uint8)
    trimesh.Trimesh(ball.vertices, ball.faces, vertex_colors=colors, process=False).export(tmp_path / "ball.ply")
    geometry = textured(mesh=str(tmp_path / "ball.ply"), texture_size=256)
    points = torch.from_numpy(geometry.surface().vertices)
    assert (geometry.features_at(points).sigmoid() - position_color(points)).abs().mean() < 0.01


def test_features_of_fragments_and_of_points_agree():
    geometry = textured()
    geometry.init_from(GeometryInit(cube(0.4), features=look), Rng())
    mesh = geometry()
    corners = mesh.vertices[mesh.faces]
    points, uv = corners.mean(dim=1), mesh.uvs[mesh.uv_faces].mean(dim=1)
    outwards = torch.nn.functional.one_hot(points.abs().argmax(dim=1), 3) * points
    expected = geometry.features(SurfacePoints(points, uv))
    torch.testing.assert_close(geometry.features_at(points + 0.1 * outwards), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("texture", ["image", "field"])
def test_a_texture_is_found_from_its_images(texture):
    geometry, goal = textured(texture=texture), textured()
    mesh = icosphere(0.5, 2)
    for one in (geometry, goal):
        one.init_from(GeometryInit(mesh, features=look if one is goal else None), Rng())
    renderer, cameras = renderer_of(geometry), around(6, size=48)
    target = renderer_of(goal)(cameras, step=0).rgb.detach()
    optimizer = torch.optim.Adam([p for g in geometry.parameter_groups() for p in g["params"]], lr=0.05)
    for _ in range(60):
        loss = (renderer(cameras, step=0).rgb - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    render, wanted = (
        renderer(views(70.0, elevation=25.0), step=0),
        renderer_of(goal)(views(70.0, elevation=25.0), step=0),
    )
    inside = wanted.opacity[..., 0] == 1
    assert (render.rgb - wanted.rgb)[inside].abs().mean() < 0.06


def test_silhouettes_move_vertices_within_limits():
    geometry = textured(deformable=True, max_offset=0.1, fix_texture=True)
    geometry.init_from(GeometryInit(icosphere(0.5, 3)), Rng())
    assert [g["name"] for g in geometry.parameter_groups()] == ["offsets", "texture"]
    assert not geometry.image.requires_grad
    renderer, cameras = renderer_of(geometry), around(6, size=32)
    bigger = textured()
    bigger.init_from(GeometryInit(icosphere(0.7, 3)), Rng())
    target = renderer_of(bigger)(cameras, step=0).opacity.detach()
    optimizer = torch.optim.Adam([geometry.offsets], lr=0.2)
    before = (renderer(cameras, step=0).opacity - target).square().mean().item()
    for _ in range(40):
        optimizer.zero_grad()
        loss = (renderer(cameras, step=0).opacity - target).square().mean()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.6 * before
    moved = geometry().vertices - geometry().rest
    assert moved.abs().max() <= 0.1 + 1e-6
    assert geometry.surface().vertices == pytest.approx(geometry().vertices.detach().numpy())


@pytest.mark.parametrize("texture", ["image", "field"])
def test_start_from_another_object(texture):
    """The mesh, its texture coordinates and its colors are taken over."""
    geometry = textured(texture=texture, deformable=True)
    start = cube(0.45)
    said = geometry.init_from(GeometryInit(start, features=look), Rng())
    assert "own texture coordinates" in said and "features" in said
    surface = geometry.surface()
    for name in ("vertices", "faces", "uvs", "uv_faces"):
        np.testing.assert_array_equal(getattr(surface, name), getattr(start, name))
    points = torch.rand(200, 3, generator=torch.Generator().manual_seed(0)) * 0.9 - 0.45
    points[:, 1] = 0.45
    error = (geometry.features_at(points).sigmoid() - position_color(points)).abs()
    assert error.mean() < (0.01 if texture == "image" else 0.05)
    with torch.no_grad():
        geometry.offsets.fill_(1.0)
    geometry.init_from(GeometryInit(start), Rng())
    np.testing.assert_array_equal(geometry.surface().vertices, start.vertices)


def test_meshes_without_coordinates_are_simplified_and_unwrapped():
    geometry = textured(max_faces=200, unwrap_timeout=0.0, texture_size=256)
    said = geometry.init_from(GeometryInit(icosphere(0.5, 3), features=look), Rng())
    surface = geometry.surface()
    assert len(surface.faces) <= 200 and surface.uvs is not None and "xatlas was not used" in said
    assert np.linalg.norm(surface.vertices, axis=1).mean() == pytest.approx(0.5, abs=0.02)
    points = torch.from_numpy(surface.vertices[surface.faces].mean(axis=1))
    assert (geometry.features_at(points).sigmoid() - position_color(points)).abs().mean() < 0.02
    with pytest.raises(ValueError, match=r"^texture_size: "):
        textured(texture_size=16, unwrap_timeout=0.0).init_from(GeometryInit(icosphere(0.5, 3)), Rng())


@pytest.fixture(scope="module")
def ball_file(tmp_path_factory):
    """A file with a ball of 20,480 faces without texture coordinates, above the limit for meshes of earlier stages."""
    import trimesh

    ball = icosphere(0.5, 5)
    path = tmp_path_factory.mktemp("ball") / "ball.ply"
    trimesh.Trimesh(ball.vertices, ball.faces, process=False).export(path)
    assert len(ball.faces) > DEFAULT_FACES
    return str(path), ball


@pytest.mark.parametrize("texture", ["image", "field"])
def test_a_file_s_mesh_keeps_its_faces(ball_file, texture):
    path, ball = ball_file
    options = {"texture": texture, "texture_size": 1024, "unwrap_timeout": 0.0}
    surface = textured(mesh=path, fit=False, **options).surface()
    assert surface.authored
    np.testing.assert_array_equal(surface.faces, ball.faces)
    np.testing.assert_array_equal(surface.vertices, ball.vertices)


def test_a_file_s_mesh_is_simplified_on_request(ball_file, caplog):
    path, _ = ball_file
    with caplog.at_level("INFO", logger="scoredist3d"):
        geometry = textured(mesh=path, max_faces=300, unwrap_timeout=0.0, texture_size=256)
    surface = geometry.surface()
    # What is exported is still the user's mesh, which is not simplified again.
    assert len(surface.faces) <= 300 and surface.authored
    (record,) = [r for r in caplog.records if "geometry.mesh" in r.message]
    said = f"ball.ply: {len(surface.faces)} faces, simplified from 20,480 because geometry.max_faces is 300"
    assert record.levelname == "WARNING" and said in record.message
    start = textured(texture_size=1024, unwrap_timeout=0.0)
    assert "simplified from 20,480" in start.init_from(GeometryInit(icosphere(0.5, 5)), Rng())
    assert not start.surface().authored and len(start.surface().faces) <= DEFAULT_FACES


def test_whose_mesh_it_is_survives_stages_and_states(file):
    source = scene(mesh=file)
    target = scene(deformable=True)
    convert(source, target, ConversionConfig(), Rng())
    assert target.geometry.surface().authored
    fresh = textured()
    load_weights(fresh, source.geometry.state_dict())
    assert fresh.surface().authored
    older = {name: value for name, value in source.geometry.state_dict().items() if name != "authored"}
    again = textured(mesh=file)
    load_weights(again, older)
    assert again.surface().authored and not load_into(textured(), older).surface().authored


def load_into(geometry, state):
    load_weights(geometry, state)
    return geometry


def write_obj(folder, uvs, *, material="", objects=1):
    """An OBJ file of several objects with the cube and the given texture coordinates (None for none)."""
    mesh = cube()
    lines = ["# z up", *(["mtllib cube.mtl"] if material else [])]
    lines += [f"v {x} {y} {z}" for x, y, z in mesh.vertices]
    lines += [] if uvs is None else [f"vt {u} {v}" for u, v in uvs]
    for number, (corners, places) in enumerate(zip(mesh.faces + 1, mesh.uv_faces + 1, strict=True)):
        if number % (len(mesh.faces) // objects) == 0:
            lines.append(f"usemtl {material}{number if objects > 1 else ''}")
        row = zip(corners, places, strict=True)
        lines.append("f " + " ".join(f"{c}" if uvs is None else f"{c}/{p}" for c, p in row))
    (folder / "cube.obj").write_text("\n".join(lines) + "\n")
    return str(folder / "cube.obj")


UVS = cube().uvs
SAID = {
    "usable": (UVS, "INFO", "its own texture coordinates are used"),
    "none": (None, "INFO", "it has no texture coordinates; "),
    "outside": (3.0 * UVS, "WARNING", "its own texture coordinates are not used: they reach from"),
    "overlapping": (UVS % [1.0, 0.5], "WARNING", "its own texture coordinates are not used: 100 % of the used texels"),
    "points": (0.0 * UVS, "WARNING", "its own texture coordinates are not used: 100 % of the surface has no area"),
}


@pytest.mark.parametrize("texture", ["image", "field"])
@pytest.mark.parametrize("case", SAID)
def test_what_is_said_of_texture_coordinates_is_what_happens(tmp_path, caplog, case, texture):
    uvs, level, said = SAID[case]
    with caplog.at_level("INFO", logger="scoredist3d"):
        options = {"texture": texture, "texture_size": 128, "grid": SMALL, "unwrap_timeout": 0.0}
        geometry = build("geometry", "textured-mesh", mesh=write_obj(tmp_path, uvs), **options)
    (record,) = [r for r in caplog.records if "geometry.mesh: cube.obj" in r.message]
    assert record.message.startswith("geometry.mesh: cube.obj: 12 faces; ") and said in record.message
    assert record.levelname == level
    found = geometry.surface()
    if case == "usable":
        np.testing.assert_allclose(found.uvs[found.uv_faces], UVS[cube().uv_faces], atol=1e-6)
    elif texture == "image":
        assert "new ones were made" in record.message and found.uvs is not None and unusable_uvs(found) == ""
    else:
        assert "the export makes new ones" in record.message and found.uvs is None


def test_texture_coordinates_that_repeat_or_share_the_image_are_described(tmp_path, caplog):
    ramp = np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3)
    Image.fromarray(ramp).save(tmp_path / "a.png")
    Image.fromarray(255 - ramp).save(tmp_path / "b.png")
    (tmp_path / "cube.mtl").write_text("newmtl m\nmap_Kd a.png\nnewmtl m0\nmap_Kd a.png\nnewmtl m6\nmap_Kd b.png\n")
    with caplog.at_level("INFO", logger="scoredist3d"):
        textured(mesh=write_obj(tmp_path, UVS + 1.0, material="m"))
        textured(mesh=write_obj(tmp_path, UVS, material="m", objects=2))
    repeated, shared = [r.message for r in caplog.records if "geometry.mesh: cube.obj" in r.message]
    assert "are used, which were moved into [0, 1], because they repeat the image" in repeated
    assert "are used, which were moved into an atlas, because its 2 objects have different images" in shared


def test_coordinates_outside_of_the_image_are_replaced():
    start = cube(0.4)
    tiled = Mesh(start.vertices, start.faces, uvs=3.0 * start.uvs, uv_faces=start.uv_faces)
    geometry = textured(unwrap_timeout=0.0)
    assert "are not used: they reach from" in geometry.init_from(GeometryInit(tiled), Rng())
    assert geometry.surface().uvs.min() >= 0 and geometry.surface().uvs.max() <= 1


@pytest.mark.parametrize("texture", ["image", "field"])
@pytest.mark.parametrize("deformable", [False, True])
def test_round_trip_into_a_fresh_object(file, texture, deformable):
    """Sizes come from the state; the new object does not read the file."""
    options = {"texture": texture, "deformable": deformable}
    geometry, fresh = textured(mesh=file, **options), textured(**options)
    if deformable:
        with torch.no_grad():
            geometry.offsets.normal_(generator=torch.Generator().manual_seed(0))
    load_weights(fresh, geometry.state_dict())
    cameras = views(30.0, elevation=20.0, size=24)
    first, second = (renderer_of(one)(cameras, step=0).rgb for one in (geometry, fresh))
    assert torch.equal(first, second)
    other = textured(**options)
    other.load_state_dict(geometry.state_dict())
    assert torch.equal(other.vertices, geometry.vertices)
    renderer_of(fresh)(cameras, step=0).rgb.sum().backward()
    assert not deformable or fresh.offsets.grad.shape == geometry.offsets.shape


def test_foreign_states_are_told(file):
    state = textured(mesh=file).state_dict()
    with pytest.raises(ValueError, match="different sizes: image"):
        load_weights(textured(texture_size=64), state)
    with pytest.raises(ValueError, match="missing: offsets"):
        load_weights(textured(deformable=True), state)
    with pytest.raises(ValueError, match="different sizes: vertices"):
        load_weights(textured(), state | {"vertices": torch.zeros(8, 2)})
    for name, index in (("uv_faces", 10**9), ("uv_faces", -1), ("faces", 8)):
        with pytest.raises(ValueError, match=rf"damaged: its {name} refer to \w+ that do not exist"):
            load_weights(textured(), state | {name: torch.full((12, 3), index)})
    with pytest.raises(ValueError, match="another configuration"):
        load_weights(textured(), build("geometry", "dmtet", resolution=8, grid=SMALL).state_dict())


def scene(**options) -> Scene:
    blocks = {
        "geometry": {"type": "textured-mesh", "texture_size": 128, **options},
        "material": {"type": "unlit"},
        "background": {"type": "solid"},
        "renderer": {"type": "mesh-rasterizer"},
    }
    return Scene(*(parse_component(kind, block) for kind, block in blocks.items()), rng=Rng())


def test_from_scene_to_scene(file):
    """A stage takes over mesh, texture coordinates and colors of the previous stage, in either representation."""
    source, target = scene(mesh=file), scene(deformable=True)
    convert(source, target, ConversionConfig(), Rng())
    np.testing.assert_array_equal(target.geometry.surface().uvs, source.geometry.surface().uvs)
    cameras = views(20.0, 200.0, elevation=20.0, size=32)
    first, second = (one(cameras, step=0, rng=None) for one in (source, target))
    assert (first.rgb - second.rgb).abs().mean() < 0.005
    same = scene()
    assert same.fits(source.state_dict()) and not scene(deformable=True).fits(source.state_dict())
    same.continue_from(source.state_dict())
    torch.testing.assert_close(same(cameras, step=0, rng=None).rgb, first.rgb)


def test_the_exported_texture_is_the_file_s(file):
    shape = SceneShape(scene(mesh=file))
    texture = bake_textures(shape, shape.surface(), 96).base_color
    for side, color in enumerate(SIDE_COLORS):
        column, row = side % 3, 1 - side // 3
        assert np.abs(texture[48 * row + 24, 32 * column + 16].astype(int) - color).max() <= 2


def test_density_says_where_the_surface_is():
    geometry = textured()
    geometry.init_from(GeometryInit(cube(0.4)), Rng())
    density = geometry.density(torch.tensor([[0.0, 0.0, 0.0], [0.39, 0.0, 0.0], [0.41, 0.0, 0.0], [0.9, 0.0, 0.0]]))
    assert density[0] > density[1] > geometry.iso_level > density[2] > density[3] >= 0


def test_without_a_mesh_it_says_what_to_give():
    with pytest.raises(ValueError, match=r"geometry\.mesh.*init_from"):
        textured()()
    with pytest.raises(ValueError, match="has no faces"):
        textured().init_from(GeometryInit(Mesh(np.zeros((0, 3), np.float32), np.zeros((0, 3), np.int64))), Rng())
    with pytest.raises(ValueError, match="does not exist"):
        textured(mesh="nowhere.glb")


def test_colors_that_the_material_cannot_take_over(file, caplog):
    class Opaque(type(build("material", "unlit"))):
        def features_of(self, channels):
            raise ValueError("no way back")

    material = Opaque(build("material", "unlit").Config())
    with caplog.at_level(logging.WARNING):
        options = {"mesh": file, "texture_size": 64}
        geometry = build("geometry", "textured-mesh", {"rng": Rng(), "material": material}, **options)
    assert "no way back" in caplog.text and geometry.image.abs().max() == 0


def test_options_that_cannot_be():
    with pytest.raises(ConfigError, match="no parameters are left to train"):
        parse_component("geometry", {"type": "textured-mesh", "fix_texture": True})

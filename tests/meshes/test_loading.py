"""Mesh files, written by hand or by trimesh, and read back."""

import numpy as np
import pytest
import torch
import trimesh
from PIL import Image

from scoredist3d.meshes.loading import LoadedMesh, fit_into, load_mesh
from scoredist3d.meshes.mesh import Mesh, topology
from scoredist3d.meshes.tangents import corner_tangents
from scoredist3d.meshes.textures import Images, into_unit_square, join, sample_image, to_bytes, to_display, to_linear

# A pixel row per quarter of the height: red on top, then green, blue, white at the bottom.
STRIPES = np.repeat(np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]], np.uint8)[:, None], 4, axis=1)


def quad(material, offset=0.0, uvs=((0, 0), (1, 0), (1, 1), (0, 1))):
    """Unit square in the x-y plane of the file, with texture coordinates along x and y."""
    vertices = np.array([[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0]], dtype=float)
    vertices[:, 0] += offset
    visual = trimesh.visual.TextureVisuals(uv=np.array(uvs, dtype=float), material=material)
    return trimesh.Trimesh(vertices, [[0, 1, 2], [0, 2, 3]], visual=visual, process=False)


def pbr(image=STRIPES, **options):
    texture = None if image is None else Image.fromarray(image)
    return trimesh.visual.material.PBRMaterial(baseColorTexture=texture, **options)


def world(x, y, z=0.0):
    """World coordinates of points of a y-up file."""
    return torch.tensor([[z, x, y]], dtype=torch.float32)


def color_at(loaded, x, y):
    return (255 * loaded.appearance(world(x, y)).base_color[0]).round().tolist()


def test_glb_with_a_texture(tmp_path):
    scene = trimesh.Scene(quad(pbr(roughnessFactor=0.25, metallicFactor=0.5)))
    scene.export(tmp_path / "quad.glb")
    loaded = load_mesh(tmp_path / "quad.glb")
    mesh = loaded.mesh
    assert mesh.vertices.shape == (4, 3) and mesh.vertices.dtype == np.float32 and mesh.faces.shape == (2, 3)
    assert np.array_equal(loaded.base_color, STRIPES)
    assert loaded.normal is None and loaded.roughness.shape == (1, 1)
    # The file's y is our z, and its z, where the square looks to, our x.
    np.testing.assert_allclose(mesh.bounds, [[0, 0, 0], [0, 1, 1]])
    np.testing.assert_allclose(mesh.vertex_normals(), [[1, 0, 0]] * 4)
    assert color_at(loaded, 0.5, 0.125) == [255, 255, 255] and color_at(loaded, 0.5, 0.875) == [255, 0, 0]
    assert color_at(loaded, 0.3, 0.375) == [0, 0, 255]
    look = loaded.appearance(world(0.5, 0.5, 0.2))
    assert look.roughness.item() == pytest.approx(0.25, abs=2e-3) and look.metallic.item() == pytest.approx(
        0.5, abs=2e-3
    )
    assert look.normal is None


def test_transforms_and_mirrors_are_applied(tmp_path):
    box = trimesh.creation.box()
    scene = trimesh.Scene()
    scene.add_geometry(box, geom_name="box", transform=np.diag([2.0, 1.0, 1.0, 1.0]))
    mirror = trimesh.transformations.translation_matrix([5.0, 0, 0]) @ np.diag([-1.0, 1.0, 1.0, 1.0])
    scene.add_geometry(box, geom_name="again", transform=mirror)
    scene.export(tmp_path / "two.glb")
    mesh = load_mesh(tmp_path / "two.glb").mesh
    assert mesh.volume == pytest.approx(3.0) and len(mesh.vertices) == 16
    seen = topology(mesh)
    assert seen.watertight and seen.components == 2
    np.testing.assert_allclose(mesh.bounds, [[-0.5, -1, -0.5], [0.5, 5.5, 0.5]])


def test_two_materials_share_an_atlas(tmp_path):
    blue = np.zeros((2, 2, 3), np.uint8) + np.array([0, 0, 200], np.uint8)
    scene = trimesh.Scene([quad(pbr(roughnessFactor=0.2)), quad(pbr(blue, roughnessFactor=0.8), offset=1.0)])
    scene.export(tmp_path / "two.glb")
    loaded = load_mesh(tmp_path / "two.glb")
    assert len(loaded.mesh.vertices) == 6  # welded along the shared edge
    assert loaded.mesh.uvs.min() >= 0 and loaded.mesh.uvs.max() <= 1
    assert color_at(loaded, 0.5, 0.9) == [255, 0, 0] and color_at(loaded, 0.5, 0.1) == [255, 255, 255]
    assert color_at(loaded, 1.5, 0.9) == [0, 0, 200] and color_at(loaded, 1.99, 0.01) == [0, 0, 200]
    rough = [loaded.appearance(world(x, 0.5)).roughness.item() for x in (0.5, 1.5)]
    assert rough == pytest.approx([0.2, 0.8], abs=2e-3)


def test_factors_and_vertex_colors_of_gltf_are_linear(tmp_path):
    gray = np.full((4, 4, 3), 200, np.uint8)
    trimesh.Scene(quad(pbr(gray, baseColorFactor=[0.5, 1.0, 0.0, 1.0]))).export(tmp_path / "factor.glb")
    color = load_mesh(tmp_path / "factor.glb").base_color[0, 0]
    expected = to_bytes(to_display(to_linear(np.array(200 / 255)) * np.array([128 / 255, 1.0, 0.0])))
    np.testing.assert_allclose(color, expected, atol=1)
    plain = trimesh.Trimesh([[0, 0, 0], [1, 0, 0], [0, 1, 0]], [[0, 1, 2]], process=False)
    plain.visual.vertex_colors = np.full((3, 4), 55, np.uint8)
    trimesh.Scene(plain).export(tmp_path / "vertex.glb")
    loaded = load_mesh(tmp_path / "vertex.glb")
    assert loaded.base_color is None and loaded.mesh.uvs is None
    np.testing.assert_array_equal(loaded.mesh.vertex_colors, to_bytes(to_display(np.full((3, 3), 55 / 255))))


def test_obj_with_polygons_and_pbr_maps(tmp_path):
    (tmp_path / "m.obj").write_text(
        "mtllib m.mtl\nv 0 0 0\nv 1 0 0\nv 1 1 0\nv 0 1 0\nvt 0 0\nvt 1 0\nvt 1 1\nvt 0 1\nusemtl a\n"
        "f 1/1 2/2 3/3 4/4\n"
    )
    (tmp_path / "m.mtl").write_text("newmtl a\nKd 1 1 1\nmap_Kd c.png\nmap_Pr r.png\nPm 0.5\nnorm n.png\n")
    Image.fromarray(STRIPES).save(tmp_path / "c.png")
    Image.fromarray(np.full((8, 8), 51, np.uint8)).save(tmp_path / "r.png")
    lean = np.array([0.6, 0.0, 0.8])
    Image.fromarray(np.tile(to_bytes(0.5 + 0.5 * lean), (4, 4, 1))).save(tmp_path / "n.png")
    loaded = load_mesh(tmp_path / "m.obj")
    assert loaded.mesh.faces.shape == (2, 3) and color_at(loaded, 0.5, 0.625) == [0, 255, 0]
    look = loaded.appearance(world(0.5, 0.5))
    assert look.roughness.item() == pytest.approx(0.2) and look.metallic.item() == pytest.approx(0.5, abs=2e-3)
    # +u is the file's x, our y; the square looks along our x.
    np.testing.assert_allclose(look.normal[0], [0.8, 0.6, 0.0], atol=0.01)


def test_vertices_and_faces_keep_their_order(tmp_path, caplog):
    (tmp_path / "m.obj").write_text(
        "v 1 1 0\nv 0 0 0\nv 1 0 0\nv 0 1 0\nv 1 0 0\n"
        "vt 1 1\nvt 0 0\nvt 1 0\nvt 0 1\n"
        "f 2/2 3/3 1/1\nf 3/3 5/3 1/1\nf 4/4 2/2 1/1\n"
    )
    with caplog.at_level("INFO", logger="scoredist3d"):
        mesh = load_mesh(tmp_path / "m.obj", up="z").mesh
    assert mesh.authored
    np.testing.assert_array_equal(mesh.vertices, [[1, 1, 0], [0, 0, 0], [1, 0, 0], [0, 1, 0]])
    np.testing.assert_array_equal(mesh.faces, [[1, 2, 0], [3, 1, 0]])
    np.testing.assert_array_equal(mesh.uvs[mesh.uv_faces], mesh.vertices[mesh.faces][..., :2])
    assert "m.obj: 1 of its 3 triangles have two corners at the same position and are removed" in caplog.text


def test_a_missing_mtl_image_is_named(tmp_path, caplog):
    (tmp_path / "m.obj").write_text(
        "mtllib m.mtl\nv 0 0 0\nv 1 0 0\nv 1 1 0\nvt 0 0\nvt 1 0\nvt 1 1\nusemtl a\nf 1/1 2/2 3/3\n"
    )
    (tmp_path / "m.mtl").write_text("newmtl a\nKd 0.2 0.4 0.6\nnorm gone.png\n")
    loaded = load_mesh(tmp_path / "m.obj")
    assert "gone.png" in caplog.text and loaded.normal is None
    assert color_at(loaded, 0.5, 0.2) == [51, 102, 153]


@pytest.mark.parametrize(("suffix", "said", "up"), [("ply", "", "z"), ("ply", "comment y up\n", "y"), ("stl", "", "z")])
def test_up_follows_the_comment_or_the_format(tmp_path, suffix, said, up):
    box = trimesh.creation.box((1.0, 2.0, 3.0))
    if suffix == "ply":
        box.visual.vertex_colors = np.tile(np.array([[10, 20, 30, 255]], np.uint8), (8, 1))
    data = box.export(file_type=suffix)
    if said:
        data = data.replace(b"\nelement vertex", b"\n" + said.encode() + b"element vertex", 1)
    (tmp_path / f"box.{suffix}").write_bytes(data)
    mesh = load_mesh(tmp_path / f"box.{suffix}").mesh
    np.testing.assert_allclose(mesh.bounds[1], [0.5, 1.0, 1.5] if up == "z" else [1.5, 0.5, 1.0])
    assert len(mesh.vertices) == 8 and topology(mesh).watertight and mesh.volume == pytest.approx(6.0)
    if suffix == "ply":
        assert (mesh.vertex_colors == [10, 20, 30]).all()
    np.testing.assert_allclose(load_mesh(tmp_path / f"box.{suffix}", up="z").mesh.bounds[1], [0.5, 1.0, 1.5])


def test_fit_into_centres_and_scales():
    mesh = Mesh(np.array([[1, 1, 1], [3, 1, 1], [1, 2, 1]], np.float32), np.array([[0, 1, 2]]))
    fitted = fit_into(mesh, 2.0, margin=0.5)
    assert np.linalg.norm(fitted.vertices, axis=1).max() == pytest.approx(1.0)
    np.testing.assert_allclose(np.add(*fitted.bounds), 0.0, atol=1e-6)
    loaded = LoadedMesh(mesh).fitted(1.0)
    assert np.linalg.norm(loaded.mesh.vertices, axis=1).max() == pytest.approx(0.9)
    with pytest.raises(ValueError, match="no extent"):
        fit_into(Mesh(np.ones((3, 3), np.float32), mesh.faces), 1.0)


def test_errors_are_one_clear_sentence(tmp_path):
    with pytest.raises(ValueError, match=r"gone\.glb does not exist"):
        load_mesh(tmp_path / "gone.glb")
    (tmp_path / "a.fbx").write_bytes(b"")
    with pytest.raises(ValueError, match=r"cannot read a\.fbx: its suffix must be one of \.glb"):
        load_mesh(tmp_path / "a.fbx")
    for suffix, data in (("glb", b"glTF nonsense"), ("ply", b"ply\nnothing"), ("stl", b"xx")):
        (tmp_path / f"b.{suffix}").write_bytes(data)
        with pytest.raises(ValueError, match=rf"cannot read b\.{suffix} as a \.{suffix} file|has no mesh"):
            load_mesh(tmp_path / f"b.{suffix}")
    trimesh.PointCloud(np.eye(3)).export(tmp_path / "points.ply")
    with pytest.raises(ValueError, match=r"points\.ply has no mesh"):
        load_mesh(tmp_path / "points.ply")
    (tmp_path / "flat.obj").write_text("v 0 0 0\nv 0 0 0\nv 0 0 0\nf 1 2 3\n")
    with pytest.raises(ValueError, match=r"flat\.obj has no mesh"):
        load_mesh(tmp_path / "flat.obj")
    trimesh.creation.box().export(tmp_path / "box.stl")
    with pytest.raises(ValueError, match="neither a texture nor vertex colors"):
        load_mesh(tmp_path / "box.stl").appearance(torch.zeros(1, 3))


def test_repeating_textures_are_tiled():
    image = np.arange(12, dtype=np.uint8).reshape(2, 2, 3) * 20
    corner_uvs = np.array([[[-1.75, 0.25], [-0.25, 0.25], [-1.75, 0.75]], [[3.0, 5.0], [4.0, 5.0], [3.0, 6.0]]])
    moved, images = into_unit_square(corner_uvs, Images(image))
    assert moved.min() >= 0 and moved.max() <= 1 and images.base_color.shape == (2, 4, 3)
    weights = np.random.default_rng(0).dirichlet((1, 1, 1), (2, 50))
    before, after = (np.einsum("fnk,fkc->fnc", weights, uvs).reshape(-1, 2) for uvs in (corner_uvs, moved))
    torch.testing.assert_close(
        sample_image(image, torch.from_numpy(before)), sample_image(images.base_color, torch.from_numpy(after))
    )
    with pytest.raises(ValueError, match="repeats its texture 100 times"):
        into_unit_square(corner_uvs * [[[66, 1]]], Images(image))


def test_join_fills_missing_channels():
    uvs, atlas = join([np.full((1, 3, 2), 0.5)] * 2, [Images(STRIPES), Images(roughness=np.full((1, 1), 90, np.uint8))])
    values = [sample_image(atlas.roughness, torch.from_numpy(own[0, :1])).item() for own in uvs]
    assert values == pytest.approx([1.0, 90 / 255])
    white = sample_image(atlas.base_color, torch.from_numpy(uvs[1][0, :1]))
    assert white.tolist() == [[1.0, 1.0, 1.0]]


def test_tangents_follow_u_and_know_mirrors():
    vertices = np.array([[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0]], np.float32)
    faces = np.array([[0, 1, 2], [0, 2, 3]])
    turned = np.array([[0, 1], [0, 0], [1, 0], [1, 1]], np.float32)  # u along +y, v along -x
    plain = corner_tangents(Mesh(vertices, faces, turned, faces))
    np.testing.assert_allclose(plain, np.tile([0, 1, 0, 1], (2, 3, 1)), atol=1e-6)
    mirrored = corner_tangents(Mesh(vertices, faces, turned * [-1, 1], faces))
    np.testing.assert_allclose(mirrored, np.tile([0, -1, 0, -1], (2, 3, 1)), atol=1e-6)
    degenerate = corner_tangents(Mesh(vertices, faces, np.zeros((1, 2), np.float32), np.zeros((2, 3), np.int64)))
    np.testing.assert_allclose(np.linalg.norm(degenerate[..., :3], axis=-1), 1.0, atol=1e-6)
    np.testing.assert_allclose(degenerate[..., 2], 0.0, atol=1e-6)

"""GLB files of every material on every geometry: lit unless the colors include the lighting."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from shared.gltf_files import GlbFile
from shared.surface_scenes import icosphere
from torch.nn import functional

from scoredist3d import registry
from scoredist3d.config.validation import load_experiment, parse_component
from scoredist3d.export.bake import quantize
from scoredist3d.export.check import check_mesh
from scoredist3d.export.frame import Y_UP
from scoredist3d.export.products import ColoredSurfaceProduct
from scoredist3d.geometry.base import GeometryInit
from scoredist3d.geometry.textured_mesh import TexturedMesh
from scoredist3d.materials.base import ShadingInputs
from scoredist3d.meshes.exportable import query_color
from scoredist3d.meshes.isosurface_extraction import find_surface
from scoredist3d.renderers.mesh_rasterizer import MeshRasterizer
from scoredist3d.seeding import Rng
from scoredist3d.systems.scene import Scene, SceneShape
from scoredist3d.systems.volume_channels import volume_channels

ROOT = Path(__file__).resolve().parents[2]
# Whether viewers must light the exported colors.
MATERIALS = {
    "diffuse": True,
    "pbr": True,
    "normal-shading": True,
    "directional-light": True,
    "unlit": False,
    "neural-radiance": False,
    "spherical-harmonics": False,
    "latent": False,
}
FIELD = {"grid": {"num_levels": 3, "log2_hashmap_size": 8}, "network": {"hidden_width": 8}}
VOLUME, SURFACE = {"type": "volume", "num_samples": 8}, {"type": "mesh-rasterizer"}
GEOMETRIES = {
    "implicit-volume": (FIELD | {"density_blob_strength": 60.0}, VOLUME),
    "implicit-sdf": (FIELD, VOLUME),
    "implicit-sdf by NeuS": (FIELD, {"type": "neus-volume", "num_samples": 8}),
    "dmtet": (FIELD | {"resolution": 12}, SURFACE),
    "flexicubes": (FIELD | {"resolution": 12}, SURFACE),
    "textured-mesh": ({"texture_size": 64}, SURFACE),
    "gaussians": ({"num_points": 200}, {"type": "gaussian-splatting"}),
}


class AveragePrior(torch.nn.Module):
    """A prior whose latents are the mean colors of 8 x 8 blocks."""

    image_size = 32

    def encode(self, rgb):
        return functional.avg_pool2d(rgb.movedim(-1, 1), 8)


def scene(geometry, material, **options):
    block, renderer = GEOMETRIES[geometry]
    blocks = {
        "geometry": {"type": geometry.split()[0], **block},
        "material": {"type": material, **options},
        "background": {"type": "solid"},
        "renderer": renderer,
    }
    made = Scene(*(parse_component(kind, one) for kind, one in blocks.items()), rng=Rng(), prior=AveragePrior())
    if isinstance(made.geometry, TexturedMesh):
        mesh = icosphere(0.5, 2)
        made.geometry.init_from(
            GeometryInit(mesh, features=lambda points: _features(points, made.material.num_features)), Rng()
        )
    return made


def _features(points, count):
    return functional.pad(3.0 * points, (0, count))[:, :count]


def export(made, folder, **options):
    defaults = {"resolution": 20, "texture_size": 128, "max_faces": 200, "unwrap_timeout": 0.0, "formats": ["glb"]}
    entry = registry.lookup("exporter", "textured-mesh")
    result = entry.cls(entry.config_cls(check=False, **defaults | options)).export(SceneShape(made), folder, "object")
    return result, GlbFile(folder / "object.glb")


def test_every_material_is_here():
    assert set(MATERIALS) == set(registry.names("material"))


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("material", MATERIALS)
def test_only_baked_light_is_unlit(tmp_path, geometry, material):
    made = scene(geometry, material)
    _, file = export(made, tmp_path)
    unlit = "KHR_materials_unlit" in file.material.get("extensions", {})
    assert unlit is not MATERIALS[material]
    assert file.document.get("extensionsUsed", []) == (["KHR_materials_unlit"] if unlit else [])
    surface = file.material["pbrMetallicRoughness"]
    assert ("metallicRoughnessTexture" in surface) is (material == "pbr")
    assert file.image(surface["baseColorTexture"]).shape == (128, 128, 3)
    normals, corners = file.attributes["NORMAL"], file.attributes["POSITION"][file.faces]
    np.testing.assert_allclose(np.linalg.norm(normals, axis=1), 1.0, atol=1e-4)
    faces = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    assert ((faces[:, None] * normals[file.faces]).sum(axis=-1) > 0).mean() > 0.95


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("material", MATERIALS)
def test_every_scene_is_compared_with_its_mesh(geometry, material):
    """Scenes that are surfaces agree with their meshes; fields that were not trained are fog."""
    made = scene(geometry, material)
    shape = SceneShape(made)
    mesh = find_surface(shape, 20).mesh
    colors = quantize(query_color(shape, mesh.vertices, chunk=4096))
    _, found = check_mesh(shape, ColoredSurfaceProduct(replace(mesh, vertex_colors=colors), Y_UP), size=48)
    assert 0.0 <= found.behind <= found.off_depth <= 1.0 and found.psnr > 10.0
    if isinstance(made.renderer, MeshRasterizer):
        # The depth of a pixel on the silhouette depends on how it is antialiased.
        assert found.see_through < 0.03 and found.off_depth < 0.05 and found.psnr > 30.0


@pytest.mark.parametrize(("geometry", "averaged"), [("implicit-volume", True), ("implicit-sdf", False)])
def test_the_colors_of_radiance_fields_are_averages_along_rays(geometry, averaged):
    made, rng = scene(geometry, "unlit"), torch.Generator().manual_seed(0)
    for parameter in made.geometry.parameters():
        parameter.data += 0.5 * torch.randn(parameter.shape, generator=rng)
    normals = functional.normalize(torch.randn(64, 3, generator=rng), dim=1)
    points = 0.3 * normals
    own = made.material.channels(ShadingInputs(made.geometry.features_at(points), points, normals)).base_color
    expected = volume_channels(made.geometry, made.material, points, normals).base_color if averaged else own
    shape = SceneShape(made)
    torch.testing.assert_close(shape.channels(points, normals).base_color, expected)
    torch.testing.assert_close(shape.channels(points).base_color, own)
    assert ((expected - own).abs().max() > 1e-3) == averaged


def test_vertex_colors_of_radiance_fields_are_averages_along_rays():
    made, rng = scene("implicit-volume", "unlit"), torch.Generator().manual_seed(0)
    for parameter in made.geometry.parameters():
        parameter.data += 0.5 * torch.randn(parameter.shape, generator=rng)
    entry = registry.lookup("exporter", "textured-mesh")
    exporter = entry.cls(entry.config_cls(formats=["ply"], check=False, fill_unseen=False))
    surface = icosphere(0.3, 2)
    found = exporter._vertex_colors(SceneShape(made), surface)
    points, normals = torch.from_numpy(surface.vertices), torch.from_numpy(surface.vertex_normals())
    expected = volume_channels(made.geometry, made.material, points, normals).base_color
    np.testing.assert_allclose(found, expected.detach().numpy(), atol=1e-5)


@pytest.mark.parametrize("geometry", ["implicit-sdf", "textured-mesh"])
def test_a_pbr_export_holds_the_material_s_channels(tmp_path, geometry):
    made = scene(geometry, "pbr", normal_strength=0.5)
    _, file = export(made, tmp_path, formats=["glb", "obj"])
    surface = file.material["pbrMetallicRoughness"]
    assert surface["metallicFactor"] == surface["roughnessFactor"] == 1.0
    assert "normalTexture" in file.material and "TANGENT" in file.attributes
    points = torch.from_numpy(np.ascontiguousarray(file.attributes["POSITION"][:, [2, 0, 1]]))
    wanted = SceneShape(made).channels(points)
    base, packed = (file.image(surface[name]) for name in ("baseColorTexture", "metallicRoughnessTexture"))
    assert abs(base.mean() / 255 - wanted.base_color.mean().item()) < 0.1
    assert abs(packed[..., 1].mean() / 255 - wanted.roughness.mean().item()) < 0.1
    assert abs(packed[..., 2].mean() / 255 - wanted.metallic.mean().item()) < 0.1
    lines = (tmp_path / "object.mtl").read_text().splitlines()
    for line in ("map_Kd object.png", "map_Pr object-roughness.png", "map_Pm object-metallic.png", "Pr 1", "Pm 1"):
        assert line in lines
    assert "norm object-normal.png" in lines


@pytest.mark.parametrize(
    ("overrides", "unlit"),
    [
        ([], True),
        (["system.material.type=pbr", "system.background.type=environment"], False),
        (["system.material.type=diffuse"], False),
    ],
)
@pytest.mark.parametrize(
    "fragment", ["", "sdf-small", "neus-small", "dmtet-small", "flexicubes-small", "textured-mesh-small"]
)
def test_shipped_recipes_follow_the_material(overrides, unlit, fragment):
    """Changing the material of a recipe changes how its export is lit."""
    files = [
        ROOT / "configs/fast.yaml",
        *([ROOT / f"configs/representation/{fragment}.yaml"] if fragment else []),
    ]
    config = load_experiment(files, ["prompt=a red mug", *overrides])
    assert config.exporter.unlit == "auto"
    assert registry.lookup("material", config.system.material.type).cls.baked_lighting is unlit


def test_unlit_against_the_material_is_reported(tmp_path):
    made = scene("textured-mesh", "diffuse")
    result, file = export(made, tmp_path, unlit=True)
    assert "KHR_materials_unlit" in file.material["extensions"]
    assert any("set exporter.unlit=auto" in note for note in result.report.notes)
    result, file = export(scene("textured-mesh", "unlit"), tmp_path / "lit", unlit=False)
    assert "extensions" not in file.material and not any("unlit" in note for note in result.report.notes)

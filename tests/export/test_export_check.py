"""The comparison of an exported mesh with its object: picture, figures and warnings."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from shared.export_fields import position_color
from shared.exports import make_exporter
from shared.pbr_shapes import MeshShape, PbrBall, bent_normal, uv_sphere
from shared.surface_scenes import SIDE_COLORS, cube, views
from shared.tiny_runs import Recorder, make

from scoredist3d.cameras import Cameras
from scoredist3d.export.bake import Textures, bake_textures
from scoredist3d.export.check import SIZE, check_mesh
from scoredist3d.export.diagnostics import check_problems, crease_problems
from scoredist3d.export.drawing import draw_mesh
from scoredist3d.export.frame import Y_UP
from scoredist3d.export.products import ColoredSurfaceProduct, SurfaceProduct, TexturedProduct
from scoredist3d.export.report import CheckReport, MeshReport
from scoredist3d.meshes.exportable import HasViews, ObjectViews
from scoredist3d.meshes.isosurface_extraction import extract_surface, sample_grid
from scoredist3d.meshes.mesh import Mesh
from scoredist3d.meshes.uv import unwrap
from scoredist3d.training.run import run_training

GOOD = MeshReport(10000, 5000, True, 0, 0, 1, 0, 1, 6.0, 0.01, 10.0, (0.0, 40.0), ((-1.0,) * 3, (1.0,) * 3))
POOR = dataclasses.replace(GOOD, genus=24, mean_dihedral_deg=27.8, sharp_edges=0.195, dropped_components=2)
GOOD_CHECK = CheckReport(see_through=0.001, off_depth=0.006, behind=0.003, psnr=28.9, clipped_texels=0.0)
POOR_CHECK = CheckReport(see_through=0.05, off_depth=0.047, behind=0.04, psnr=21.6, clipped_texels=1.0)


def colored(mesh: Mesh) -> Mesh:
    colors = 255 * position_color(torch.from_numpy(mesh.vertices)).numpy()
    return dataclasses.replace(mesh, vertex_colors=colors.round().astype(np.uint8))


class Seen(MeshShape):
    """A mesh that is rendered in the colors of its vertices."""

    def views(self, cameras: Cameras) -> ObjectViews:
        drawn = draw_mesh(colored(self.mesh), None, cameras, self.radius)
        assert drawn.base_color is not None
        return ObjectViews(drawn.base_color, drawn.base_color, drawn.opacity, drawn.depth)


def painted_cube(*clipped: int) -> TexturedProduct:
    """The cube with one color per side, white on the ``clipped`` sides; uncovered texels are clipped too if any are."""
    sheet = np.zeros((96, 96, 3), np.uint8)
    for side, color in enumerate(SIDE_COLORS):
        column, row = side % 3, 1 - side // 3
        sheet[48 * row : 48 * row + 48, 32 * column : 32 * column + 32] = 255 if side in clipped else color
    covered = np.zeros((2, 48, 3, 32), bool)
    covered[:, 5:-5, :, 4:-4] = True
    covered = covered.reshape(96, 96)
    sheet[~covered] = 0 if clipped else 128
    return TexturedProduct(cube(), Textures(sheet, covered=covered), Y_UP)


def test_a_textured_cube_is_drawn_upright_with_its_sides_where_they_are() -> None:
    product = painted_cube()
    drawn = draw_mesh(product.mesh, product.textures, views(0.0, elevation=35.0), 1.0)
    assert drawn.base_color is not None and drawn.lit is not None
    front, top = (torch.tensor(SIDE_COLORS[side] / 255.0).float() for side in (0, 4))
    torch.testing.assert_close(drawn.base_color[0, 20, 32], top)
    torch.testing.assert_close(drawn.base_color[0, 40, 32], front)
    torch.testing.assert_close(drawn.base_color[0, 0, 0], torch.ones(3))
    # Geometric normals of a cube with shared vertices are smooth, its face normals are not.
    level = draw_mesh(product.mesh, product.textures, views(0.0), 1.0, lit=False)
    assert level.lit is None
    torch.testing.assert_close(level.depth[0, 32, 32], torch.tensor([2.5]), atol=1e-3, rtol=0)
    assert float(level.gray[0, 28:36, 28:36].std()) < 1e-6 and float(level.opacity.min()) == 0.0
    assert drawn.gray[0, 20, 32, 0] > 1.05 * drawn.gray[0, 40, 32, 0]  # the light is above the camera


def test_shading_normals_include_the_normal_map() -> None:
    ball = PbrBall("normal")
    mesh, _ = unwrap(extract_surface(ball, sample_grid(ball, 40), 250.0, refine_steps=6), 512)
    cameras = views(0.0, 100.0, elevation=20.0)
    drawn = draw_mesh(mesh, bake_textures(ball, mesh, 512), cameras, 1.0)
    rays = cameras.rays()
    inside = drawn.opacity[..., 0] == 1.0
    wanted = 0.5 + 0.5 * bent_normal((rays.origins + rays.directions * drawn.depth)[inside])
    assert float((drawn.normals[inside] - wanted).abs().mean()) < 0.01  # 8 bits, and facets of the mesh
    plain = draw_mesh(mesh, None, cameras, 1.0)
    assert plain.base_color is None and float((plain.normals[inside] - wanted).abs().mean()) > 0.03


def test_baked_textures_know_the_texels_on_the_mesh() -> None:
    textures = bake_textures(MeshShape(cube()), cube(), 96)
    assert textures.covered is not None and textures.clipped_share == 0.0
    # The faces fill 0.64 of the image; a border of about 1.5 texels belongs to them as well.
    assert 0.64 < textures.covered.mean() < (25.6 + 4) * (38.4 + 4) / (32 * 48)
    assert Textures(textures.base_color).clipped_share is None and set(textures.named()) == {"base_color"}


def test_a_mesh_equal_to_the_object_agrees_with_it() -> None:
    mesh = uv_sphere()
    picture, found = check_mesh(Seen(mesh), ColoredSurfaceProduct(colored(mesh), Y_UP), size=64)
    assert found == CheckReport(0.0, 0.0, 0.0, pytest.approx(100.0), None)
    assert picture.shape == (4 * (64 + 14) + 3 * 2, 6 * 64 + 5 * 2, 3)


def test_a_smaller_mesh_is_missing_at_the_border_and_lies_behind() -> None:
    def radius(ball: float) -> float:
        """Radius of the image of a ball, in units of the focal length."""
        return math.tan(math.asin(ball / 3.2))

    big, small = uv_sphere(48, 96, 0.6), uv_sphere(48, 96, 0.5)
    _, found = check_mesh(Seen(big), SurfaceProduct(small, Y_UP), size=128)
    assert found.see_through == pytest.approx(1.0 - (radius(0.5) / radius(0.6)) ** 2, abs=0.01)  # whole pixels
    # Along every ray, the distance is at least the difference of the radii, 0.1.
    assert (found.off_depth, found.behind, found.psnr, found.clipped_texels) == (1.0, 1.0, None, None)
    _, found = check_mesh(Seen(small), ColoredSurfaceProduct(colored(big), Y_UP), size=64)
    assert (found.see_through, found.off_depth, found.behind) == (0.0, 1.0, 0.0)
    assert found.psnr is not None and found.psnr < 25.0


def test_a_hole_is_seen_through() -> None:
    """Without two opposite sides, the cube is missing where both are in line with the camera."""
    box = cube()
    tube = Mesh(box.vertices, box.faces[4:])  # open towards +x and -x
    _, found = check_mesh(Seen(box), SurfaceProduct(tube, Y_UP), size=64)
    assert found.see_through is not None and 0.05 < found.see_through < 0.5
    assert found.behind is not None and found.behind > 0.05 and found.behind == found.off_depth


@pytest.mark.parametrize("sides", [(), (0, 1, 4), (0, 1, 2, 3, 4, 5)])
def test_clipped_texels_are_counted_on_the_mesh_only(sides: tuple[int, ...]) -> None:
    product = painted_cube(*sides)
    assert product.textures.clipped_share == pytest.approx(len(sides) / 6)


def test_an_object_that_cannot_be_rendered_still_has_a_picture() -> None:
    product = painted_cube(0)
    assert not isinstance(MeshShape(product.mesh), HasViews)
    picture, found = check_mesh(MeshShape(product.mesh), product, size=32)
    assert found == CheckReport(clipped_texels=pytest.approx(1 / 6)) and picture.shape[0] == 3 * (32 + 14) + 2 * 2


def test_good_results_pass_and_each_poor_figure_is_a_warning_with_a_setting() -> None:
    assert crease_problems(GOOD) == [] and check_problems(GOOD_CHECK, GOOD) == []
    handles, crumples = crease_problems(POOR)
    assert "24 handles" in handles and "27.8 degrees on average, and 19.5 %" in crumples
    assert all("exporter.threshold" in note for note in (handles, crumples))
    missing, off, unlike, saturated = check_problems(POOR_CHECK, POOR)
    assert missing.endswith(
        "5.0 % of the object's pixels; lower exporter.threshold or lower exporter.min_component_volume"
    )
    assert off.endswith("mostly behind it; lower exporter.threshold")
    assert "PSNR 21.6 dB" in unlike and "exporter.texture_size" in unlike
    assert "100 % of the texels" in saturated and "system.guidance.guidance_scale" in saturated
    in_front = check_problems(dataclasses.replace(POOR_CHECK, behind=0.0), POOR)[1]
    assert in_front.endswith("mostly in front of it; increase exporter.threshold")
    fused = dataclasses.replace(POOR, threshold=None, density_range=(0.0, 100.0))
    assert all(note.endswith("a mesh stage may help") for note in crease_problems(fused))
    missing, off, *_ = check_problems(POOR_CHECK, fused)
    assert "set exporter.threshold to a density" in missing and off.endswith("set exporter.threshold to a density")
    # An object that is a surface has no density.
    surface = dataclasses.replace(POOR, threshold=None, density_range=None)
    notes = [*crease_problems(surface), *check_problems(POOR_CHECK, surface)]
    assert len(notes) == 6 and not any("exporter.threshold" in note for note in notes)


def test_creases_of_a_mesh_of_ones_own_are_not_reported(tmp_path: Path) -> None:
    own = dataclasses.replace(cube(), authored=True)
    result = make_exporter(formats=["stl"], check=True).export(MeshShape(own), tmp_path / "own", "cube")
    assert result.report.notes == () and result.report.mesh.mean_dihedral_deg > 45.0
    result = make_exporter(formats=["stl"], check=True).export(MeshShape(cube()), tmp_path / "made", "cube")
    assert any("crumpled" in note for note in result.report.notes)


def test_every_export_of_a_run_has_the_picture_and_the_figures(tmp_path: Path) -> None:
    config, console = make(tmp_path, exporter={"check": True}), Recorder()
    result = run_training(config, devices="cpu", console=console)
    folder = result.folder / "export"
    report = json.loads((folder / "report.json").read_text())
    assert set(report) >= {"genus", "mean_dihedral_deg", "sharp_edges", "dropped_components"}
    assert set(report) >= {"see_through", "off_depth", "behind", "psnr", "clipped_texels"}
    assert all(0.0 <= report[name] <= 1.0 for name in ("see_through", "off_depth", "behind", "clipped_texels"))
    assert result.paths["mesh check"] == folder / "red-left-blob-check.png" and "check" in report["seconds"]
    assert report["bytes"]["red-left-blob-check.png"] == result.paths["mesh check"].stat().st_size
    assert f"genus {report['genus']}, mean dihedral angle" in console.text
    assert f"PSNR {report['psnr']:.1f} dB, clipped texels" in console.text

    picture = np.asarray(Image.open(result.paths["mesh check"]))
    assert picture.shape == (4 * (SIZE + 14) + 3 * 2, 6 * SIZE + 5 * 2, 3)
    for row in range(4):
        strip = picture[row * (SIZE + 16) : row * (SIZE + 16) + 14]
        assert strip[:, :SIZE].min() < 100 and (strip[:, SIZE:] == 255).all()  # one label, above the first view

"""Parts that no training camera sees have the colors of the seen parts around them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from shared.exports import make_exporter
from shared.pbr_shapes import MeshShape, uv_sphere
from shared.surface_scenes import cube
from shared.tiny_runs import Recorder, make
from torch import Tensor

from scoredist3d.cameras import Cameras
from scoredist3d.data.random_camera import RandomCamera
from scoredist3d.export.bake import Textures, bake_textures
from scoredist3d.export.unseen import SeenSurface, seen_surface
from scoredist3d.meshes.exportable import SurfaceChannels
from scoredist3d.meshes.mesh import Mesh
from scoredist3d.meshes.texels import rasterize, texel_points
from scoredist3d.training.run import run_training

BLUE = (0.1, 0.2, 0.8)
SIZE = 192


def noise(points: Tensor) -> Tensor:
    """Different at every point, in [0, 1]."""
    return (torch.sin(points @ points.new_tensor([[12.9, 78.2, 37.7]]).T * 437.5) * 43758.5).remainder(1.0)


class NoisyBelow(MeshShape):
    """Blue above z = -0.45, noise below."""

    def __init__(self, mesh: Mesh, cameras: Cameras | None = None) -> None:
        super().__init__(mesh)
        self.cameras = cameras

    def channels(self, points: Tensor, normals: Tensor | None = None) -> SurfaceChannels:
        low, random = points[:, 2:] < -0.45, noise(points)
        color = torch.where(low, random, points.new_tensor(BLUE))
        roughness = torch.where(low, random, 0.5)[:, 0]
        # Unit vectors that are not the normals of the surface.
        bent = torch.nn.functional.normalize(points + torch.where(low, 0.3, 0.1), dim=1)
        return SurfaceChannels(color, roughness=roughness, normal=bent, occlusion=random[:, 0])

    def training_cameras(self, count: int) -> Cameras | None:
        return None if self.cameras is None else self.cameras[torch.arange(count) % len(self.cameras)]


def views(**options: Any) -> Cameras:
    return RandomCamera(RandomCamera.Config(**options)).spread(80)


def bake(mesh: Mesh, seen: SeenSurface | None) -> Textures:
    return bake_textures(NoisyBelow(mesh), mesh, SIZE, seen=seen)


def heights(mesh: Mesh) -> np.ndarray:
    """(S, S) heights of the covered texels; infinite elsewhere."""
    texels = rasterize(mesh, SIZE)
    result = np.full(SIZE * SIZE, np.inf)
    result[texels.index] = texel_points(mesh, texels)[:, 2]
    return result.reshape(SIZE, SIZE)


def test_the_unseen_underside_has_the_color_of_the_seen_part_and_the_rest_is_unchanged() -> None:
    mesh = uv_sphere()
    seen = seen_surface(mesh, views(elevation_range=(30.0, 60.0)))
    before, after, height = bake(mesh, None), bake(mesh, seen), heights(mesh)
    assert seen is not None and after.filled is not None and 0.15 < after.filled < 0.4 and before.filled is None
    low, high = height < -0.5, (height > -0.1) & np.isfinite(height)
    assert before.base_color[low].std(axis=0).min() > 40
    blue, rough = np.rint(255 * np.array(BLUE)), 128
    assert np.abs(after.base_color[low] - blue).max() <= 4
    assert after.roughness is not None and np.abs(after.roughness[low].astype(int) - rough).max() <= 3
    for name, image in before.named().items():
        np.testing.assert_array_equal(after.named()[name][high], image[high])
    # Occlusion is not optimized.
    np.testing.assert_array_equal(after.named()["occlusion"], before.named()["occlusion"])


def test_unseen_normals_are_those_of_the_surface() -> None:
    mesh = uv_sphere()
    after = bake(mesh, seen_surface(mesh, views(elevation_range=(30.0, 60.0))))
    height = heights(mesh)
    assert after.normal is not None
    assert np.abs(after.normal[height < -0.45].astype(int) - [128, 128, 255]).max() <= 1
    assert np.abs(after.normal[(height > 0) & np.isfinite(height)].astype(int) - [128, 128, 255]).max() > 10


def test_the_values_change_gradually_at_the_border() -> None:
    mesh = uv_sphere()
    seen = seen_surface(mesh, views(elevation_range=(30.0, 60.0)))
    assert seen is not None
    texels = rasterize(mesh, SIZE)
    samples, sheet = seen.at(texels.face, texels.barycentric), np.zeros(SIZE * SIZE)
    sheet[texels.index] = samples.confidence
    column = sheet.reshape(SIZE, SIZE)[:, SIZE // 2]
    assert column[:90].min() == 1 and column[-20:].max() == 0
    assert ((column > 0) & (column < 1)).sum() > 5 and np.abs(np.diff(column)).max() < 0.3


def test_cameras_all_around_change_nothing() -> None:
    mesh = uv_sphere()
    before, after = bake(mesh, None), bake(mesh, seen_surface(mesh, views(elevation_range=(-90.0, 90.0))))
    assert after.filled == 0
    for name, image in before.named().items():
        np.testing.assert_array_equal(after.named()[name], image)


def test_the_result_is_the_same_each_time() -> None:
    first, second = (bake(uv_sphere(), seen_surface(uv_sphere(), views())) for _ in range(2))
    assert first.filled == second.filled
    for name, image in first.named().items():
        np.testing.assert_array_equal(second.named()[name], image)


def test_large_faces_are_examined_in_small_parts_and_creases_separate_seen_from_unseen() -> None:
    """A cube of 12 faces, which a plate above one half of its top hides there."""
    box = cube()
    side = float(box.vertices.max())
    plate = np.array([[-1, -1, 0], [0, -1, 0], [0, 1, 0], [-1, 1, 0]], np.float32) * side + [0, 0, 1.05 * side]
    plate = plate.astype(np.float32)
    faces = np.concatenate([box.faces, len(box.vertices) + np.array([[0, 1, 2], [0, 2, 3]])])
    mesh = Mesh(np.concatenate([box.vertices, plate]), faces)
    seen = seen_surface(mesh, views(elevation_range=(0.0, 60.0)))
    assert seen is not None
    a, b, c = (box.vertices[box.faces[:, k]] for k in range(3))
    normal = np.cross(b - a, c - a)
    up, down = np.flatnonzero(normal[:, 2] > 0.1), np.flatnonzero(normal[:, 2] < -0.1)
    level = np.flatnonzero(np.abs(normal[:, 2]) < 0.1)
    confidence = seen.confidence.min(axis=1), seen.confidence.max(axis=1)
    assert confidence[0][np.isin(seen.lattice.face, level)].min() == 1
    assert confidence[1][np.isin(seen.lattice.face, down)].max() == 0
    x, y, _ = seen.lattice.nodes[seen.lattice.triangles].mean(axis=1).T / side
    top = np.isin(seen.lattice.face, up)
    assert confidence[0][top & (x > 0.2)].min() == 1
    assert confidence[1][top & (np.abs(x + 0.5) < 0.2) & (np.abs(y) < 0.5)].max() == 0


def test_both_sides_of_an_open_surface_are_seen_from_one() -> None:
    square = Mesh(
        np.array([[-1, -1, 0], [-1, 1, 0], [1, 1, 0], [1, -1, 0]], np.float32) / 2, np.array([[0, 1, 2], [0, 2, 3]])
    )
    above = views(elevation_range=(30.0, 60.0))
    assert seen_surface(square, above) is None  # its faces look down
    seen = seen_surface(square, above, both_sides=True)
    assert seen is not None and seen.confidence.min() == 1


def test_close_views_count_as_much_as_distant_ones() -> None:
    """Cameras that see half of the object in each view."""
    ball = uv_sphere()
    close = RandomCamera.Config(distance_range=(2.0, 2.0), fovy_range=(20.0, 20.0), target_jitter=0.2)
    near, far = seen_surface(ball, RandomCamera(close).spread(80)), seen_surface(ball, views())
    assert near is not None and far is not None
    level = np.abs(ball.vertices[ball.faces][..., 2]).max(axis=1) < 0.2
    walls = np.isin(near.lattice.face, np.flatnonzero(level))
    assert np.quantile(near.confidence[walls], 0.05) == 1 and far.confidence[walls].min() == 1


@pytest.mark.parametrize("authored", [False, True])
@pytest.mark.parametrize("option", ["auto", True, False])
def test_the_option_and_the_report(authored: bool, option: Any, tmp_path: Path) -> None:
    mesh = uv_sphere()
    shape = NoisyBelow(Mesh(mesh.vertices, mesh.faces, mesh.uvs, mesh.uv_faces, authored=authored), views())
    exporter = make_exporter(max_faces=None, fill_unseen=option)
    report = exporter.export(shape, tmp_path, "ball").report
    assert report.mesh is not None
    if option is True or (option == "auto" and not authored):
        assert report.to_dict()["filled_texels"] == report.mesh.filled_texels > 0.02
        assert "% of the texels unseen and filled" in report.describe()
    else:
        assert report.mesh.filled_texels is None and "unseen" not in report.describe()


def test_vertex_colors_are_filled_too(tmp_path: Path) -> None:
    import trimesh

    cameras = views(elevation_range=(30.0, 60.0))
    make_exporter(formats=["ply"], max_faces=None).export(NoisyBelow(uv_sphere(), cameras), tmp_path, "ball")
    loaded: Any = trimesh.load(tmp_path / "ball.ply", process=False)
    low = loaded.vertices[:, 1] < -0.5
    assert np.abs(loaded.visual.vertex_colors[low, :3] - np.rint(255 * np.array(BLUE))).max() <= 4


def test_without_known_cameras_nothing_is_filled(tmp_path: Path) -> None:
    report = make_exporter(max_faces=None).export(NoisyBelow(uv_sphere()), tmp_path, "ball").report
    assert report.mesh is not None and report.mesh.filled_texels is None


def test_a_run_reports_the_share_for_its_own_cameras(tmp_path: Path) -> None:
    config = make(tmp_path, data={"elevation_range": [20.0, 60.0]})
    run_training(config, devices="cpu", console=Recorder())
    (report,) = tmp_path.rglob("report.json")
    assert json.loads(report.read_text())["filled_texels"] > 0

"""Camera paths: known values, and the projection of a point by the formulas of instant-ngp."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

from scoredist3d.cameras import Cameras, orbit
from scoredist3d.config.experiment import TurntableConfig
from scoredist3d.export.camera_path import camera_path, write_camera_path
from scoredist3d.export.images import save_png
from scoredist3d.training.folder import RunFolder
from scoredist3d.training.outputs import write_video


@pytest.fixture
def cameras():
    angles = [torch.tensor(degrees) for degrees in ([0.0, 90.0], [20.0, 20.0])]
    return orbit(*angles, torch.full((2,), 3.0), torch.full((2,), 40.0), height=60, width=80)


def test_the_file_projects_points_as_our_cameras_do(cameras, tmp_path):
    data = json.loads(write_camera_path(tmp_path / "deep" / "path.json", cameras, 24.0).read_text())
    assert len(data["frames"]) == 2 and (data["w"], data["h"]) == (80, 60)
    assert data["frames"][1]["time"] == pytest.approx(1 / 24) and data["frames"][0]["fovy"] == pytest.approx(
        math.radians(40)
    )
    point = torch.tensor([0.3, -0.2, 0.4, 1.0], dtype=torch.float64)
    rays = cameras.rays()
    for index, frame in enumerate(data["frames"]):
        assert frame["c2w"] == frame["transform_matrix"]
        # The convention of transforms.json in instant-ngp: view along -z, y up, pixels from the top left.
        local = torch.linalg.inv(torch.tensor(frame["transform_matrix"], dtype=torch.float64)) @ point
        x = data["cx"] + data["fl_x"] * float(local[0] / -local[2])
        y = data["cy"] - data["fl_y"] * float(local[1] / -local[2])
        ray = rays.directions[index, int(y), int(x)]
        seen = torch.nn.functional.normalize(point[:3].float() - rays.origins[index, 0, 0], dim=0)
        assert float(ray @ seen) > math.cos(data["camera_angle_y"] / 60)
    assert data["camera_angle_x"] == pytest.approx(2 * math.atan(80 / 60 * math.tan(math.radians(20))))
    position = [row[3] for row in data["frames"][0]["c2w"][:3]]
    assert position == pytest.approx([3 * math.cos(math.radians(20)), 0.0, 3 * math.sin(math.radians(20))], abs=1e-6)


def test_impossible_paths_are_errors(cameras):
    with pytest.raises(ValueError, match="at least one camera"):
        camera_path(cameras[:0], 30)
    with pytest.raises(ValueError, match="fps must be positive"):
        camera_path(cameras, 0)


def test_frames_are_jsonable_and_complete(cameras):
    data = camera_path(cameras, 30)
    assert isinstance(cameras, Cameras) and set(data["frames"][0]) == {
        "time", "c2w", "fovy", "width", "height", "transform_matrix",
    }  # fmt: skip


class TurningSystem:
    """One scene and the cameras around it."""

    def __init__(self, cameras):
        self.cameras = cameras

    def list_scenes(self):
        return [self]

    def evaluation_cameras(self, azimuths, elevation, height, width):
        return self.cameras


def gray_frames(scene, cameras):
    for level in torch.linspace(0, 1, len(cameras)):
        yield SimpleNamespace(rgb=level.expand(1, 15, 17, 3))


@pytest.mark.parametrize("kind", ["gif", "webp"])
def test_a_turntable_comes_with_its_cameras(cameras, tmp_path, kind, monkeypatch):
    monkeypatch.setattr("scoredist3d.visualization.turntable.render_views", gray_frames)
    test = TurntableConfig(frames=2, fps=12, format=kind, height=15, width=17)
    assert test.validate() == [] and TurntableConfig(height=15).validate() != []
    folder = RunFolder(tmp_path / "run")
    folder.images.mkdir(parents=True)
    done = []
    path, replaced = write_video(TurningSystem(cameras), SimpleNamespace(test=test), folder, done.append)
    assert path == folder.videos / f"turntable.{kind}" and replaced == "" and done[-1] == 1.0
    assert len(json.loads((folder.videos / "turntable-cameras.json").read_text())["frames"]) == 2
    elsewhere = RunFolder(tmp_path / "images only")
    save_png(torch.zeros(15, 17, 3), elsewhere.images / "step-000001.png")
    path, _ = write_video(object(), SimpleNamespace(test=test), elsewhere, done.append)
    assert path.exists() and not list(elsewhere.videos.glob("*.json"))

"""The camera embedding: MVDream's convention, and the visible height as the length of the translation."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from scoredist3d.cameras import Cameras, orbit
from scoredist3d.priors import camera_embedding
from scoredist3d.priors.diffusers_loading import PipelineSource, PriorError
from scoredist3d.priors.diffusers_prior import DiffusersPrior
from scoredist3d.priors.model_files import EMBEDDED_FOLDER


def cameras(distance: float, fovy: float) -> Cameras:
    angles = torch.tensor([10.0, 130.0, 250.0])
    return orbit(angles, angles / 5, torch.full((3,), distance), torch.full((3,), fovy), 8, 8)


def test_without_a_reference_the_distance_does_not_matter() -> None:
    near, far = camera_embedding(cameras(1.0, 60.0)), camera_embedding(cameras(9.0, 20.0))
    torch.testing.assert_close(near, far)
    torch.testing.assert_close(near.view(3, 4, 4)[:, :3, 3].norm(dim=-1), torch.ones(3))


def test_with_a_reference_the_length_is_the_visible_height() -> None:
    reference = 3.2 * math.tan(math.radians(20))
    standard = camera_embedding(cameras(3.2, 40.0), reference)
    torch.testing.assert_close(standard, camera_embedding(cameras(3.2, 40.0)))
    # Half the distance, and a field of view with half the tangent, both show half the height.
    narrow = math.degrees(2 * math.atan(math.tan(math.radians(20)) / 2))
    for close in (cameras(1.6, 40.0), cameras(3.2, narrow)):
        embedding = camera_embedding(close, reference)
        torch.testing.assert_close(embedding.view(3, 4, 4)[:, :3, 3], 0.5 * standard.view(3, 4, 4)[:, :3, 3])
        torch.testing.assert_close(embedding.view(3, 4, 4)[:, :, :3], standard.view(3, 4, 4)[:, :, :3])


def linked(folder: Path) -> Path:
    """A copy of the embedded prior whose networks are links."""
    folder.mkdir()
    for path in EMBEDDED_FOLDER.iterdir():
        if path.is_dir():
            (folder / path.name).symlink_to(path)
        else:
            shutil.copy(path, folder)
    return folder


def test_a_prior_reads_its_reference_from_camera_json(tmp_path: Path) -> None:
    folder = linked(tmp_path / "prior")
    (folder / "camera.json").write_text(json.dumps({"reference_extent": 1.25}))
    prior = DiffusersPrior(DiffusersPrior.Config(pretrained_model_name_or_path=str(folder)))
    views = cameras(2.0, 50.0)
    found = prior.camera_condition(views, 3)
    assert found is not None
    torch.testing.assert_close(found, camera_embedding(views, 1.25))


@pytest.mark.parametrize("content", ["[]", "{}", '{"reference_extent": 0}', '{"reference_extent": "far"}'])
def test_a_malformed_reference_is_reported(content: str, tmp_path: Path) -> None:
    folder = linked(tmp_path / "prior")
    (folder / "camera.json").write_text(content)
    with pytest.raises(PriorError, match=r"camera\.json must be .*reference_extent.* positive number"):
        PipelineSource.open(str(folder)).camera_extent()

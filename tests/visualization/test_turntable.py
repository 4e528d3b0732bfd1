"""Final videos: animations of preview images. Turntables are tested with the systems and the camera paths."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from scoredist3d.config.experiment import TurntableConfig
from scoredist3d.export.images import save_png
from scoredist3d.visualization.turntable import final_video, video_name


@pytest.mark.parametrize(("least", "length"), [(1, 3), (4, 6), (9, 9)])
def test_snapshots_are_repeated_equally_to_the_least_length(tmp_path: Path, least: int, length: int) -> None:
    levels = (0.0, 0.4, 1.0)
    paths = [save_png(torch.full((4, 6, 3), level), tmp_path / f"step-{i}.png") for i, level in enumerate(levels)]
    system: Any = object()
    assert video_name(system) == "optimisation"
    video = final_video(system, TurntableConfig(frames=least), paths)
    frames = list(video.frames)
    assert video.cameras is None and {tuple(frame.shape) for frame in frames} == {(4, 6, 3)}
    expected = [level for level in levels for _ in range(length // 3)]
    assert [float(frame.mean()) for frame in frames] == pytest.approx(expected, abs=1e-6)


def test_a_turntable_is_one_full_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[float]] = []

    class OneScene:
        def list_scenes(self) -> list[Any]:
            return []

        def evaluation_cameras(self, azimuths: list[float], elevation: float, height: int, width: int) -> str:
            asked.append(azimuths)
            return "cameras"

    system: Any = OneScene()
    assert video_name(system) == "turntable"
    assert final_video(system, TurntableConfig(frames=4), []).cameras == "cameras"
    assert asked == [[0.0, 90.0, 180.0, 270.0]]

"""Runs whose Gaussians come and go: a checkpoint holds what the step after it needs."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from shared.tiny_runs import Recorder, make, plain

from scoredist3d.config.validation import validate
from scoredist3d.materials import ShadingInputs
from scoredist3d.systems.base import System
from scoredist3d.training.checkpoint import read_checkpoint
from scoredist3d.training.distributed import Devices
from scoredist3d.training.fit import RankContext, begin, build_system, fit
from scoredist3d.training.folder import RunFolder
from scoredist3d.training.interrupt import InterruptGuard

PLACE = RankContext(Devices.parse("cpu"))
DENSIFY = {"start": 2, "every": 2, "grad_threshold": 0.0, "grow_fraction": 0.2, "opacity_reset_every": 5}
BLOCKS = {
    "geometry": {"type": "gaussians", "num_points": 40, "densify": DENSIFY},
    "material": {"type": "spherical-harmonics", "degree": 2, "degree_every": 3},
    "renderer": {"type": "gaussian-splatting"},
    "loss": {},
}


def trained(folder: Path, steps: int, resume: Path | None = None) -> tuple[System, dict[str, Any]]:
    """The system and the checkpoint after ``steps``, without previews and exports."""
    raw = plain(folder, trainer={"max_steps": steps}, preview={"every_n_steps": 0})
    raw["system"] |= BLOCKS
    config, run = validate(raw), RunFolder(folder)
    folder.mkdir(exist_ok=True)
    system = build_system(config, PLACE)
    with InterruptGuard(print) as guard:
        fit(system, config, run, PLACE, Recorder(), guard, resume=resume)
    return system, read_checkpoint(run.last_checkpoint)


@pytest.mark.parametrize("stop", [4, 5])
def test_a_run_resumed_around_a_densification_is_the_uninterrupted_one(tmp_path: Path, stop: int) -> None:
    """Stopped right after steps that end in a densification (4) and in a reset of the opacities (5)."""
    system, whole = trained(tmp_path / "whole", 7)
    assert len(system.geometry.means) > 40  # type: ignore[operator, union-attr, arg-type]
    trained(tmp_path / "half", stop)
    _, resumed = trained(tmp_path / "half", 7, resume=tmp_path / "half" / "ckpts" / "last.ckpt")
    first, second = whole["state_dict"], resumed["state_dict"]
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    one, two = (checkpoint["optimizer_states"][0]["state"] for checkpoint in (whole, resumed))
    assert all(torch.equal(one[index]["exp_avg"], two[index]["exp_avg"]) for index in one)


@pytest.mark.parametrize(
    ("devices", "trainer", "said"),
    [
        ("cpu:2", {}, r"^system\.geometry: .* several devices .*densify\.enabled=false"),
        ("cpu", {"accumulate": 2}, r"^trainer\.accumulate: .* data\.batch_size .*densify\.enabled=false"),
        ("cpu", {"precision": "16-mixed"}, r"^trainer\.precision: 16-mixed scales .*densify\.enabled=false"),
    ],
)
def test_growth_that_would_go_wrong_is_refused(tmp_path: Path, devices: str, trainer: Any, said: str) -> None:
    raw = plain(tmp_path, trainer=trainer)
    raw["system"] |= BLOCKS
    config, place = validate(raw), RankContext(Devices.parse(devices))
    system = build_system(config, PLACE)
    with pytest.raises(ValueError, match=said):
        begin(system, config, place, resumed=False)


def test_gaussians_start_from_a_volume_and_from_other_gaussians(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    volume = build_system(make(tmp_path), PLACE)
    raw = plain(tmp_path)
    raw["system"] |= BLOCKS | {"conversion": {"resolution": 24}}
    config = validate(raw)
    clouds: list[Any] = [build_system(config, PLACE) for _ in range(2)]
    with caplog.at_level(logging.INFO):
        clouds[0].init_from(volume.state_dict(), make(tmp_path).system)
    assert "40 Gaussians on its surface" in caplog.text
    cloud = clouds[0].geometry
    assert (cloud().opacities > 0.5).all() and cloud.means.norm(dim=-1).std() < 0.1
    wanted = clouds[0].scenes[0].material.channels(ShadingInputs(cloud.features)).base_color
    seen = volume.shapes()[0].channels(cloud.means.detach()).base_color
    torch.testing.assert_close(wanted, seen, atol=2e-3, rtol=0)
    with torch.no_grad():
        cloud.load_state_dict({name: torch.cat([value, value]) for name, value in cloud.state_dict().items()})
    clouds[1].init_from(clouds[0].state_dict(), config.system)
    assert torch.equal(clouds[1].geometry.means, cloud.means) and len(cloud) == 80

"""Whole runs with space carving: resumed runs, and runs of several processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from shared.carving_scenes import carving_block, estimated_views
from shared.tiny_runs import Recorder, plain

from scoredist3d import registry
from scoredist3d.cameras import Cameras
from scoredist3d.config.experiment import ExperimentConfig
from scoredist3d.config.validation import validate
from scoredist3d.seeding import Rng
from scoredist3d.training.checkpoint import read_checkpoint
from scoredist3d.training.run import run_training

SDF = "scenes.0.geometry.sdf"


def config(folder: Path, steps: int, **changes: Any) -> ExperimentConfig:
    block = plain(folder, trainer={"max_steps": steps}, test={"enabled": False}, exporter={"formats": ["stl"]})
    block["system"] = carving_block(folder / "estimator", **changes)
    block["data"] = {**block["data"], "num_views": 8}
    return validate(block)


def weights(folder: Path) -> dict[str, Any]:
    state: dict[str, Any] = read_checkpoint(folder / "ckpts" / "last.ckpt")["state_dict"]
    return state


def test_a_resumed_run_carves_by_the_targets_of_the_checkpoint(tmp_path: Path) -> None:
    """The run stops before the step in which the surface is carved, and continues with the kept targets."""

    def run(steps: int, resume: Path | None = None) -> tuple[Path, dict[str, Any]]:
        chosen = config(tmp_path, steps, guidance={"carve_steps": [3]}, optimizer={"lr": 1e-3})
        done = run_training(chosen, devices="cpu", resume=resume, console=Recorder())
        return done.folder, weights(done.folder)

    _, whole = run(4)
    half, before = run(3)
    _, resumed = run(4, half)
    assert len(before["guidance.stored._extra_state"]["fovys"]) == 6
    # The rate of 0.001 alone moves a distance by at most 0.004 in four steps.
    assert 0.5 * (before[SDF] < 0).sum() > (whole[SDF] < 0).sum() > 0
    assert ((before[SDF] < 0) & (whole[SDF] > 0.05)).sum() > 20
    assert all(torch.equal(whole[key], resumed[key]) for key in whole if isinstance(whole[key], torch.Tensor))


@pytest.mark.slow
def test_two_processes_carve_by_the_targets_of_both(tmp_path: Path) -> None:
    """Nothing is learned, so carving alone changes the surface.

    The run itself checks at every checkpoint that the weights of the ranks are equal.
    """
    chosen = config(tmp_path, 3, optimizer={"lr": 0.0})
    found = weights(run_training(chosen, devices="cpu:2", console=Recorder()).folder)
    views = [registry.build(chosen.data, world_size=4).sample(0, Rng(rank=rank)) for rank in range(4)]
    geometry, alone = (registry.build(chosen.system.geometry) for _ in range(2))
    for shape, cameras in ((geometry, Cameras.cat(views)), (alone, Cameras.cat(views[::2]))):
        assert shape.carve(shape.carving_evidence(estimated_views(cameras.with_size(8, 8)))) > 20
    torch.testing.assert_close(found[SDF], geometry.sdf.detach(), rtol=0, atol=1e-5)
    assert not torch.allclose(alone.sdf, geometry.sdf, rtol=0, atol=1e-2)  # the targets of one rank give another shape

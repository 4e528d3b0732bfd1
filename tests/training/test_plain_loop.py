"""Training in Python without a run folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from shared import tiny_runs

import scoredist3d
from scoredist3d.guidance.core.checks import NonFiniteError
from scoredist3d.seeding import Rng
from scoredist3d.systems.text_to_2d import TextTo2D
from scoredist3d.training import lightning_module  # noqa: F401  Lightning draws random numbers when it is imported.
from scoredist3d.training.run import run_training


@pytest.mark.parametrize("name", ["text-to-3d", "text-to-2d"])
def test_fit_gives_the_numbers_of_a_launched_run(name: str, tmp_path: Path) -> None:
    config = tiny_runs.make(tmp_path, name, seed=3)
    launched = run_training(config, devices="cpu", console=tiny_runs.Recorder())
    expected = launched.system.state_dict()
    system = scoredist3d.build(
        config.system,
        prior=scoredist3d.build(config.prior),
        prompt=config.prompt,
        cameras=scoredist3d.build(config.data),
        rng=Rng(3),
    )
    scoredist3d.fit(system, steps=config.trainer.max_steps, seed=3)
    actual = system.state_dict()
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(actual[key], value), key


def test_a_loss_that_is_not_finite_stops_before_the_update() -> None:
    config = tiny_runs.make(Path("unused"), "text-to-2d")
    system = scoredist3d.build(TextTo2D.Config(), prior=scoredist3d.build(config.prior), prompt="red left blob")
    with torch.no_grad():
        system.canvas.values.fill_(float("nan"))
    with pytest.raises(NonFiniteError):
        scoredist3d.fit(system, steps=1)

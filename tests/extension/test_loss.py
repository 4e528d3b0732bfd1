"""A new loss takes one file of at most 15 lines. YAML selects and schedules it; it is trained and logged."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from shared.custom_packages import forget_custom
from shared.tiny_runs import plain

from scoredist3d import cli, registry
from scoredist3d.config.validation import parse_component
from scoredist3d.custom import load_custom
from scoredist3d.renderers import Render
from scoredist3d.seeding import Rng
from scoredist3d.training.fit import import_lightning

import_lightning()  # its first import draws from the global stream of `random`

SOURCE = Path(__file__).with_name("halo_loss.py")
ROOT = Path(__file__).resolve().parents[2]
MAX_LINES = 15


@pytest.fixture
def halo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of user packages with the loss, which is registered for one test only."""
    registry.names("loss")
    monkeypatch.setitem(registry._entries, "loss", dict(registry._entries["loss"]))
    folder = tmp_path / "mine"
    folder.mkdir()
    shutil.copy(SOURCE, folder)
    yield folder
    forget_custom()


def train(folder: Path, custom: Path, losses: dict[str, Any]) -> list[dict[str, str]]:
    """Train ten steps with the command line; returns the rows of metrics.csv, one per step."""
    config = plain(folder, trainer={"max_steps": 10}, log={"every_n_steps": 1}, test={"frames": 1, "format": "gif"})
    config["system"]["loss"] = losses
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    arguments = ["--config", str(folder / "config.yaml"), "--train", "--gpu", "cpu", "--custom", str(custom)]
    assert cli.main(arguments) in (cli.OK, cli.RUN_FAILED)  # the export fails if the scene is empty
    (metrics,) = folder.rglob("metrics.csv")
    with metrics.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_the_loss_fits_the_limit() -> None:
    assert len(SOURCE.read_text(encoding="utf-8").splitlines()) <= MAX_LINES


def test_the_loss_is_that_of_the_documentation() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert SOURCE.read_text(encoding="utf-8") in page


def test_value_and_gradient(halo: Path) -> None:
    assert load_custom([halo]) == []
    loss = registry.build(parse_component("loss", {"type": "halo", "limit": 0.5}))
    opacity = torch.tensor([0.0, 0.2, 0.4, 0.8], requires_grad=True)
    value = loss(Render(opacity, opacity, opacity, opacity), None, 0, Rng())
    assert value.item() == pytest.approx(0.15)
    value.backward()
    assert opacity.grad is not None and opacity.grad.tolist() == [0.25, 0.25, 0.25, 0.0]


def test_yaml_selects_and_schedules_it_and_it_is_logged_and_trained(halo: Path, tmp_path: Path) -> None:
    weight = {"from": 0.0, "to": 40.0, "end": 8}
    with_loss = train(tmp_path / "with", halo, {"halo": {"limit": 1.0, "weight": weight}})
    without = train(tmp_path / "without", halo, {})
    # The weight of the first step is 0, so the loss is neither computed nor logged there.
    assert with_loss[0]["loss/halo"] == with_loss[0]["weighted/halo"] == "" and "loss/halo" not in without[0]
    for row in with_loss[1:]:
        step = int(row["step"]) - 1
        expected = min(40.0, 40.0 * step / 8) * float(row["loss/halo"])
        assert float(row["weighted/halo"]) == pytest.approx(expected, rel=1e-6)
    # The same random streams with and without the loss: a lower opacity is its effect.
    assert float(with_loss[0]["opacity"]) == float(without[0]["opacity"])
    assert float(with_loss[-1]["opacity"]) < float(without[-1]["opacity"])


def test_it_is_unknown_again() -> None:
    assert "halo" not in registry.names("loss")

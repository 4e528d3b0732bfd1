"""The files and commands of docs/add-a-method.md work in an empty folder."""

from __future__ import annotations

import importlib.util
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from shared.custom_packages import forget_custom

from scoredist3d import cli, registry
from scoredist3d.custom import load_custom
from scoredist3d.priors import CFGConditions, Conditioning, Prediction
from scoredist3d.priors.analytic import GaussianMixturePrior
from scoredist3d.seeding import Rng

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "add-a-method.md"
TEXT = PAGE.read_text(encoding="utf-8")
NAME = "antithetic-sds"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, flags=re.DOTALL)


METHOD, TEST = blocks("python")
(FRAGMENT,) = blocks("yaml")
COMMANDS = [line for block in blocks("sh") for line in block.splitlines()]


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that serves as the checkout and contains the page's files."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("scoredist3d.custom.checkout_root", lambda: tmp_path)
    (tmp_path / "custom").mkdir()
    (tmp_path / "custom" / "antithetic.py").write_text(METHOD, encoding="utf-8")
    (tmp_path / "antithetic.yaml").write_text(FRAGMENT, encoding="utf-8")
    (tmp_path / "test_antithetic.py").write_text(TEST, encoding="utf-8")
    yield tmp_path
    registry._entries["guidance"].pop(NAME, None)
    forget_custom()


def run(command: str, *further: str) -> int:
    program, script, *arguments = shlex.split(command)
    assert (program, script) == ("python", "launch.py")
    return cli.main([*arguments, *further])


def test_a_complete_method_is_at_most_40_lines() -> None:
    """A complete new guidance takes at most 40 lines, imports and blank lines included."""
    assert len(METHOD.splitlines()) <= 40


def test_it_is_listed_and_described(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = [command for command in COMMANDS if "--train" not in command]
    assert len(shown) == 2
    for command in shown:
        assert run(command) == cli.OK
        captured = capsys.readouterr()
        assert NAME in captured.out and captured.err == ""
    assert "pairs" in captured.out


def test_its_commands_train(workplace: Path) -> None:
    images, scene = [command for command in COMMANDS if "--train" in command]
    assert run(images, "--gpu", "cpu", "trainer.max_steps=3") == cli.OK
    (metrics,) = (workplace / "outputs").rglob("metrics.csv")
    assert f"type: {NAME}" in (metrics.parent / "configs" / "resolved.yaml").read_text(encoding="utf-8")
    assert metrics.read_text(encoding="utf-8").splitlines()[-1].startswith("3,")
    assert run(scene, "--dry-run") == cli.OK


def test_its_own_test_passes(workplace: Path) -> None:
    spec: Any = importlib.util.spec_from_file_location("test_antithetic", workplace / "test_antithetic.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    tests = [value for name, value in vars(module).items() if name.startswith("test_")]
    assert len(tests) == 1
    tests[0]()


class Counting(GaussianMixturePrior):
    """Prior that counts its evaluations."""

    evaluations = 0

    def predict(self, x_t: torch.Tensor, t: torch.Tensor, conditioning: Conditioning) -> Prediction:
        self.evaluations += len(x_t)
        return super().predict(x_t, t, conditioning)


@pytest.mark.parametrize(("pairs", "scale"), [(1, 1.0), (3, 5.0)])
def test_the_declared_nfe_is_the_counted_one(workplace: Path, pairs: int, scale: float) -> None:
    assert load_custom([Path("custom")]) == []
    method: Any = registry.lookup("guidance", NAME).cls
    prior = Counting(GaussianMixturePrior.Config(image_size=8))
    guidance = method(method.Config(pairs=pairs, guidance_scale=scale), prior=prior)
    conditions, z = CFGConditions(prior.embed(["red"]), prior.embed([""])), torch.zeros(2, 3, 8, 8, requires_grad=True)
    guidance(z, conditions, 0, Rng())
    assert prior.evaluations == 2 * guidance.nfe(conditions, guidance.begin(z, 0, Rng())).prior


def test_links_of_the_page_exist() -> None:
    targets = [target for target in re.findall(r"\]\(([^)#]+)\)", TEXT) if "://" not in target]
    assert targets and all((PAGE.parent / target).exists() for target in targets)

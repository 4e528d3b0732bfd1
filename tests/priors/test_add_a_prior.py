"""The code of docs/add-a-prior.md is that of the family, and works."""

from __future__ import annotations

import importlib
import importlib.util
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from shared.family_checks import load
from shared.pixart_folder import build_pixart

from scoredist3d.priors import diffusers_prior, pixart_sigma
from scoredist3d.priors.pipeline_family import SUPPORTED

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "add-a-prior.md").read_text(encoding="utf-8")
FAMILY, TEST = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
MOST_LINES = 120


def module(name: str, code: str, folder: Path) -> ModuleType:
    """The module of a code block."""
    path = folder / f"{name}.py"
    path.write_text(code, encoding="utf-8")
    spec: Any = importlib.util.spec_from_file_location(name, path)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@pytest.fixture
def family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The page's family, in place of the package's."""
    loaded = module("pixart_of_the_page", FAMILY, tmp_path)
    others = tuple(each for each in diffusers_prior.FAMILIES if each is not pixart_sigma.PIXART_SIGMA)
    assert len(others) == len(diffusers_prior.FAMILIES) - 1
    monkeypatch.setattr(diffusers_prior, "FAMILIES", (*others, loaded.PIXART_SIGMA))
    return loaded


def test_the_page_shows_the_file() -> None:
    assert Path(str(pixart_sigma.__file__)).read_text(encoding="utf-8") == FAMILY
    assert len(FAMILY.splitlines()) <= MOST_LINES and "PixArt-Sigma" in SUPPORTED


def test_its_family_loads_a_folder(family: ModuleType, tmp_path: Path) -> None:
    prior = load(build_pixart(tmp_path / "folder"))
    assert type(prior.denoiser) is family.MaskedTransformer


def test_its_own_test_passes(family: ModuleType, tmp_path: Path) -> None:
    tests = [
        value for name, value in vars(module("test_of_the_page", TEST, tmp_path)).items() if name.startswith("test_")
    ]
    assert len(tests) == 1
    tests[0](tmp_path / "toy")


def test_every_family_is_short_and_on_the_page_of_priors() -> None:
    page = (ROOT / "docs" / "priors.md").read_text(encoding="utf-8")
    for family in diffusers_prior.FAMILIES:
        path = Path(str(importlib.import_module(family.denoiser.__module__).__file__))
        assert len(path.read_text(encoding="utf-8").splitlines()) <= MOST_LINES
        assert any(f"`{name}`" in page for name in (*family.pipelines, *family.denoiser.networks)), family


def test_links_of_the_page_exist() -> None:
    targets = [target for target in re.findall(r"\]\(([^)#]+)\)", TEXT) if "://" not in target]
    assert targets and all((ROOT / "docs" / target).exists() for target in targets)

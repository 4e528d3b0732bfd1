"""Every test here sees a registry of small stand-ins."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from shared.config_stand_ins import COMPONENTS
from shared.fake_runs import FakeRuns

import scoredist3d.training
from scoredist3d import cli, custom, registry

CONFIG = "name: try\nprompt: ???\nsystem: {guidance: {type: sds, guidance_scale: 7.5}}\n"


@pytest.fixture
def components(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the stand-ins are registered."""
    monkeypatch.setattr(registry, "_entries", {kind: {} for kind in registry.KINDS})
    monkeypatch.setattr(registry, "_loaded", set(registry.KINDS))
    for kind, name, cls in COMPONENTS:
        registry.register(kind, name, summary=f"Stand-in {name}.", arxiv="2209.14988" if name == "sds" else None)(cls)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch, components: None) -> FakeRuns:
    fake = FakeRuns()
    monkeypatch.setitem(sys.modules, "scoredist3d.training.run", fake)  # type: ignore[arg-type]
    monkeypatch.setattr(scoredist3d.training, "run", fake, raising=False)
    return fake


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory with one config and no custom packages."""
    monkeypatch.chdir(tmp_path)
    for module in (cli, custom):
        monkeypatch.setattr(module, "checkout_root", lambda: None)
    monkeypatch.delenv("SCOREDIST3D_DEBUG", raising=False)
    (tmp_path / "c.yaml").write_text(CONFIG)
    return tmp_path

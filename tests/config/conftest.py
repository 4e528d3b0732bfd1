"""Every test here sees a registry of small stand-ins."""

from __future__ import annotations

import pytest
from shared.config_stand_ins import COMPONENTS

from scoredist3d import registry


@pytest.fixture
def components(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the stand-ins are registered."""
    monkeypatch.setattr(registry, "_entries", {kind: {} for kind in registry.KINDS})
    monkeypatch.setattr(registry, "_loaded", set(registry.KINDS))
    for kind, name, cls in COMPONENTS:
        registry.register(kind, name, summary=f"Stand-in {name}.", arxiv="2209.14988" if name == "sds" else None)(cls)

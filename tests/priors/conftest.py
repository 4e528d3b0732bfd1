"""Tiny pipeline folders, built once."""

from collections.abc import Callable
from pathlib import Path

import pytest
from shared.stable_diffusion_folder import build_folder


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A function that builds each variant once; tests that change a folder copy it first."""
    root, built = tmp_path_factory.mktemp("priors"), {}

    def get(*, camera: bool = True, vae: str | None = "kl", out_channels: int | None = None) -> Path:
        key = f"{camera}-{vae}-{out_channels}"
        if key not in built:
            built[key] = build_folder(root / key, camera=camera, vae=vae, out_channels=out_channels)
        return built[key]

    return get

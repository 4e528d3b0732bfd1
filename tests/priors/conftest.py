"""Tiny pipeline folders, built once, and the model of the family that a test file is about."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from shared.family_suite import FamilyCase
from shared.stable_diffusion_folder import build_folder

from scoredist3d.priors.diffusers_prior import DiffusersPrior


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


@pytest.fixture(scope="module")
def family(request: pytest.FixtureRequest) -> FamilyCase:
    """The family that the test file names ``FAMILY``."""
    return request.module.FAMILY


@pytest.fixture(scope="module")
def folder(family: FamilyCase, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of the family."""
    return family.build(tmp_path_factory.mktemp("family"))


@pytest.fixture(scope="module")
def pipeline(family: FamilyCase, folder: Path) -> Any:
    """The pipeline of diffusers that loads the folder."""
    return family.reference(folder)


@pytest.fixture(scope="module")
def prior(family: FamilyCase, folder: Path) -> DiffusersPrior:
    """The prior that loads the folder."""
    return family.load(folder)

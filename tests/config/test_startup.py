"""What is imported at start-up: the package and the command line load no heavy library."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HANG = 600.0  # seconds; not a measure of speed, but a limit for a test that hangs
HEAVY = {"torch", "numpy", "yaml", "diffusers", "transformers", "pytorch_lightning"}


def loaded_by(code: str) -> set[str]:
    """Which of the heavy packages are loaded after running ``code`` in a fresh interpreter."""
    code += f"\nimport sys; print(sorted({HEAVY!r} & set(sys.modules)), file=sys.stderr)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, timeout=HANG, check=True, capture_output=True, text=True
    )
    return set(ast.literal_eval(done.stderr.splitlines()[-1]))


def test_importing_the_package_is_light() -> None:
    assert loaded_by("import scoredist3d") == set()


@pytest.mark.parametrize("arguments", [["--list"], ["--help"]], ids=" ".join)
def test_the_command_line_itself_needs_no_torch(arguments: list[str]) -> None:
    assert "torch" not in loaded_by(f"from scoredist3d.cli import main\ntry: main({arguments!r})\nexcept SystemExit: 0")


def test_a_dry_run_loads_no_trainer_and_no_pipeline() -> None:
    """Checking a configuration needs the components' classes, but not what only training needs."""
    arguments = ["--config", "configs/quickstart.yaml", "--train", "--dry-run", "prompt=a red mug"]
    loaded = loaded_by(f"from scoredist3d.cli import main; assert main({arguments!r}) == 0")
    assert not loaded & {"pytorch_lightning", "diffusers", "transformers"}

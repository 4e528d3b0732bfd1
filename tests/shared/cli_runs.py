"""Runs by the command line from a config file in a folder, and what they leave behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from scoredist3d import cli
from shared.tiny_runs import plain


def written(folder: Path, system: str = "text-to-3d", **changes: Any) -> Path:
    """Write a config file to ``folder``; its runs are in ``folder/out``."""
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump({**plain(folder / "out", system, trainer={"max_steps": 1}), **changes}))
    return file


def train(file: Path, *overrides: str, name: str = "scoredist3d") -> tuple[int, Path]:
    code = cli.main(["--config", str(file), "--train", "--gpu", "cpu", *overrides])
    (folder,) = (file.parent / "out" / name).iterdir()
    return code, folder


def again(mode: str, folder: Path, *overrides: str) -> int:
    mode_and_run = ["--train", "--resume"] if mode == "train" else [f"--{mode}"]
    return cli.main([*mode_and_run, str(folder), "--gpu", "cpu", *overrides])


def summary(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return content


def last_line(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().out.strip().splitlines()[-1]

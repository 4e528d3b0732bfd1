"""A record of what ran: command, configuration, code version and packages."""

from __future__ import annotations

import importlib.metadata
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from scoredist3d.files import write_atomically
from scoredist3d.training.folder import RunFolder

_LARGEST_DIFF = 5_000_000  # characters; a larger one is somebody's data, not code


def save_snapshot(
    folder: RunFolder, resolved_yaml: str, source: str | None, command: Sequence[str], custom: Sequence[Path] = ()
) -> None:
    """Write ``configs/`` and ``code/`` of a new run.

    ``code/`` holds ``commit.txt`` and ``changes.diff`` where the package runs from a git checkout, ``packages.txt``
    (name==version, as ``pip freeze`` lists them) and a copy of the user's ``custom/`` packages.
    """
    write_atomically(folder.resolved_config, resolved_yaml)
    if source is not None:
        write_atomically(folder.configs / "config.yaml", source)
    write_atomically(folder.configs / "command.txt", shlex.join(command) + "\n")
    write_atomically(folder.code / "packages.txt", "".join(f"{line}\n" for line in installed_packages()))
    for name, text in git_state(Path(__file__).resolve().parent).items():
        write_atomically(folder.code / name, text)
    ignore = shutil.ignore_patterns("__pycache__", "*.pyc", ".*")
    for package in {path.resolve() for path in custom if path.is_dir()}:
        shutil.copytree(package, folder.code / "custom", ignore=ignore, dirs_exist_ok=True)


def installed_packages() -> list[str]:
    """Sorted ``name==version`` of every installed distribution."""
    metadata = [distribution.metadata for distribution in importlib.metadata.distributions()]  # parsed at each access
    found = {f"{entry['Name']}=={entry['Version']}" for entry in metadata if entry["Name"]}
    return sorted(found, key=str.lower)


def git_state(folder: Path) -> dict[str, str]:
    """``commit.txt`` and ``changes.diff`` of the repository around ``folder``; empty outside of one or without git."""
    commit = _git(folder, "rev-parse", "HEAD")
    if commit is None:
        return {}
    diff = _git(folder, "diff", "HEAD", "--no-color", "--no-ext-diff") or ""
    if len(diff) > _LARGEST_DIFF:
        diff = f"(the difference to the commit has {len(diff)} characters and was left out)\n"
    return {"commit.txt": commit, "changes.diff": diff}


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        result = subprocess.run(
            ["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=20, errors="replace", check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout if result.returncode == 0 else None

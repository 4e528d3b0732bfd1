"""Snapshot of the inputs of a run: command, configuration, code version and packages."""

from __future__ import annotations

import filecmp
import importlib.metadata
import shlex
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from datetime import datetime
from pathlib import Path

import scoredist3d
from scoredist3d.files import MAX_RUN_TEXT_BYTES, new_folder, read_text, sync_folder, sync_tree, write_atomically
from scoredist3d.limits import check_file_size
from scoredist3d.training.folder import RESOLVED_CONFIG, WRITTEN_CONFIG, RunFolder

_SESSION = "session-"
_LARGEST_DIFF = 5_000_000  # In characters; a larger difference contains data, not code.


def save_snapshot(
    folder: RunFolder, resolved_yaml: str, source: str | None, command: Sequence[str], custom: Sequence[Path] = ()
) -> int:
    """Write ``configs/`` and ``code/`` of one session of a run; files of earlier sessions are kept.

    - ``configs/command.txt``: one line per session with time, version and command.
    - ``configs/resolved.yaml`` and ``configs/config.yaml``: configs of the latest session. Earlier configs that differ
      are in ``configs/history/session-<n>/``, where n is the last session that used them.
    - ``code/``: code of the first session: ``commit.txt`` and ``changes.diff`` if the package runs from a git checkout,
      ``packages.txt`` (name==version, as ``pip freeze`` lists them) and a copy of the user's ``custom/`` packages.
      A session whose code differs from that of the previous session writes ``code/session-<n>/``.

    Returns:
        The number of the session, from 1.
    """
    session = _add_command(folder.configs / "command.txt", command)
    _save_configs(folder, {RESOLVED_CONFIG: resolved_yaml, WRITTEN_CONFIG: source}, session)
    _save_code(folder, custom, session)
    return session


def _add_command(path: Path, command: Sequence[str]) -> int:
    """Append a line for this session to the file ``path``; returns the number of the session, from 1."""
    before = ""
    if path.is_file():
        check_file_size(path, MAX_RUN_TEXT_BYTES, "the list of a run's commands (rename it to start a new one)")
        before = read_text(path)
    time = datetime.now().astimezone().isoformat(timespec="seconds")
    # Line breaks inside the command are escaped, so that it stays on one line.
    shown = shlex.join(command).replace("\n", "'$'\\n''")
    text = f"{before}{time}  scoredist3d {scoredist3d.__version__}  {shown}\n"
    write_atomically(path, text)
    return text.count("\n")


def _save_configs(folder: RunFolder, configs: dict[str, str | None], session: int) -> None:
    """Write the configs of this session and keep those of the previous session if they differ."""
    before = {name: read_text(folder.configs / name) for name in _existing(folder.configs, configs)}
    if any(configs[name] not in (None, text) for name, text in before.items()):
        for name, text in before.items():
            write_atomically(folder.configs / "history" / f"session-{session - 1}" / name, text)
            if configs[name] is None:
                (folder.configs / name).unlink()
    for name, content in configs.items():
        if content is not None:
            write_atomically(folder.configs / name, content)


def _existing(folder: Path, names: Iterable[str]) -> list[str]:
    return [name for name in names if (folder / name).is_file()]


def _save_code(folder: RunFolder, custom: Sequence[Path], session: int) -> None:
    """Write the code of this session unless it equals that of the previous session."""
    with new_folder(folder.root / ".code.tmp") as made:
        write_atomically(made / "packages.txt", "".join(f"{line}\n" for line in installed_packages()))
        for name, text in git_state(Path(__file__).resolve().parent).items():
            write_atomically(made / name, text)
        ignore = shutil.ignore_patterns("__pycache__", "*.pyc", ".*")
        for package in {path.resolve() for path in custom if path.is_dir()}:
            shutil.copytree(package, made / "custom", ignore=ignore, dirs_exist_ok=True)
        sync_tree(made)
        if not folder.code.exists():
            made.rename(folder.code)
        elif not _same_files(made, latest_code(folder)):
            made.rename(folder.code / f"{_SESSION}{session}")
            sync_folder(folder.code)
    sync_folder(folder.root)


def latest_code(folder: RunFolder) -> Path:
    """Folder with the code of the latest session of a run."""
    later = [path for path in folder.code.glob(f"{_SESSION}*") if path.name.removeprefix(_SESSION).isdecimal()]
    return max(later, key=lambda path: int(path.name.removeprefix(_SESSION)), default=folder.code)


def _same_files(first: Path, second: Path) -> bool:
    names, others = _files(first), _files(second)
    return names == others and all(filecmp.cmp(first / name, second / name, shallow=False) for name in names)


def _files(folder: Path) -> set[Path]:
    """Relative paths of the code files of one session, without the subfolders of later sessions."""
    found = {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
    return {path for path in found if not path.parts[0].startswith(_SESSION)}


def installed_packages() -> list[str]:
    """Sorted ``name==version`` of every installed distribution."""
    # Read once, because each access to a distribution's metadata parses it.
    metadata = [distribution.metadata for distribution in importlib.metadata.distributions()]
    found = {f"{entry['Name']}=={entry['Version']}" for entry in metadata if entry["Name"]}
    return sorted(found, key=str.lower)


def git_state(folder: Path) -> dict[str, str]:
    """Contents of ``commit.txt`` and ``changes.diff`` for the repository of ``folder``; empty outside a repository."""
    commit = _git(folder, "rev-parse", "HEAD")
    if commit is None:
        return {}
    diff = _git(folder, "diff", "HEAD", "--no-color", "--no-ext-diff") or ""
    if len(diff) > _LARGEST_DIFF:
        diff = f"(the difference from the commit has {len(diff)} characters and is omitted)\n"
    return {"commit.txt": commit, "changes.diff": diff}


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        result = subprocess.run(
            ["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=20, errors="replace", check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout if result.returncode == 0 else None

"""Locations of the files that ship with the program, in a source checkout or an installed package.

A wheel contains the recipes as ``scoredist3d/configs/``; a checkout and an editable install keep them in ``configs/``
at the top level. In both cases ``<shipped root>/configs`` holds the recipes.
"""

from __future__ import annotations

import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent

_RENAMED_METHODS = {
    "classifier-sd": "csd",
    "collaborative-csd": "collaborative-sd",
    "delta-denoising": "dds",
    "posterior-distillation": "pds",
}
CONFIG_ALIASES: dict[str, str] = {
    f"{folder}/{old}.yaml": f"{folder}/{new}.yaml"
    for folder in ("guidance", "text-to-2d", "text-to-3d")
    for old, new in _RENAMED_METHODS.items()
}
"""Earlier paths of shipped recipes, relative to ``configs/``, and their present ones."""


def checkout_root() -> Path | None:
    """The folder with ``launch.py``, ``configs/`` and ``custom/``; None if a wheel is installed."""
    root = PACKAGE.parent
    return root if (root / "launch.py").is_file() and not _is_installed() else None


def shipped_root() -> Path:
    """The folder with the ``configs/`` that ships with the program."""
    return PACKAGE if _is_installed() else PACKAGE.parent


def find_shipped(path: str | Path) -> Path | None:
    """The existing file with a path relative to the working directory, else one that ships with the program.

    Shipped files are named as in the repository, e.g. ``scoredist3d/assets/sketches/mug.obj``.
    """
    path = Path(path)
    inside = PACKAGE.joinpath(*path.parts[1:]) if path.parts[:1] == (PACKAGE.name,) else shipped_root() / path
    return next((place for place in (Path.cwd() / path, inside) if is_file(place)), None)


def is_file(path: Path, *, folder: bool = False) -> bool:
    """Whether there is a file (or a folder) at ``path``; False for names that no file system accepts."""
    try:
        return path.is_dir() if folder else path.is_file()
    except (OSError, ValueError):  # The name is too long, contains a null character, or is not readable.
        return False


def renamed_config(path: str | Path) -> Path | None:
    """The present path of a shipped recipe that was renamed, or None where ``path`` is not one of its earlier names."""
    path = Path(path)
    new = CONFIG_ALIASES.get("/".join(path.parts[-2:]))
    return None if new is None else Path(*path.parts[:-2], new)


def command_name() -> str:
    """The command that started this program, for messages: ``python launch.py`` or ``scoredist3d``."""
    started = Path(sys.argv[0])
    if started.stem == "scoredist3d":
        return "scoredist3d"
    if started.name == "__main__.py" and started.parent.name == "scoredist3d":
        return "python -m scoredist3d"
    return "python launch.py" if checkout_root() is not None else "scoredist3d"


def _is_installed() -> bool:
    return (PACKAGE / "configs").is_dir()

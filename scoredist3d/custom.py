"""Import of user packages in ``custom/``, which register components.

``custom/`` of a source checkout is part of the program and is always imported. ``custom/`` of the current folder may
contain untrusted code, so it is only imported by commands that build a run. With ``--custom FOLDER``, any command
imports that folder.
"""

from __future__ import annotations

import importlib
import sys
import traceback
import types
from collections.abc import Iterator, Sequence
from pathlib import Path

from scoredist3d.paths import checkout_root

NAMESPACE = "custom"
_loaded: list[Path] = []


def custom_folders(*, builds: bool, named: Sequence[Path] = ()) -> list[Path]:
    """The folders of user packages that a command imports.

    Args:
        builds: Whether the command builds a run and therefore imports ``custom/`` of the current folder.
        named: Folders given with ``--custom``.
    """
    root = checkout_root()
    own = [] if root is None else [root / NAMESPACE]
    return [*own, *([Path.cwd() / NAMESPACE] if builds else []), *named]


def loaded_folders() -> list[Path]:
    """The folders that :func:`load_custom` has imported in this process."""
    return list(_loaded)


def load_custom(folders: Sequence[Path]) -> list[str]:
    """Import every package and module of ``folders`` as ``custom.<name>``.

    Each subfolder is a package; if it has no ``__init__.py``, each of its modules is imported. Names that start with
    ``_`` or ``.`` are skipped.

    Returns:
        One sentence per package that could not be imported, with the error and the line that raised it.
    """
    existing = list(dict.fromkeys(folder.resolve() for folder in folders if folder.is_dir()))
    _loaded[:] = existing
    if not existing:
        return []
    namespace = sys.modules.setdefault(NAMESPACE, types.ModuleType(NAMESPACE, "User packages."))
    namespace.__path__ = [str(folder) for folder in existing]
    importlib.invalidate_caches()
    failures = []
    for folder in existing:
        for name in _module_names(folder):
            try:
                importlib.import_module(name)
            # A user's file may raise any exception at import; it is reported and must not stop the program.
            except Exception as error:
                failures.append(f"{name.replace('.', '/')} could not be loaded: {_described(error)}")
    return failures


def _module_names(folder: Path) -> Iterator[str]:
    for path in sorted(folder.iterdir()):
        if path.name.startswith(("_", ".")):
            continue
        name = f"{NAMESPACE}.{path.stem}"
        if path.suffix == ".py" or (path / "__init__.py").is_file():
            yield name
        elif path.is_dir():
            yield from (f"{name}.{module.stem}" for module in sorted(path.glob("*.py")))


def _described(error: Exception) -> str:
    """Type and message of an error, with the file and line where it was raised."""
    if isinstance(error, SyntaxError):
        return f"SyntaxError: {error.msg} ({error.filename}, line {error.lineno})"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "importlib" not in frame.filename]
    place = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{place}"

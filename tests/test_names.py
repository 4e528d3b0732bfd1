"""One name, one class: no two classes of the package share a name."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "scoredist3d"

# The configuration nested in each component class has the same name everywhere by design.
NESTED = {"Config"}


def class_names(source: str) -> list[str]:
    """Names of all classes in a source text, without leading underscores."""
    return [node.name.lstrip("_") for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ClassDef)]


def test_classes_are_found() -> None:
    source = "class A:\n    class Config: ...\ndef f():\n    class _B: ...\n"
    assert sorted(class_names(source)) == ["A", "B", "Config"]


def test_class_names_are_unique() -> None:
    modules = defaultdict(list)
    for path in sorted(PACKAGE.rglob("*.py")):
        for name in class_names(path.read_text(encoding="utf-8")):
            modules[name].append(str(path.relative_to(PACKAGE)))
    shared = {name: paths for name, paths in modules.items() if len(paths) > 1}
    assert {name: paths for name, paths in shared.items() if name not in NESTED} == {}

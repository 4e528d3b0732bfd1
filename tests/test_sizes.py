"""Functions of the package and files of the repository stay short enough to read in one sitting."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "scoredist3d"
MODULES = sorted(PACKAGE.rglob("*.py"))
MAX_FUNCTION_LINES = 60
MAX_FILE_LINES = 400


def function_lines(source: str) -> dict[str, int]:
    """Lines of each function, by name, decorators not counted; the longest one of equal names."""
    lines: dict[str, int] = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno is not None
            lines[node.name] = max(lines.get(node.name, 0), node.end_lineno - node.lineno + 1)
    return lines


def long_functions(module: Path) -> dict[str, int]:
    """Functions of a module that are too long, with their numbers of lines."""
    lines = function_lines(module.read_text(encoding="utf-8"))
    return {name: count for name, count in lines.items() if count > MAX_FUNCTION_LINES}


def test_functions_are_measured() -> None:
    assert function_lines("@decorated\ndef f():\n    x = 1\n\n    return x\n") == {"f": 4}


def test_functions_are_short() -> None:
    found = {}
    for module in MODULES:
        name = str(module.relative_to(PACKAGE))
        too_long = long_functions(module)
        found |= {f"{name}:{function}": count for function, count in too_long.items()}
    assert found == {}, f"split functions of more than {MAX_FUNCTION_LINES} lines"


def test_files_are_short() -> None:
    others = [path for folder in ("tests", "benchmarks", "scripts") for path in (ROOT / folder).rglob("*.py")]
    assert len(others) > 200
    sources = [*MODULES, *PACKAGE.rglob("*.c"), *others]
    lines = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in sources}
    found = {name: count for name, count in lines.items() if count > MAX_FILE_LINES}
    assert found == {}, f"split files of more than {MAX_FILE_LINES} lines"

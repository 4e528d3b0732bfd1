"""No import cycles in the package, including imports in functions, for type checking only, and by importlib."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "scoredist3d"


def module_name(path: Path) -> str:
    """Dotted name of a module or package from its path."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imported_modules(tree: ast.AST, known: set[str]) -> set[str]:
    """Known modules that a syntax tree imports anywhere; ``from package import module`` counts as the module."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= known & {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            full = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= known & {name if name in known else str(node.module) for name in full}
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "importlib.import_module":
            found |= {name for name in known if re.fullmatch(name_pattern(node.args[0]), name)}
    return found


def name_pattern(argument: ast.expr) -> str:
    """Pattern of the names that an argument of ``import_module`` can have; none for anything but (f-)strings."""
    parts = argument.values if isinstance(argument, ast.JoinedStr) else [argument]
    if not isinstance(parts[0], ast.Constant):
        return ""
    return "".join(re.escape(str(part.value)) if isinstance(part, ast.Constant) else r"\w+" for part in parts)


def import_graph() -> dict[str, set[str]]:
    """Modules of the package that each module imports."""
    graph = {}
    for name, path in MODULES.items():
        graph[name] = imported_modules(ast.parse(path.read_text(encoding="utf-8")), set(MODULES)) - {name}
    return graph


def part_of(name: str) -> str:
    """Package or top-level module of ``scoredist3d`` that contains a module; ``scoredist3d`` for the root."""
    return name.split(".")[1] if "." in name else name


def cycles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Strongly connected components of the import graph with two or more modules."""
    reachable = {name: set(descendants(graph, name)) for name in graph}
    components = {
        frozenset(other for other in reachable[name] if name in reachable[other])
        for name in graph
        if name in reachable[name]
    }
    return sorted(sorted(component) for component in components)


def descendants(graph: dict[str, set[str]], start: str) -> Iterator[str]:
    """Modules that ``start`` imports directly or indirectly."""
    seen: set[str] = set()
    stack = list(graph[start])
    while stack:
        name = stack.pop()
        if name not in seen:
            seen.add(name)
            stack.extend(graph[name])
            yield name


def test_cycles_are_found() -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}
    assert cycles(graph) == [["b", "c"]]


def test_all_kinds_of_import_count() -> None:
    source = "if TYPE_CHECKING:\n    from p import a\ndef f():\n    import p.b\n    from p.c import name\n"
    source += 'importlib.import_module(f"p.{name}_backend")\nimportlib.import_module(name)\n'
    known = {"p", "p.a", "p.b", "p.c", "p.c_backend", "p.d_backends"}
    assert imported_modules(ast.parse(source), known) == {"p.a", "p.b", "p.c", "p.c_backend"}


def test_there_are_no_import_cycles() -> None:
    assert cycles(import_graph()) == [], "put the shared types into a module that imports neither of them"


def test_no_package_imports_one_that_imports_it_back() -> None:
    packages: dict[str, set[str]] = {}
    for name, imported in import_graph().items():
        part = part_of(name)
        packages.setdefault(part, set()).update({part_of(other) for other in imported} - {part})
    del packages["scoredist3d"]  # its public names are imported when they are used
    assert cycles({part: others - {"scoredist3d"} for part, others in packages.items()}) == []

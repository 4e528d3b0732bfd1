"""CONTRIBUTING.md names classes, methods, files and commands that exist, and describes every kind of component."""

from __future__ import annotations

import builtins
import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import pytest

from scoredist3d import registry

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
CODE = re.findall(r"```\w+\n(.*?)```", PAGE, flags=re.DOTALL)
TEXT = re.sub(r"```.*?```", "", PAGE, flags=re.DOTALL)
QUOTED = re.findall(r"`([^`\n]+)`", TEXT)
DOTTED = sorted({name for name in QUOTED if re.fullmatch(r"scoredist3d(\.\w+)+", name)})
MEMBERS = sorted({name for name in QUOTED if re.fullmatch(r"[A-Z]\w*\.\w+", name) and not name.isupper()})
FILES = sorted({name for name in QUOTED if re.fullmatch(r"[\w.-]+(/[\w.-]+)*(/|\.(py|txt|md|yaml|toml))", name)})
OF_A_RUN = {"configs/resolved.yaml"}
SECTIONS = dict(re.findall(r"^### [^\n]*\(`([a-z-]+)`\)\n(.*?)(?=^##|\Z)", TEXT, flags=re.DOTALL | re.MULTILINE))
NO_SUBCLASS = {("geometry", "image-canvas")}  # free images; no renderer shows them


def has(owner: Any, name: str) -> bool:
    """Whether an attribute is there or, for a value that each instance sets, declared."""
    return hasattr(owner, name) or any(name in inspect.get_annotations(base) for base in getattr(owner, "__mro__", ()))


def resolve(name: str) -> Any:
    """The module, class or attribute of a dotted name."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for attribute in parts[count:]:
            found = getattr(found, attribute)
        return found
    raise ModuleNotFoundError(name)


def classes() -> dict[str, type]:
    """The classes that the page gives the whole path of, by their short names."""
    return {found.__name__: found for found in map(resolve, DOTTED) if isinstance(found, type)}


def base_classes(kind: str) -> list[type]:
    """The classes of the package of ``kind`` whose whole path its section gives."""
    names = [name for name in DOTTED if name.startswith(f"{registry.KINDS[kind]}.") and f"`{name}`" in SECTIONS[kind]]
    return [found for found in map(resolve, names) if isinstance(found, type)]


def test_the_page_names_something() -> None:
    assert len(DOTTED) > 30 and len(MEMBERS) > 20 and len(FILES) > 30


@pytest.mark.parametrize("name", DOTTED)
def test_dotted_names_can_be_imported(name: str) -> None:
    resolve(name)


@pytest.mark.parametrize("name", MEMBERS)
def test_members_exist(name: str) -> None:
    owner, _, member = name.partition(".")
    assert owner in classes(), f"the page gives no whole path of {owner}"
    assert has(classes()[owner], member)


def test_single_class_names_are_those_with_a_path() -> None:
    single = {name for name in QUOTED if re.fullmatch(r"[A-Z][a-z]\w+", name)}
    assert single - {"Config"} - set(vars(builtins)) <= set(classes())


@pytest.mark.parametrize("name", sorted(set(FILES) - OF_A_RUN))
def test_files_and_folders_exist(name: str) -> None:
    path = ROOT / name
    assert path.is_dir() if name.endswith("/") else path.is_file()


def test_every_kind_has_a_section() -> None:
    assert set(SECTIONS) == set(registry.KINDS)


@pytest.mark.parametrize("kind", registry.KINDS)
def test_a_section_says_everything(kind: str) -> None:
    section = SECTIONS[kind]
    assert f"`{registry.KINDS[kind].replace('.', '/')}/`" in section
    for start in ("- File: ", "- Implement", "- Config: ", "- Test: ", "- Documentation: "):
        assert section.count(f"\n{start}") == 1, start
    assert re.search(r"`tests/[\w/]+(\.py)?`", section), "name the test files"


@pytest.mark.parametrize("kind", registry.KINDS)
def test_every_component_derives_from_a_named_base_class(kind: str) -> None:
    bases = tuple(base_classes(kind))
    for name in registry.names(kind):
        if (kind, name) not in NO_SUBCLASS:
            assert issubclass(registry.lookup(kind, name).cls, bases), name


@pytest.mark.parametrize("kind", registry.KINDS)
def test_a_section_names_every_method_to_implement(kind: str) -> None:
    section = SECTIONS[kind]
    for base in base_classes(kind):
        for method in getattr(base, "__abstractmethods__", ()):
            assert f"`{method}`" in section or f"`{base.__name__}.{method}`" in section, f"{base.__name__}.{method}"


def test_the_table_of_geometries_names_what_each_leaves_open() -> None:
    rows = re.findall(r"^\| `(scoredist3d\.[\w.]+)` \|[^|]*\| (.*) \|$", SECTIONS["geometry"], flags=re.MULTILINE)
    assert len(rows) == 4
    for name, methods in rows:
        assert set(re.findall(r"`(\w+)`", methods)) == resolve(name).__abstractmethods__


def test_the_example_is_that_of_the_configuration_page() -> None:
    (example,) = [code for code in CODE if "@register" in code]
    whole = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert example in whole


def test_the_make_targets_exist() -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    named = re.findall(r"(?:`|^)make ([a-z-]+)", PAGE, flags=re.MULTILINE)
    assert {"install-dev", "test"} <= set(named) <= set(targets)

"""Registry of file formats.

A format is a function that writes one product of an export to a file. A decorator registers it::

    @register_format("stl", suffix=".stl", needs=SurfaceProduct, summary="Binary STL of the surface.")
    def write_stl(path: Path, product: SurfaceProduct) -> list[Path]: ...

``exporter.formats`` then accepts the name. Modules in ``scoredist3d/export/formats/`` are imported at the first
look-up; user modules in ``custom/`` register through the same decorator.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from scoredist3d.export.products import Product
from scoredist3d.registry import near_matches

ProductT = TypeVar("ProductT", bound=Product)
Writer = Callable[[Path, ProductT], list[Path]]

_PACKAGE = "scoredist3d.export.formats"


@dataclass(frozen=True)
class FileFormat:
    """A registered file format.

    Attributes:
        name: Name in ``exporter.formats``.
        suffix: End of the file name, including the dot.
        needs: Class of the product that is written, one of :mod:`scoredist3d.export.products`.
        write: Function that writes a product to a path and returns all files written, each after those it refers to.
        summary: Content of the file, in one sentence.
        problem: Function that returns the reason why the format is unavailable, or an empty string.
        has_unlit: Whether the format can mark a mesh as unlit.
    """

    name: str
    suffix: str
    needs: type
    write: Callable[[Path, Any], list[Path]]
    summary: str
    problem: Callable[[], str]
    has_unlit: bool


_formats: dict[str, FileFormat] = {}
_discovered: set[str] = set()


def _always_available() -> str:
    return ""


def register_format(
    name: str,
    *,
    suffix: str,
    needs: type[ProductT],
    summary: str,
    problem: Callable[[], str] = _always_available,
    has_unlit: bool = False,
) -> Callable[[Writer[ProductT]], Writer[ProductT]]:
    """Function decorator that registers a writer as a file format.

    Args:
        name: Name in ``exporter.formats``, lower case with dashes.
        suffix: End of the file name, including the dot.
        needs: Class of the product that the writer receives. The exporter makes only the products that are needed.
        summary: Content of the file, in one sentence.
        problem: Function that returns the reason why the format is unavailable, e.g. a missing package and how to
            install it, or an empty string. It is called before any work is done.
        has_unlit: Whether the format can mark a mesh as unlit.

    Raises:
        ValueError: Another function is already registered under this name.
    """

    def decorate(write: Writer[ProductT]) -> Writer[ProductT]:
        taken = _formats.get(name)
        if taken is not None and _path_of(taken.write) != _path_of(write):
            raise ValueError(
                f"the export format {name!r} is already registered by {_path_of(taken.write)}; choose another name for "
                f"{_path_of(write)}"
            )
        _formats[name] = FileFormat(name, suffix, needs, write, summary, problem, has_unlit)
        return write

    return decorate


def format_names() -> list[str]:
    """Names of all registered formats, sorted."""
    _discover()
    return sorted(_formats)


def lookup_format(name: str) -> FileFormat:
    """The format registered as ``name``.

    Raises:
        ValueError: No format has this name; the message lists near matches and all names.
    """
    known = format_names()
    if name not in _formats:
        raise ValueError(
            f"exporter.formats: no format is called {name!r}.{near_matches(name, known)} Known: {', '.join(known)}"
        )
    return _formats[name]


def _path_of(function: Any) -> str:
    return f"{function.__module__}.{function.__qualname__}"


def _discover() -> None:
    """Import the modules of this package, once."""
    if _PACKAGE in _discovered:
        return
    package = importlib.import_module(_PACKAGE)
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{_PACKAGE}.{module.name}")
    _discovered.add(_PACKAGE)

"""Registry of components, which maps a kind and a name to a class.

A component is a class with a nested ``Config`` dataclass (see :mod:`scoredist3d.config.fields`) and a constructor with
the arguments of its kind (:data:`ARGUMENTS`). It is registered with a decorator::

    @register("guidance", "sds", summary="Residual of the noise prediction on a noised render.", arxiv="2209.14988")
    class ScoreDistillationSampling(Guidance): ...

The modules of a kind's package are imported at the first look-up of that kind, so a new component needs one new file
and no other change. User packages in ``custom/`` use the same decorator.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import logging
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

KINDS: dict[str, str] = {
    "system": "scoredist3d.systems",
    "prior": "scoredist3d.priors",
    "prompt-processor": "scoredist3d.prompts",
    "guidance": "scoredist3d.guidance",
    "geometry": "scoredist3d.geometry",
    "material": "scoredist3d.materials",
    "background": "scoredist3d.backgrounds",
    "renderer": "scoredist3d.renderers",
    "loss": "scoredist3d.losses",
    "data": "scoredist3d.data",
    "exporter": "scoredist3d.export",
}

ARGUMENTS: dict[str, tuple[str, ...]] = {
    "system": ("prior", "prompt", "negative_prompt", "cameras", "rng"),
    "prior": (),
    "prompt-processor": ("prior", "prompt", "negative_prompt", "extra"),
    "guidance": ("prior", "rng"),
    "geometry": ("rng", "material"),
    "material": ("rng", "prior"),
    "background": ("rng", "num_channels"),
    "renderer": ("geometry", "material", "background", "rng"),
    "loss": (),
    "data": ("world_size",),
    "exporter": (),
}
"""Keyword arguments that the constructors of a kind take after ``config``; see the base class of the kind."""

ClassT = TypeVar("ClassT", bound=type)

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Entry:
    """One registered component."""

    kind: str
    name: str
    cls: type
    summary: str
    arxiv: str | None = None

    @property
    def config_cls(self) -> type:
        """The component's nested ``Config`` dataclass."""
        config_cls: type = self.cls.Config  # type: ignore[attr-defined]
        return config_cls


class UnknownComponentError(ValueError):
    """Error for a name under which no component of the kind is registered."""


_entries: dict[str, dict[str, Entry]] = {kind: {} for kind in KINDS}
_aliases: dict[str, dict[str, str]] = {kind: {} for kind in KINDS}
_loaded: set[str] = set()


def near_matches(name: str, known: list[str]) -> str:
    """A hint `` Did you mean 'a' or 'b'?`` with the closest known names, or the empty string."""
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f" Did you mean {' or '.join(repr(match) for match in close)}?" if close else ""


def register(
    kind: str, name: str, *, summary: str, arxiv: str | None = None, aliases: Sequence[str] = ()
) -> Callable[[ClassT], ClassT]:
    """Class decorator: make ``type: <name>`` select this class wherever a block of ``kind`` is configured.

    Args:
        kind: One of :data:`KINDS`.
        name: The registry name, lower case with dashes.
        summary: Description of the component in one line, for ``--list``.
        arxiv: The arXiv id of the component's paper, if any.
        aliases: Earlier names, which keep working; the first use of each is logged.

    Raises:
        ValueError: The kind is unknown, the class has no ``Config``, or another class is registered under the name.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown component kind {kind!r}; kinds are {', '.join(KINDS)}")

    def decorate(cls: ClassT) -> ClassT:
        if not hasattr(cls, "Config"):
            raise ValueError(
                f"{cls.__qualname__} has no nested Config dataclass, so it cannot be registered as {kind}/{name}"
            )
        taken = _entries[kind].get(name)
        if taken is not None and (taken.cls.__module__, taken.cls.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(
                f"{kind}/{name} is already registered by {taken.cls.__module__}.{taken.cls.__qualname__}; "
                f"choose another name for {cls.__module__}.{cls.__qualname__}"
            )
        _own_config(cls, kind, name)
        _entries[kind][name] = Entry(kind=kind, name=name, cls=cls, summary=summary, arxiv=arxiv)
        _aliases[kind].update(dict.fromkeys(aliases, name))
        return cls

    return decorate


def _own_config(cls: Any, kind: str, name: str) -> None:
    """Set kind and type of the ``Config`` of a component class; an inherited ``Config`` is subclassed first."""
    if cls.Config.__qualname__ != f"{cls.__qualname__}.Config":  # inherited
        names = {"__module__": cls.__module__, "__qualname__": f"{cls.__qualname__}.Config"}
        cls.Config = type(cls.Config)("Config", (cls.Config,), names | {"__doc__": cls.Config.__doc__})
    cls.Config.kind, cls.Config.type = kind, name


def _load(kind: str) -> None:
    if kind not in KINDS:
        raise ValueError(
            f"unknown component kind {kind!r}.{near_matches(kind, list(KINDS))} Kinds are {', '.join(KINDS)}"
        )
    if kind in _loaded:
        return
    _loaded.add(kind)  # set before the imports, because they may look up their own kind
    try:
        package = importlib.import_module(KINDS[kind])
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{package.__name__}.{module.name}")
    except BaseException:
        _loaded.discard(kind)  # so that the next look-up imports the rest
        raise


@functools.cache
def report_alias(old: str, new: str) -> None:
    """Log, once per process, that the name ``old`` is an alias of ``new``."""
    _log.warning("%s is an old name and still works; the new name is %s", old, new)


def same_component(first: Any, second: Any) -> bool:
    """Whether two names are equal or, because of an alias, select the same component of any kind."""
    if first == second:
        return True
    if not (isinstance(first, str) and isinstance(second, str)):
        return False  # not names, so there is no alias; validation reports such types
    for kind in KINDS:
        _load(kind)
    return any(aliases.get(first, first) == aliases.get(second, second) for aliases in _aliases.values())


def names(kind: str) -> list[str]:
    """Registered names of a kind, sorted."""
    _load(kind)
    return sorted(_entries[kind])


def lookup(kind: str, name: str) -> Entry:
    """The entry registered as ``kind/name``.

    Raises:
        UnknownComponentError: The name is unknown; the message lists near matches and all names.
    """
    _load(kind)
    if name not in _entries[kind] and name in _aliases[kind]:
        report_alias(f"{kind} type {name!r}", repr(_aliases[kind][name]))
        name = _aliases[kind][name]
    try:
        return _entries[kind][name]
    except KeyError:
        known = sorted(_entries[kind])
        raise UnknownComponentError(
            f"no {kind} is called {name!r}.{near_matches(name, known)} Known: {', '.join(known) or 'none'}"
        ) from None


def entry_of(config: Any) -> Entry:
    """The entry of the component that ``config`` configures.

    Raises:
        ValueError: ``config`` is not the ``Config`` of a registered class.
    """
    if not getattr(config, "kind", ""):
        raise ValueError(
            f"{type(config).__qualname__} is not the Config of a registered component; decorate its class with "
            "scoredist3d.registry.register"
        )
    return lookup(config.kind, config.type)


def build(config: Any, **runtime: Any) -> Any:
    """Construct the component that a validated config describes: ``cls(config, **runtime)``.

    Raises:
        TypeError: ``runtime`` contains an argument that the constructors of this kind do not take.
    """
    entry = entry_of(config)
    accepted = ARGUMENTS[entry.kind]
    for name in runtime:
        if name not in accepted:
            takes = ", ".join(accepted) or "none besides its config"
            raise TypeError(
                f"{entry.kind}/{entry.name}: unexpected argument {name!r}.{near_matches(name, list(accepted))} "
                f"Arguments of a {entry.kind}: {takes}"
            )
    return entry.cls(config, **runtime)

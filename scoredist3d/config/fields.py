"""How a component declares its configuration.

A component's nested ``Config`` is a dataclass derived from :class:`ComponentConfig`; each field is made by
:func:`option`, :func:`component` or :func:`component_map`, which carry the help text and the legal range to the
validator, ``--describe`` and the documentation::

    @dataclass
    class Config(ComponentConfig):
        radius: float = option(1.0, "Radius of the ball that holds the object, in scene units.", gt=0)
        guidance_scale: Schedule = option(7.5, "gamma of eps_u + gamma (eps_c - eps_u).", ge=0)
        geometry: ComponentConfig = component("geometry", "implicit-volume", "What is optimised.")
        loss: dict[str, ComponentConfig] = component_map("loss", "Regularisers by name.")
"""

from __future__ import annotations

import dataclasses
import functools
import sys
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from scoredist3d.config.schedule import Schedule

MISSING = dataclasses.MISSING


class ConfigError(ValueError):
    """A mistake in a config file, an override or the command line; the message is for who made it."""


@functools.cache
def field_types(cls: type) -> dict[str, Any]:
    """Name to resolved type of every field of a dataclass, whether its annotations are strings or not.

    Names are looked up in the module and in the classes around the definition, so a ``Config`` may refer to a dataclass
    nested beside it.
    """
    surroundings: dict[str, Any] = {}
    for base in reversed(cls.__mro__):
        scope: Any = sys.modules.get(base.__module__)
        for part in base.__qualname__.split(".")[:-1]:
            scope = getattr(scope, part, None)
            if isinstance(scope, type):
                surroundings.update(vars(scope))
    hints = typing.get_type_hints(cls, localns=surroundings)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


@functools.cache
def _schedule_fields(cls: type) -> tuple[str, ...]:
    kinds = (Schedule, Schedule | None)
    return tuple(name for name, hint in field_types(cls).items() if hint in kinds)


@dataclass
class ComponentConfig:
    """Base of every component's ``Config``.

    ``kind`` and ``type`` are filled in by the validator with the registry kind and name that chose the class; a
    ``validate`` method may be overridden to check relations between fields.
    """

    kind: str = dataclasses.field(default="", init=False, repr=False, compare=False)
    type: str = dataclasses.field(default="", init=False)

    def __post_init__(self) -> None:
        """Turn plain numbers given for schedules, defaults included, into schedules."""
        cls: Any = type(self)
        for name in _schedule_fields(cls):
            value = getattr(self, name)
            if value is not None:
                setattr(self, name, Schedule.parse(value))

    def validate(self) -> list[str]:
        """Problems that one field alone cannot show, a sentence each, starting with the field's name; none if empty."""
        return []


def option(
    default: Any = MISSING,
    help: str = "",
    *,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    example: str = "",
    file: bool = False,
    aliases: Sequence[str] = (),
    choices: Callable[[], Sequence[str]] | None = None,
) -> Any:
    """A leaf field. Bounds apply to a number, to every element of a list or tuple, and to every value of a schedule.

    Lists, dicts and schedules as defaults are copied per instance. Without a default the field is required; ``example``
    is then shown where it is missing. ``file`` says that the text names a file that a run reads. ``aliases`` are
    earlier keys of the field, which keep working in config files and overrides. ``choices`` returns the texts that the
    field accepts; it is called at validation, because user packages may register more of them.
    """
    metadata = {
        "help": help,
        "bounds": {"ge": ge, "gt": gt, "le": le, "lt": lt},
        "example": example,
        "file": file,
        "aliases": tuple(aliases),
        "choices": choices,
    }
    if default is MISSING:
        return dataclasses.field(metadata=metadata, kw_only=True)
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=default.copy, metadata=metadata, kw_only=True)
    return dataclasses.field(default=default, metadata=metadata, kw_only=True)


def accepted_type(field: dataclasses.Field[Any], hint: Any) -> Any:
    """The type that values of a field must have: ``hint``, with ``str`` narrowed to the field's choices, if it has any.

    ``hint`` is the field's resolved type, ``str`` or ``list[str]`` if the field has choices.
    """
    choices = field.metadata.get("choices")
    if choices is None:
        return hint
    name: Any = Literal.__getitem__(tuple(choices()))
    return {str: name, list[str]: list[name]}[hint]


def component(kind: str, default_type: str | None, help: str = "") -> Any:
    """A block whose ``type`` names a registered component of ``kind``.

    ``default_type`` is used where the block gives none; ``None`` as default makes the whole block optional (absent
    means ``None``).
    """
    return dataclasses.field(
        default=None, metadata={"help": help, "component": kind, "default_type": default_type}, kw_only=True
    )


def component_map(kind: str, help: str = "", *, shorthand: str = "weight") -> Any:
    """A mapping from registered names of ``kind`` to their blocks; a bare number or schedule sets ``shorthand``."""
    return dataclasses.field(
        default_factory=dict, metadata={"help": help, "component_map": kind, "shorthand": shorthand}, kw_only=True
    )

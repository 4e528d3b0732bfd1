"""Declaration of the configuration of a component.

A component's nested ``Config`` is a dataclass derived from :class:`ComponentConfig`; each field is declared with
:func:`option`, :func:`component` or :func:`component_map`. The validator, ``--describe`` and the documentation use the
help text and the bounds of the declaration::

    @dataclass
    class Config(ComponentConfig):
        radius: float = option(1.0, "Radius of the bounding sphere of the object, in scene units.", gt=0)
        guidance_scale: Schedule = option(7.5, "Guidance scale gamma of eps_u + gamma (eps_c - eps_u).", ge=0)
        geometry: ComponentConfig = component("geometry", "implicit-volume", "Representation that is optimized.")
        loss: dict[str, ComponentConfig] = component_map("loss", "Regularizers by name.")

Calling a ``Config`` in Python parses its keyword arguments like a YAML block: plain numbers become schedules in
fields of that type, absent blocks get their default component, and an invalid keyword, type or value raises
:class:`~scoredist3d.config.errors.ConfigError`.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from scoredist3d.config.errors import ConfigError, FieldError

__all__ = [
    "MISSING",
    "Block",
    "ComponentConfig",
    "ConfigError",
    "FieldError",
    "accepted_type",
    "component",
    "component_map",
    "field_types",
    "option",
]

MISSING = dataclasses.MISSING


@functools.cache
def field_types(cls: type) -> dict[str, Any]:
    """Mapping from the field names of a dataclass to the resolved types; annotations may be strings.

    Names in annotations are looked up in the module and in the classes that enclose the dataclass, so a ``Config`` may
    refer to another dataclass that is nested in the same class.
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


_parser: list[Callable[[Any, dict[str, Any]], Any]] = []
"""Holder of the function that parses keyword arguments, which :mod:`scoredist3d.config.walker` sets when imported."""


def set_parser(parse: Callable[[Any, dict[str, Any]], Any]) -> None:
    """Set the function that constructs an instance of a block class from keyword arguments."""
    _parser[:] = [parse]


class _BlockType(type):
    """Metaclass of blocks: calling a block class parses the keyword arguments."""

    if not TYPE_CHECKING:  # type checkers see the signature of the dataclass

        def __call__(cls, **values: Any) -> Any:
            return _parser[0](cls, values)

    def construct(cls, values: dict[str, Any]) -> Any:
        """An instance with ``values``, one for each field, which are neither checked nor converted."""
        return type.__call__(cls, **values)


class Block(metaclass=_BlockType):
    """Base class of configuration dataclasses whose constructor checks and converts its arguments like a YAML block.

    The constructor checks each field separately. Relations between fields (``validate``) are checked when a whole
    configuration is parsed from YAML or a component is built, so the fields can be set in any order.
    """

    def validate(self) -> list[str]:
        """One message for each violated relation between fields; a message starts with the name of a field."""
        return []


@dataclass
class ComponentConfig(Block):
    """Base class of the ``Config`` of every component.

    Attributes:
        kind: Registry kind of the component; set on the class by ``register``, empty on unregistered classes.
        type: Registry name of the component; set on the class by ``register``, empty on unregistered classes.
    """

    kind: ClassVar[str] = ""
    type: ClassVar[str] = ""


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
    """A field of a configuration dataclass that holds a plain value rather than a component.

    Args:
        default: The default value; lists and dicts are copied for each instance. A field without a default is
            required.
        help: Description of the field, shown by ``--describe``.
        ge, gt, le, lt: Bounds of a number, of every element of a list or tuple, and of every value of a schedule.
        example: Example override shown in the error message if the field is required but missing.
        file: Whether the value is the path of a file that a run reads.
        aliases: Earlier names of the field, which are still accepted.
        choices: Function that returns the strings that the field accepts; called at validation, because user packages
            may register further ones.
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
    """The type that values of a field must have: ``hint``, with ``str`` narrowed to the choices of the field, if any.

    Args:
        field: A field of a configuration dataclass.
        hint: The resolved type of the field; ``str`` or ``list[str]`` if the field has choices.
    """
    choices = field.metadata.get("choices")
    if choices is None:
        return hint
    name: Any = Literal.__getitem__(tuple(choices()))
    return {str: name, list[str]: list[name]}[hint]


def component(kind: str, default_type: str | None, help: str = "") -> Any:
    """A field for a block whose ``type`` names a registered component of ``kind``.

    ``default_type`` is the type of a block without ``type`` and of an absent block. With ``default_type=None``, the
    block is optional, and the value of the field is None if the block is absent.
    """
    return dataclasses.field(
        default=None, metadata={"help": help, "component": kind, "default_type": default_type}, kw_only=True
    )


def component_map(kind: str, help: str = "", *, shorthand: str = "weight") -> Any:
    """A field for a mapping from names to blocks of components of ``kind``.

    The type of a block without ``type`` is its name in the mapping. A number or schedule in place of a block stands for
    a block in which only the key ``shorthand`` is set.
    """
    return dataclasses.field(
        default_factory=dict, metadata={"help": help, "component_map": kind, "shorthand": shorthand}, kw_only=True
    )

"""Declaration of the configuration of a component.

A component's nested ``Config`` is a dataclass derived from :class:`ComponentConfig`; each field is made by
:func:`option`, :func:`component` or :func:`component_map`. The help text and the bounds given there are used by the
validator, ``--describe`` and the documentation::

    @dataclass
    class Config(ComponentConfig):
        radius: float = option(1.0, "Radius of the bounding sphere of the object, in scene units.", gt=0)
        guidance_scale: Schedule = option(7.5, "Guidance scale gamma of eps_u + gamma (eps_c - eps_u).", ge=0)
        geometry: ComponentConfig = component("geometry", "implicit-volume", "Representation that is optimized.")
        loss: dict[str, ComponentConfig] = component_map("loss", "Regularizers by name.")

Calling a ``Config`` in Python parses its keyword arguments like a YAML block: plain numbers become schedules, absent
blocks get their default component, and a wrong keyword, type or value raises
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
    """The resolved type of every field of a dataclass, by name; annotations may be strings.

    Names are looked up in the module and in the enclosing classes of the definition, so a ``Config`` may refer to a
    dataclass in the same class.
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
"""The function that parses keyword arguments; set by :mod:`scoredist3d.config.walker`, which depends on this module."""


def set_parser(parse: Callable[[Any, dict[str, Any]], Any]) -> None:
    """Set the function that constructs an instance of a block class from keyword arguments."""
    _parser[:] = [parse]


class _BlockType(type):
    """Metaclass of blocks: calling a block class parses the keyword arguments."""

    if not TYPE_CHECKING:  # type checkers see the dataclass's own signature

        def __call__(cls, **values: Any) -> Any:
            return _parser[0](cls, values)

    def construct(cls, values: dict[str, Any]) -> Any:
        """An instance with the given ``values`` of all fields, which are neither checked nor converted."""
        return type.__call__(cls, **values)


class Block(metaclass=_BlockType):
    """Base class of configuration dataclasses whose constructor checks and converts its arguments like a YAML block.

    The constructor checks each field separately. Relations between fields (``validate``) are checked when a whole
    configuration is parsed from YAML or a component is built, so the fields can be set in any order.
    """

    def validate(self) -> list[str]:
        """Violated relations between fields: one sentence for each, starting with a field's name."""
        return []


@dataclass
class ComponentConfig(Block):
    """Base class of the ``Config`` of every component.

    Attributes:
        kind: Registry kind of the component; set on the class by ``register``, empty on unregistered classes.
        type: Registry name of the component; set in the same way.
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
    """A leaf field of a configuration dataclass.

    Args:
        default: The default value; lists and dicts are copied per instance. Without a default the field is required.
        help: Description of the field, for ``--describe``.
        ge, gt, le, lt: Bounds of a number, of every element of a list or tuple, and of every value of a schedule.
        example: Example shown in the error message if a required field is missing.
        file: Whether the value is the path of a file that a run reads.
        aliases: Earlier keys of the field, which keep working.
        choices: Function that returns the strings that the field accepts; called at validation, because user packages
            may register more of them.
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

    A block without a type and an absent block have the type ``default_type``. With ``default_type=None``, the block is
    optional, and its value is None if it is absent.
    """
    return dataclasses.field(
        default=None, metadata={"help": help, "component": kind, "default_type": default_type}, kw_only=True
    )


def component_map(kind: str, help: str = "", *, shorthand: str = "weight") -> Any:
    """A mapping from registered names of ``kind`` to their blocks; a bare number or schedule sets ``shorthand``."""
    return dataclasses.field(
        default_factory=dict, metadata={"help": help, "component_map": kind, "shorthand": shorthand}, kw_only=True
    )

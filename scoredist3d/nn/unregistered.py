"""References from one module to another that do not register it as a submodule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True, eq=False)
class Unregistered(Generic[T]):
    """A reference to a module that its holder uses but does not own.

    ``torch.nn.Module`` registers each module that is assigned to an attribute as a submodule. A module inside this
    wrapper is not registered: it is not part of the holder's parameters and ``state_dict``, and is not moved to
    another device with the holder. It is used for the frozen prior of a guidance and the geometry of a renderer.

    Attributes:
        value: The module, or an object that holds modules.
    """

    value: T

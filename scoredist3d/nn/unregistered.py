"""References from one module to another that do not make it a sub-module."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True, eq=False)
class Unregistered(Generic[T]):
    """A reference to a module that its holder uses but does not own.

    ``torch.nn.Module`` registers each module that is assigned to an attribute as a sub-module. A module inside of this
    wrapper is not registered: it is missing from the parameters, the ``state_dict`` and the device transfers of the
    holder. The frozen prior of a guidance and the geometry of a renderer are such modules.

    Attributes:
        value: The module, or an object that holds modules.
    """

    value: T

"""A module list whose element type is known."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Generic, TypeVar, overload

from torch import nn

ModuleT = TypeVar("ModuleT", bound=nn.Module)


class TypedModuleList(nn.ModuleList, Generic[ModuleT]):
    """``nn.ModuleList`` of modules of one type; names in the ``state_dict`` are those of ``nn.ModuleList``."""

    if TYPE_CHECKING:

        @overload
        def __getitem__(self, idx: slice) -> nn.ModuleList: ...
        @overload
        def __getitem__(self, idx: int) -> ModuleT: ...
        def __getitem__(self, idx: int | slice) -> nn.ModuleList | ModuleT: ...

        def __iter__(self) -> Iterator[ModuleT]: ...

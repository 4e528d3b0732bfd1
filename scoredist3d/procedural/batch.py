"""Base class of batches of objects: selection, moving to a device, and repetition."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """``N`` items; the fields of a subclass are tensors with the first dimension N and other batches.

    Fields that are neither are kept as they are; a subclass with such fields extends the methods.
    """

    def __getitem__(self, index: int | slice | Tensor) -> Self:
        """Select items; the result keeps its batch dimension."""
        if isinstance(index, int):
            index = slice(index, index + 1 or None)
        return self._map(lambda value: value[index])

    def to(self, device: torch.device | str) -> Self:
        """The same items on another device."""
        return self._map(lambda value: value.to(device))

    def repeat_interleave(self, repeats: int) -> Self:
        """Repeat each item ``repeats`` times in a row, once for each of its views."""
        return self._map(
            lambda value: (
                value.repeat_interleave(repeats, 0) if isinstance(value, Tensor) else value.repeat_interleave(repeats)
            )
        )

    def _map(self, function: Callable[[Any], Any]) -> Self:
        """The batch with ``function`` applied to all tensors and batches."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(
            self, **{name: function(value) for name, value in values.items() if isinstance(value, Tensor | Batch)}
        )

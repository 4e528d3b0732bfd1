"""Cache of values that depend only on the faces of a mesh."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Generic, TypeVar

from torch import Tensor

Result = TypeVar("Result")


class FaceCache(Generic[Result]):
    """Cache of ``function(faces)`` for each faces tensor that still exists.

    The loss terms of one step share the result, and for a mesh with fixed topology it is computed only once.
    """

    def __init__(self, function: Callable[[Tensor], Result]) -> None:
        self._function = function
        self._known: dict[int, tuple[weakref.ref[Tensor], int, Result]] = {}

    def __call__(self, faces: Tensor) -> Result:
        """``function(faces)``; computed only if this tensor is new or was modified in place."""
        key = id(faces)
        known = self._known.get(key)
        if known is not None and known[0]() is faces and known[1] == faces._version:
            return known[2]
        result = self._function(faces)
        # The id can be reused once the tensor is deleted, so the entry is deleted with the tensor.
        reference = weakref.ref(faces, lambda dead: self._forget(key, dead))
        self._known[key] = (reference, faces._version, result)
        return result

    def __len__(self) -> int:
        return len(self._known)

    def _forget(self, key: int, dead: weakref.ref[Tensor]) -> None:
        if key in self._known and self._known[key][0] is dead:
            del self._known[key]

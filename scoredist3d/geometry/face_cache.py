"""What follows from a mesh's faces alone, kept while the tensor lives."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Generic, TypeVar

from torch import Tensor

Result = TypeVar("Result")


class FaceCache(Generic[Result]):
    """Remembers ``function(faces)`` for every tensor that is still alive.

    The terms of one step share what one of them has found, and a mesh whose faces never change keeps it for good.
    """

    def __init__(self, function: Callable[[Tensor], Result]) -> None:
        self._function = function
        self._known: dict[int, tuple[weakref.ref[Tensor], int, Result]] = {}

    def __call__(self, faces: Tensor) -> Result:
        """``function(faces)``, computed anew only where this tensor has not been seen or was written to."""
        key = id(faces)
        known = self._known.get(key)
        if known is not None and known[0]() is faces and known[1] == faces._version:
            return known[2]
        result = self._function(faces)
        # An id is free for another tensor once its owner is gone, so the entry goes with it.
        gone = weakref.ref(faces, lambda dead: self._forget(key, dead))
        self._known[key] = (gone, faces._version, result)
        return result

    def __len__(self) -> int:
        return len(self._known)

    def _forget(self, key: int, dead: weakref.ref[Tensor]) -> None:
        if key in self._known and self._known[key][0] is dead:
            del self._known[key]

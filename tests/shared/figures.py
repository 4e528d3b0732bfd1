"""Numbers of the faults that a session of pytest has caused, which ``tests/faults/conftest.py`` prints at its end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

FIGURES: Counter[str] = Counter()


def counted(kind: str, problems: Sequence[object]) -> None:
    """Count one fault of a kind, and a loss if it caused problems."""
    FIGURES[kind] += 1
    FIGURES["losses"] += bool(problems)

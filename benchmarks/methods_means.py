"""Means of the benchmark ``methods.py``: arithmetic means, their standard errors, and the table cells of both."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

ERROR = "_error"
"""Ending of the keys of standard errors: ``psnr_error`` is that of ``psnr``."""


def with_errors(values: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Mean of each list of independent values, and under ``<name>_error`` its standard error.

    The standard error is the sample standard deviation divided by the square root of the number of values. A single
    value has none, and an empty list has no mean either.
    """
    found: dict[str, Any] = {}
    for name, numbers in values.items():
        if numbers:
            found[name] = statistics.fmean(numbers)
        if len(numbers) > 1:
            found[name + ERROR] = statistics.stdev(numbers) / len(numbers) ** 0.5
    return found


def ratio_terms(values: Sequence[float], references: Sequence[float]) -> list[float]:
    """Terms whose mean is the ratio of two means and whose standard error is that of the ratio, to first order.

    Args:
        values: Numerators.
        references: As many denominators, whose mean is not 0; each belongs to the numerator in the same place.
    """
    reference = statistics.fmean(references)
    ratio = statistics.fmean(values) / reference
    return [ratio + (value - ratio * own) / reference for value, own in zip(values, references, strict=True)]


def shown(value: float | None, digits: int = 2) -> str:
    """A number as a table cell; empty for None."""
    return "" if value is None else f"{value:.{digits}f}"


def cell(row: Mapping[str, Any], name: str, digits: int = 2, *, scale: float = 1.0, error: bool = True) -> str:
    """A mean as a table cell, such as ``0.97 ± 0.01``; empty for a missing mean.

    Args:
        row: Means and standard errors as :func:`with_errors` returns them.
        name: Name of the mean.
        digits: Digits after the decimal point.
        scale: Factor of both numbers, e.g. 100 for percent.
        error: Whether to show the standard error, if there is one.
    """
    if row.get(name) is None:
        return ""
    deviation = f" ± {shown(scale * row[name + ERROR], digits)}" if error and name + ERROR in row else ""
    return shown(scale * row[name], digits) + deviation

"""Logged scalars of a run: collected as tensors, fetched in blocks and written to ``metrics.csv``."""

from __future__ import annotations

import csv
import io
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scoredist3d.files import naming, read_text, sync_file, write_atomically
from scoredist3d.guidance.core.checks import NonFiniteError
from scoredist3d.limits import MAX_METRICS_BYTES, check_file_size

MAX_PENDING = 100
"""Number of entries that wait on their device; it bounds the memory of a run with a large ``log.every_n_steps``."""


class MetricBuffer:
    """Buffer of per-step scalars, which stay on their device until :meth:`fetch`.

    ``add`` synchronizes with the device only once in :data:`MAX_PENDING` entries. ``fetch`` moves all pending scalars
    in one transfer and adds them to sums, which :meth:`mean_row` closes, so that a checkpoint between two rows can
    store the unfinished window.

    Attributes:
        latest: The newest fetched value of every scalar.
    """

    def __init__(self) -> None:
        self._pending: list[tuple[int, dict[str, Tensor | float]]] = []
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}
        self.latest: dict[str, float] = {}

    def add(self, step: int, scalars: dict[str, Tensor | float]) -> None:
        """Collect the scalars of one step: numbers, or one-element tensors, which are detached.

        Raises:
            NonFiniteError: As for :meth:`fetch`.
        """
        self._pending.append((step, {k: v.detach() if isinstance(v, Tensor) else v for k, v in scalars.items()}))
        if len(self._pending) >= MAX_PENDING:
            self.fetch()

    def fetch(self) -> None:
        """Move the pending scalars to the host.

        Raises:
            NonFiniteError: A scalar is NaN or infinite; the message names the first such step and a term of the loss.
        """
        if not self._pending:
            return
        tensors = [v.reshape(()) for _, row in self._pending for v in row.values() if isinstance(v, Tensor)]
        numbers = iter(torch.stack([t.to(torch.float64) for t in tensors]).tolist() if tensors else [])
        pending, self._pending = self._pending, []
        for step, row in pending:
            values = {k: next(numbers) if isinstance(v, Tensor) else float(v) for k, v in row.items()}
            broken = [key for key, value in values.items() if not math.isfinite(value)]
            if broken:  # The total, "loss", is the first value of a row, but it does not say which term is broken.
                raise NonFiniteError(step, next((key for key in broken if key != "loss"), "loss"))
            for key, number in values.items():
                self._sums[key] = self._sums.get(key, 0.0) + number
                self._counts[key] = self._counts.get(key, 0) + 1
                self.latest[key] = number

    def mean_row(self) -> dict[str, float]:
        """Close the window and return the mean of every scalar over the steps that reported it."""
        self.fetch()
        row = {key: total / self._counts[key] for key, total in self._sums.items()}
        self._sums, self._counts = {}, {}
        return row

    def state_dict(self) -> dict[str, Any]:
        """The sums and counts of the unfinished window; pending scalars are fetched first."""
        self.fetch()
        return {key: {"sum": total, "count": self._counts[key]} for key, total in self._sums.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore an unfinished window; earlier versions of the program stored lists of all values."""
        self._pending, self._sums, self._counts = [], {}, {}
        for key, entry in state.items():
            earlier = isinstance(entry, list)
            self._sums[key] = math.fsum(entry) if earlier else float(entry["sum"])
            self._counts[key] = len(entry) if earlier else int(entry["count"])


class MetricsFile:
    """Writer of ``metrics.csv``, which has one row per logging window and ``step`` as its first column.

    Rows are appended and flushed, so a killed run loses at most the row being written. Opening the file for a resumed
    run drops an incomplete last line and every row after the resumed step. A new scalar adds a column, for which the
    file is rewritten atomically.

    Raises:
        ValueError: The file of a resumed run is not a metrics file.
    """

    def __init__(self, path: Path, *, resume_step: int | None = None) -> None:
        self.path = path
        self.columns: list[str] = ["step"]
        if resume_step is not None and path.exists():
            _check_size(path)
            columns, rows = read_rows(path)
            # A spreadsheet may have moved the first column.
            self.columns += [name for name in dict.fromkeys(columns) if name != "step"]
            self._rewrite([row for row in rows if _step(row, path) <= resume_step])
        else:
            self._rewrite([])

    def append(self, step: int, row: dict[str, float]) -> None:
        """Append one row; values are written with full precision."""
        new = [key for key in row if key not in self.columns]
        if new:
            _, rows = read_rows(self.path)
            self.columns += new
            self._rewrite(rows)
        with naming(self.path), self.path.open("a", encoding="utf-8", newline="") as file:
            file.write(_line([str(step), *(_cell(row.get(key)) for key in self.columns[1:])]))

    def sync(self) -> None:
        """Make the rows durable, so that none that a checkpoint counts as written is lost in a power cut."""
        with naming(self.path):
            sync_file(self.path)

    def _rewrite(self, rows: list[dict[str, str]]) -> None:
        lines = [_line(self.columns)] + [_line([row.get(key, "") for key in self.columns]) for row in rows]
        write_atomically(self.path, "".join(lines))


def read_rows(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Columns and rows of a metrics file; an incomplete last line, left by a killed run, is skipped.

    Raises:
        ValueError: The file is not a CSV file in UTF-8.
    """
    text = read_text(path)
    text = text[: text.rfind("\n") + 1]
    reader = csv.DictReader(io.StringIO(text, newline=""))
    try:
        rows = [row for row in reader if None not in row and None not in row.values()]
    except csv.Error as error:
        raise ValueError(f"{path}: not a CSV file ({error}); rename it, and the run continues without it") from None
    return list(reader.fieldnames or []), rows


def _check_size(path: Path) -> None:
    try:
        check_file_size(path, MAX_METRICS_BYTES, "the metrics of a run that is resumed")
    except ValueError as error:
        raise ValueError(f"{error}; rename it, and the run continues without it") from None


def _step(row: dict[str, str], path: Path) -> int:
    try:
        return int(row["step"])
    except (KeyError, ValueError):
        raise ValueError(
            f"{path}: a row has no step, a whole number; rename the file, and the run continues without it"
        ) from None


def _line(cells: list[str]) -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerow(cells)
    return out.getvalue()


def _cell(value: float | None) -> str:
    return "" if value is None else repr(float(value))

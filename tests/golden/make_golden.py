"""Renew what the golden tests compare with: ``PYTHONPATH=.:tests python tests/golden/make_golden.py``.

Run it only where a change of results is meant, and say so in the changelog. ``--checkpoints`` also renews the kept
runs. That is never needed: they test that the program still reads runs of earlier versions.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from shared.golden_cases import (
    CHECKPOINTS,
    KEPT_RUNS,
    NAMES,
    SOURCE,
    VALUES,
    keep_run,
    run_case,
    run_pipeline,
    summary_of,
)


def main() -> None:
    """Train every case and store its summary."""
    with tempfile.TemporaryDirectory() as name:
        folder, values, source = Path(name), {}, None
        for case in sorted(NAMES, key=lambda case: case != SOURCE):
            run = run_case(case, folder / case, source)
            source = run if case == SOURCE else source
            values[case] = summary_of(run)
            if "--checkpoints" in sys.argv and case in KEPT_RUNS:
                keep_run(run, CHECKPOINTS / case.partition("/")[2], folder)
        if "--checkpoints" in sys.argv:
            keep_run(run_pipeline(folder / "pipeline"), CHECKPOINTS / "pipeline", folder)
    lines = (f"{json.dumps(case)}: {json.dumps(values[case])}" for case in NAMES)
    VALUES.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    print(f"{VALUES}: {len(values)} cases, {VALUES.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()

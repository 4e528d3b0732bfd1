#!/usr/bin/env python
"""Optimization time of each method's recipe in seconds, estimated from single steps spread over its schedule.

    python benchmarks/methods_steps.py                              # all recipes, 2D and 3D, on the CPU
    python benchmarks/methods_steps.py --methods sds vsd --gpu 0

The estimate is the mean time of the steps (after one warm-up step) times the recipe's number of steps; start-up, video
and export are not included. In 3D the scene is newly initialized, so the estimate is rough. Prints a table.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import methods_runs
from methods_runs import DIMENSIONS


def seconds(dimension: str, method: str, points: int, gpu: str) -> float:
    """Estimated seconds of a recipe's whole optimization."""
    # Editing a newly initialized scene takes as long as editing a finished one.
    start = ["system.init_from=outputs/source"] if dimension == "3d" and methods_runs.edits("3d", method) else []
    config = methods_runs.configured(dimension, method, "a red mug", start)
    last = config.trainer.max_steps
    mean, _ = methods_runs.time_steps(config, [0], [int(last * (i + 0.5) / points) for i in range(points)], gpu)
    return mean * last


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=[], help="recipes to time; all of them by default")
    parser.add_argument("--points", type=int, default=8, help="number of timed steps")
    parser.add_argument("--gpu", default="cpu", help="'cpu' or a GPU number")
    arguments = parser.parse_args(argv)
    rows = {d: methods_runs.recipes(d, arguments.methods) for d in DIMENSIONS}
    names = list(dict.fromkeys(name for found in rows.values() for name in found))
    print(f"on {methods_runs.device_name(arguments.gpu)}, {os.cpu_count()} CPU cores\n")
    print("| seconds | 2D | 3D |\n| --- | --- | --- |", flush=True)
    for name in names:
        cells = [
            f"{seconds(d, name, arguments.points, arguments.gpu):.0f}" if name in rows[d] else "" for d in DIMENSIONS
        ]
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

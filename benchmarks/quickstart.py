#!/usr/bin/env python
"""Time of the quickstart, phase by phase: prompt to turntable and GLB, each prompt in a fresh process.

    python benchmarks/quickstart.py                      # five prompts, native operators (a C compiler was found)
    python benchmarks/quickstart.py --no-compiler        # the same as on a machine without one
    python benchmarks/quickstart.py --gpu 0 --backends torch triton
    python benchmarks/quickstart.py --config configs/fast.yaml

Wall time is that of the whole process, interpreter start included; memory is the peak resident set of the process.
The seconds of a phase are summed over the stages of a pipeline. Arguments of the form key=value are config overrides.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from overrides import split_overrides
from summaries import phase_seconds, read_summary

ROOT = Path(__file__).resolve().parents[1]
PROMPTS = ("a red mug", "a blue chair", "a green pine tree", "a yellow house", "an orange rocket")


def run_once(prompt: str, output: Path, arguments: argparse.Namespace, overrides: list[str]) -> dict[str, float]:
    """Seconds of each phase and in all, and peak memory in GiB, of one run in its own process.

    Raises:
        RuntimeError: The run failed; its output is in the message.
    """
    environment = dict(os.environ, OMP_WAIT_POLICY="PASSIVE")
    if arguments.no_compiler:
        environment["SCOREDIST3D_NATIVE"] = "0"
    command = [sys.executable, str(ROOT / "launch.py"), "--config", str(arguments.config.resolve()), "--train"]
    command += [f"prompt={prompt}", f"output_root={output}", *overrides]
    if arguments.gpu:
        command += ["--gpu", arguments.gpu]
    began = time.perf_counter()
    process = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    wall = time.perf_counter() - began
    if process.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} exited with {process.returncode}:\n{process.stdout}\n{process.stderr}")
    run = min(output.rglob("summary.json"), key=lambda path: len(path.parts)).parent  # not that of a stage
    summary = read_summary(run)
    phases = phase_seconds(summary)
    phases["interpreter and imports"] = wall - sum(phases.values())
    return {**phases, "wall": wall, "peak GiB": summary["peak_memory_gib"]}


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark and print a Markdown table; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = ROOT / "configs" / "quickstart.yaml"
    parser.add_argument("--config", type=Path, default=default, help="recipe, a run or a pipeline")
    parser.add_argument("--prompts", nargs="+", default=list(PROMPTS))
    parser.add_argument("--no-compiler", action="store_true", help="use the torch operators, as where no C compiler is")
    parser.add_argument("--gpu", default="cpu", help="as for launch.py")
    parser.add_argument("--backends", nargs="+", default=["auto"], help="hash grid backends to compare")
    options, overrides = split_overrides(argv)
    arguments = parser.parse_args(options)
    machine = platform.processor() or platform.machine()
    print(f"{arguments.config.stem}: {machine}, {os.cpu_count()} cores, Python {platform.python_version()}")
    for backend in arguments.backends:
        chosen = [*overrides, *([] if backend == "auto" else [f"system.geometry.grid.backend={backend}"])]
        rows = []
        for prompt in arguments.prompts:
            with tempfile.TemporaryDirectory() as folder:
                rows.append(run_once(prompt, Path(folder), arguments, chosen))
            print(f"  {prompt}: {rows[-1]['wall']:.1f} s, {rows[-1]['peak GiB']:.2f} GiB", flush=True)
        label = f"backend {backend}" + (", no compiler" if arguments.no_compiler else "")
        print(f"\n| phase ({label}, median of {len(rows)}) | |\n| --- | --- |")
        for name in rows[0]:
            unit = "GiB" if name == "peak GiB" else "s"
            print(f"| {name.removesuffix(' GiB')} | {statistics.median(row[name] for row in rows):.2f} {unit} |")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

#!/usr/bin/env python
"""Time of the quickstart, stage by stage: prompt to turntable and GLB, each prompt in a fresh process.

    python benchmarks/quickstart.py                      # five prompts, native operators (a C compiler was found)
    python benchmarks/quickstart.py --no-compiler        # the same as on a machine without one
    python benchmarks/quickstart.py --gpu 0 --backends torch triton

Wall time is that of the whole process, interpreter start included; memory is the peak resident set of the process.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PROMPTS = ("a red mug", "a blue chair", "a green pine tree", "a yellow house", "an orange rocket")


def run_once(prompt: str, output: Path, arguments: argparse.Namespace, overrides: list[str]) -> dict[str, float]:
    """Seconds of each stage and in all, and peak memory in GiB, of one run in its own process.

    Raises:
        RuntimeError: The run failed; its output is in the message.
    """
    environment = dict(os.environ, OMP_WAIT_POLICY="PASSIVE")
    if arguments.no_compiler:
        environment["SCOREDIST3D_NATIVE"] = "0"
    command = [
        sys.executable,
        str(ROOT / "launch.py"),
        "--config",
        str(ROOT / "configs" / "quickstart.yaml"),
        "--train",
    ]
    command += [f"prompt={prompt}", f"output_root={output}", *overrides]
    if arguments.gpu:
        command += ["--gpu", arguments.gpu]
    began = time.perf_counter()
    process = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    wall = time.perf_counter() - began
    if process.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} exited with {process.returncode}:\n{process.stdout}\n{process.stderr}")
    (summary_path,) = sorted(output.rglob("summary.json"))[-1:]
    summary = json.loads(summary_path.read_text())
    stages: dict[str, float] = dict(summary["seconds"])
    stages["interpreter and imports"] = wall - sum(stages.values())
    return {**stages, "wall": wall, "peak GiB": summary["peak_memory_gib"]}


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark and print a Markdown table; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", nargs="+", default=list(PROMPTS))
    parser.add_argument("--no-compiler", action="store_true", help="use the torch operators, as where no C compiler is")
    parser.add_argument("--gpu", default="cpu", help="as for launch.py")
    parser.add_argument("--backends", nargs="+", default=["auto"], help="hash grid backends to compare")
    parser.add_argument("overrides", nargs="*", help="further config overrides, key=value")
    arguments, overrides = parser.parse_known_args(argv)
    overrides += arguments.overrides
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    for backend in arguments.backends:
        chosen = [*overrides, f"system.geometry.grid.backend={backend}"]
        rows = []
        for prompt in arguments.prompts:
            with tempfile.TemporaryDirectory() as folder:
                rows.append(run_once(prompt, Path(folder), arguments, chosen))
            print(f"  {prompt}: {rows[-1]['wall']:.1f} s, {rows[-1]['peak GiB']:.2f} GiB", flush=True)
        label = f"backend {backend}" + (", no compiler" if arguments.no_compiler else "")
        print(f"\n| stage ({label}, median of {len(rows)}) | |\n| --- | --- |")
        for name in rows[0]:
            unit = "GiB" if name == "peak GiB" else "s"
            print(f"| {name.removesuffix(' GiB')} | {statistics.median(row[name] for row in rows):.2f} {unit} |")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

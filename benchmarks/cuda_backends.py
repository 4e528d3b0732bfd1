#!/usr/bin/env python
"""The recipe ``fast`` on every backend that a GPU has: same scene, how fast?

    python benchmarks/cuda_backends.py --gpu 0 --prompt "a red mug"

Runs the recipe once per backend with the same seed (backends whose package is missing are named and left out) and
prints time per step, the probe's reading of 8 views and the PSNR between those views and the torch run's. Rounding
differs between backends and optimization amplifies it, so the scenes agree as two good solutions do, not bit by bit;
that single renders and gradients agree is tested in ``tests/ops`` and ``tests/renderers``.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import torch
from quickstart_quality import NUM_VIEWS, measure

from scoredist3d.config.validation import load_experiment
from scoredist3d.evaluation.fidelity import psnr
from scoredist3d.evaluation.true_objects import Stated
from scoredist3d.ops.backends import missing
from scoredist3d.training.run import run_training

COMBINATIONS = (("torch", "torch"), ("triton", "triton"), ("triton", "nerfacc"), ("tinycudann", "triton"))


def main(argv: list[str] | None = None) -> int:
    """Run the comparison and print a Markdown table; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", default="a red mug")
    parser.add_argument("--gpu", type=int, default=0)
    arguments, overrides = parser.parse_known_args(argv)
    device = torch.device("cuda", arguments.gpu)
    rows, reference = [], None
    for grid, march in COMBINATIONS:
        problem = missing(grid) or missing(march)
        if problem:
            print(f"{grid} + {march}: left out, {problem}")
            continue
        with tempfile.TemporaryDirectory() as folder:
            chosen = [
                f"system.geometry.grid.backend={grid}",
                f"system.renderer.backend={march}",
                f"output_root={folder}",
            ]
            config = load_experiment(
                [ROOT / "configs" / "fast.yaml"], [f"prompt={arguments.prompt}", *chosen, *overrides]
            )
            result = run_training(config, devices=[arguments.gpu])
            figures, views = measure(result.system, Stated.of(arguments.prompt), device)
        reference = views if reference is None else reference
        agreement = psnr(views, reference)
        milliseconds = 1000.0 * result.seconds["training"] / result.step
        rows.append((grid, march, milliseconds, figures["category"], figures["color"], figures["iou"], agreement))
    print(
        f"\n{torch.cuda.get_device_name(device)}, torch {torch.__version__}, {arguments.prompt!r}, {NUM_VIEWS} views\n"
    )
    print("| hash grid | marching, compositing | ms/step | category | color | IoU | PSNR against torch, dB |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for grid, march, milliseconds, category, color, iou, agreement in rows:
        same = "-" if agreement > 90 else f"{agreement:.1f}"
        print(f"| {grid} | {march} | {milliseconds:.1f} | {category:.2f} | {color:.2f} | {iou:.2f} | {same} |")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

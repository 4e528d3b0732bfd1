#!/usr/bin/env python
"""Train the reader of short words on renders of signs and mugs, and test it on held-out words.

The state is saved to ``--work`` once a minute; the same command resumes an interrupted training.

    python scripts/train_reader.py --work runs/reader --out scoredist3d/assets/reader
    python scripts/train_reader.py --work runs/mini --out runs/mini/reader --miniature   # seconds, on a CPU (tests)
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import torch
from prior_training.reader import LetteredPool, evaluate_reader, train_reader


def main(argv: list[str] | None = None) -> int:
    """Train, save and evaluate the reader."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--work", type=Path, required=True, help="folder of the training state")
    parser.add_argument("--out", type=Path, required=True, help="folder of the trained reader")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--pool", type=int, default=16384, help="images that are rendered at a time")
    parser.add_argument("--refill-every", type=int, default=2000, help="steps between two fillings of the pool")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true", help="compile the ray caster; pays off for many fillings")
    parser.add_argument("--miniature", action="store_true", help="a few steps on a few small images")
    options = parser.parse_args(argv)
    device = torch.device(options.device)
    steps, batch, count, width, antialias = options.steps, options.batch, options.pool, 24, 2
    size, compile_ = 128, options.compile
    if options.miniature:
        steps, batch, count, width, antialias, size, compile_ = 4, 4, 6, 8, 1, 32, False

    def pool(seed: int, images: int, *, held_out: bool) -> LetteredPool:
        return LetteredPool(
            images,
            image_size=size,
            antialias=antialias,
            seed=seed,
            device=device,
            held_out=held_out,
            compile_=compile_,
        )

    options.work.mkdir(parents=True, exist_ok=True)
    reader = train_reader(
        pool(options.seed, count, held_out=False),
        steps=steps,
        batch=batch,
        work=options.work,
        generator=torch.Generator(device).manual_seed(options.seed),
        width=width,
        refill_every=options.refill_every,
    )
    reader.save(options.out)
    unseen = pool(options.seed + 1, min(count, 4096), held_out=True)
    unseen.fill(0)
    report = {
        "steps": steps,
        "held_out": evaluate_reader(reader.eval(), unseen, degraded=False),
        "held_out_degraded": evaluate_reader(reader, unseen, degraded=True),
    }
    (options.work / "reader.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

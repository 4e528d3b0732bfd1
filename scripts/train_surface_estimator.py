#!/usr/bin/env python
"""Train the surface estimator, which estimates normals and depths from images of the embedded prior.

The state is saved to ``--work`` once a minute; the same command resumes an interrupted training.

    python scripts/train_surface_estimator.py --work runs/surface --out scoredist3d/assets
    python scripts/train_surface_estimator.py --work runs/mini --out runs/mini/assets --miniature   # tests, on a CPU

Three quarters of the images are renders that got noise and were denoised by the prior in a few steps, so that the
estimator knows the prior's blur and its inaccuracies. The normals and depths are those of the renders.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import torch
from prior_training.acceleration import accelerate
from prior_training.commands import recipe_of, training_device, training_parser
from prior_training.common import load_state
from prior_training.surface import SurfacePool, evaluate_surface_estimator, train_surface_estimator

from scoredist3d import registry
from scoredist3d.config.validation import parse_component
from scoredist3d.files import write_atomically
from scoredist3d.priors import Prior
from scoredist3d.procedural.surface_estimator import SurfaceEstimator


@dataclass(frozen=True)
class Recipe:
    """Sizes of a training run; see the card of the packaged weights for theirs."""

    views: int = 60_000
    refills: int = 2
    steps: int = 20_000
    batch: int = 256
    minutes: float = 0.0
    held_out: int = 2048
    denoise_steps: int = 4
    antialias: int = 2
    peak_lr: float = 2e-3
    hold: float = 0.4
    seed: int = 0
    channels: str = "40,56,80,96"

    @classmethod
    def miniature(cls) -> Recipe:
        """Sizes for tests, which train in seconds."""
        return cls(views=6, refills=1, steps=4, batch=3, held_out=4, denoise_steps=2, antialias=1, channels="8,8")


def main(argv: list[str] | None = None) -> int:
    """Train, evaluate and write the estimator; returns the exit code."""
    arguments = training_parser(__doc__, Recipe(), "surface-estimator/").parse_args(argv)
    recipe: Recipe = recipe_of(arguments, Recipe)
    device, compile_ = training_device(arguments)
    arguments.work.mkdir(parents=True, exist_ok=True)
    folder = arguments.out / SurfaceEstimator.name
    began = time.monotonic()
    if arguments.init is not None:
        estimator = SurfaceEstimator.load(arguments.init / SurfaceEstimator.name)
    else:
        with torch.random.fork_rng():
            torch.manual_seed(recipe.seed)  # library modules draw their initial weights from the global stream
            estimator = SurfaceEstimator([int(count) for count in recipe.channels.split(",")])
    if arguments.export_only:
        return export_state(arguments.work, folder, estimator, device)
    block = {"type": "diffusers", "pretrained_model_name_or_path": "embedded"}
    prior: Prior = registry.build(parse_component("prior", block))
    prior = prior.requires_grad_(False).to(device)
    accelerate(prior)

    def pool(count: int, seed: int) -> SurfacePool:
        return SurfacePool(
            prior,
            count,
            seed=seed,
            antialias=recipe.antialias,
            denoise_steps=recipe.denoise_steps,
            compile_=compile_,
        )

    trained = train_surface_estimator(
        pool(recipe.views, recipe.seed),
        estimator,
        steps=recipe.steps,
        batch=recipe.batch,
        refills=recipe.refills,
        minutes=recipe.minutes,
        work=arguments.work,
        generator=torch.Generator(device).manual_seed(recipe.seed + 1),
        peak_lr=recipe.peak_lr,
        hold=recipe.hold,
    )
    trained.save(folder)
    held_out = pool(recipe.held_out, recipe.seed + 500).fill(0)
    measured = evaluate_surface_estimator(trained.eval(), held_out)
    report = {"recipe": asdict(recipe), "held_out": measured, "seconds": round(time.monotonic() - began)}
    write_atomically(arguments.work / "surface-estimator.json", json.dumps(report, indent=2) + "\n")
    print(json.dumps(report), flush=True)
    return 0


def export_state(work: Path, folder: Path, estimator: SurfaceEstimator, device: torch.device) -> int:
    """Write the averaged weights of an unfinished training; returns the exit code."""
    state = load_state(work / "surface-estimator.pt", device)
    if state is None:
        print(f"--work: {work} contains no saved state yet; train first", file=sys.stderr)
        return 1
    estimator.load_state_dict(state["emas"]["estimator"])
    estimator.save(folder)
    print(f"exported step {state['step']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

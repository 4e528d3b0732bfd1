#!/usr/bin/env python
"""Train the embedded flow prior, a miniature of Stable Diffusion 3, from scratch on procedural objects.

Every stage saves its state to ``--work`` once a minute; the same command resumes an interrupted training.

    python scripts/train_flow_prior.py --work runs/flow --out scoredist3d/assets --vae scoredist3d/assets/prior/vae
    python scripts/train_flow_prior.py --work runs/mini --out runs/mini/assets --miniature   # seconds, on a CPU (tests)

The stages are: rendering a pool of captioned views, with signs and mugs that carry words; the autoencoder, unless
``--vae`` names a trained one; the transformer with its text encoders; export as fp16 safetensors in the layout of
StableDiffusion3Pipeline, which loads the folder with ``text_encoder_3=None, tokenizer_3=None``. A long training is
split into commands of a few minutes, each of which continues from the exported prior of the last one:

    python scripts/train_flow_prior.py --work W1 --out P1 --vae VAE --flow-minutes 8 --seed 1 --hold 1
    python scripts/train_flow_prior.py --work W2 --out P2 --init P1 --flow-minutes 8 --seed 2 --hold 0
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import torch
from diffusers import AutoencoderKL
from prior_training.acceleration import accelerate
from prior_training.commands import recipe_of, training_device, training_parser
from prior_training.common import load_exported, load_state
from prior_training.flow import FlowModel, LetteredViews, Sources, standardize, train_flow
from prior_training.flow_models import FlowSizes, build_clip, build_transformer, save_flow_prior, zero_modulation
from prior_training.models import PriorSizes, build_vae
from prior_training.pool import Pool, build_pool
from prior_training.vae import train_vae
from transformers import CLIPTokenizer

from scoredist3d.procedural import build_tokenizer

FOLDER = "prior-flow"
STANDARD_IMAGES = 2048
"""Number of images from which the mean and the standard deviation of latents are computed."""


@dataclass(frozen=True)
class Recipe:
    """Sizes of a training run."""

    objects: int = 40_000
    scenes: int = 6_000
    lettered: int = 30_000
    lettered_share: float = 0.4
    views: int = 4
    patterned: float = 0.0
    refreshes: int = 0
    vae_steps: int = 13_000
    vae_batch: int = 128
    vae_minutes: float = 0.0
    flow_steps: int = 12_000
    flow_batch: int = 1024
    flow_minutes: float = 0.0
    peak_lr: float = 1e-3
    hold: float = 0.5
    antialias: int = 2
    seed: int = 0

    @classmethod
    def miniature(cls) -> Recipe:
        """Sizes for tests, which train in seconds."""
        return cls(
            objects=8,
            scenes=2,
            lettered=4,
            views=2,
            refreshes=1,
            vae_steps=4,
            vae_batch=4,
            flow_steps=6,
            flow_batch=8,
            antialias=1,
        )


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Options of the command line; every field of the recipe is an option."""
    parser = training_parser(__doc__, Recipe(), f"{FOLDER}/")
    parser.add_argument("--vae", type=Path, help="folder of a trained autoencoder, e.g. scoredist3d/assets/prior/vae")
    return parser.parse_args(argv)


@dataclass(frozen=True)
class Run:
    """One training run: its recipe, sizes, folders and device."""

    recipe: Recipe
    sizes: FlowSizes
    images: PriorSizes
    work: Path
    out: Path
    device: torch.device
    compile_: bool

    def note(self, text: str) -> None:
        """Print a line of progress."""
        print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


def main(argv: list[str] | None = None) -> int:
    """Run or resume the training; returns the exit code."""
    arguments = parse_arguments(argv)
    device, compile_ = training_device(arguments)
    run = Run(
        recipe_of(arguments, Recipe),
        FlowSizes.miniature() if arguments.miniature else FlowSizes(),
        PriorSizes.miniature() if arguments.miniature else PriorSizes(),
        arguments.work,
        arguments.out,
        device,
        compile_,
    )
    run.work.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer(run.work / "tokenizer")
    return export_state(run, tokenizer) if arguments.export_only else train(run, tokenizer, arguments)


def train(run: Run, tokenizer: CLIPTokenizer, arguments: argparse.Namespace) -> int:
    """Run all stages and write the prior; finished stages are loaded from the work folder."""
    began = time.monotonic()
    recipe = run.recipe
    generator = torch.Generator(run.device).manual_seed(recipe.seed + 1)
    run.note(f"{json.dumps(asdict(recipe))} on {run.device}")
    pool = build_pool(recipe, tokenizer, run.images.image_size, run.device, run.compile_)
    pool.fill(0)
    run.note(f"pool of {pool.count:,} views rendered")
    init = None if arguments.init is None else arguments.init / FOLDER
    vae = autoencoder(run, pool, generator, arguments.vae, init)
    run.note(f"autoencoder: scaling {vae.config.scaling_factor}, shift {vae.config.shift_factor}")
    pool.encode_with(vae)
    run.note("pool encoded")
    sources: Sources = [(pool, 1.0 - recipe.lettered_share), (LetteredViews(pool), recipe.lettered_share)]
    model = build_model(run, vae, tokenizer)
    if init is not None:
        load_model(model, init)
    averaged = train_flow(
        model,
        sources,
        shift=run.sizes.shift,
        offset=vae.config.shift_factor * vae.config.scaling_factor,
        steps=recipe.flow_steps,
        batch=recipe.flow_batch,
        work=run.work,
        generator=generator,
        compile_=run.compile_,
        refreshes=recipe.refreshes,
        minutes=recipe.flow_minutes,
        peak_lr=recipe.peak_lr,
        hold=recipe.hold,
    )
    export(run, vae, averaged)
    facts = {"recipe": asdict(recipe), "seconds": round(time.monotonic() - began), "device": str(run.device)}
    (run.work / "recipe.json").write_text(json.dumps(facts, indent=2))
    run.note(f"prior written to {run.out / FOLDER}")
    return 0


def autoencoder(
    run: Run, pool: Pool, generator: torch.Generator, trained: Path | None, init: Path | None
) -> AutoencoderKL:
    """The autoencoder with standardized latents.

    The first of these is used: a finished one in the work folder, that of the prior ``init``, the one in ``trained``, a
    newly trained one. The scaling factor of the first two must not change between commands.
    """
    finished = run.work / "vae"
    source = finished if finished.is_dir() else trained if init is None else init / "vae"
    if source is not None:
        vae = AutoencoderKL.from_pretrained(source, torch_dtype=torch.float32).to(run.device)
    else:
        recipe = run.recipe
        with torch.random.fork_rng():
            torch.manual_seed(recipe.seed)  # library modules draw their initial weights from the global stream
            vae = build_vae(run.images)
        vae = train_vae(
            vae,
            pool,
            steps=recipe.vae_steps,
            batch=recipe.vae_batch,
            work=run.work,
            generator=generator,
            minutes=recipe.vae_minutes,
        )
    accelerate(vae.requires_grad_(False))
    if not finished.is_dir() and init is None:
        index = pool.random_index(min(pool.count, STANDARD_IMAGES), generator, lettered=True)
        standardize(vae, pool.images_at(index))
    if not finished.is_dir():
        vae.save_pretrained(finished)
    return vae


def load_model(model: FlowModel, folder: Path) -> None:
    """Load the weights of an exported prior."""
    for name, part in (("transformer", "transformer"), ("clip", "text_encoder"), ("clip_2", "text_encoder_2")):
        load_exported(getattr(model, name), folder / part)


def build_model(run: Run, vae: AutoencoderKL, tokenizer: CLIPTokenizer) -> FlowModel:
    """The untrained transformer and text encoders."""
    with torch.random.fork_rng():
        torch.manual_seed(run.recipe.seed)  # library modules draw their initial weights from the global stream
        transformer = build_transformer(run.sizes, vae.config.latent_channels, run.images.latent_size)
        zero_modulation(transformer)
        return FlowModel(transformer, build_clip(run.sizes, tokenizer), build_clip(run.sizes, tokenizer))


def export(run: Run, vae: AutoencoderKL, model: FlowModel) -> None:
    """Write the prior's folder."""
    save_flow_prior(
        run.out / FOLDER,
        vae=vae,
        transformer=model.transformer,
        text_encoders=(model.clip, model.clip_2),
        tokenizer=run.work / "tokenizer",
        shift=run.sizes.shift,
    )


def export_state(run: Run, tokenizer: CLIPTokenizer) -> int:
    """Write the averaged weights of an unfinished training; returns the exit code."""
    state = load_state(run.work / "flow.pt", run.device)
    if state is None or not (run.work / "vae").is_dir():
        print(f"--work: {run.work} contains no saved flow state yet; train first", file=sys.stderr)
        return 1
    vae = AutoencoderKL.from_pretrained(run.work / "vae")
    model = build_model(run, vae, tokenizer)
    model.load_state_dict(state["emas"]["flow"])
    export(run, vae, model)
    print(f"exported step {state['step']}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

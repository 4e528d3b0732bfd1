#!/usr/bin/env python
"""Train the embedded flow prior, a miniature of Stable Diffusion 3, from scratch on procedural objects.

Every stage saves its state to ``--work`` once a minute; the same command resumes an interrupted training.

    python scripts/train_flow_prior.py --work runs/flow --out scoredist3d/assets           # on one H100 or H200
    python scripts/train_flow_prior.py --work runs/mini --out runs/mini/assets --miniature  # seconds, on a CPU (tests)

The stages are: rendering a pool of captioned views and a second one of signs and mugs with words; the autoencoder,
unless ``--vae`` names a trained one; the transformer with its text encoders; export as fp16 safetensors in the layout
of StableDiffusion3Pipeline. diffusers loads the folder with ``text_encoder_3=None, tokenizer_3=None``.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import torch
from diffusers import AutoencoderKL
from prior_training.common import load_state
from prior_training.flow import FlowModel, standardize, train_flow
from prior_training.flow_models import FlowSizes, build_clip, build_transformer, save_flow_prior, zero_modulation
from prior_training.models import PriorSizes, build_vae
from prior_training.pool import Pool
from prior_training.vae import train_vae
from transformers import CLIPTokenizer

from scoredist3d.procedural import build_tokenizer

FOLDER = "prior-flow"
STANDARD_IMAGES = 2048
"""Number of images from which the mean and the standard deviation of latents are computed."""


@dataclass(frozen=True)
class Recipe:
    """Sizes of a training run."""

    objects: int = 160_000
    views: int = 5
    refreshes: int = 0
    lettered_objects: int = 200_000
    lettered_share: float = 0.4
    vae_steps: int = 3500
    vae_batch: int = 256
    flow_steps: int = 12_000
    flow_batch: int = 1024
    flow_minutes: float = 0.0
    peak_lr: float = 1e-3
    antialias: int = 2
    seed: int = 0

    @classmethod
    def miniature(cls) -> Recipe:
        """Sizes for tests, which train in seconds."""
        return cls(
            objects=28,
            views=2,
            refreshes=1,
            lettered_objects=8,
            vae_steps=4,
            vae_batch=4,
            flow_steps=6,
            flow_batch=8,
            antialias=1,
        )


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Options of the command line; every field of the recipe is an option."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the training states")
    parser.add_argument("--out", type=Path, required=True, help=f"target folder of {FOLDER}/")
    parser.add_argument("--vae", type=Path, help="folder of a trained autoencoder, e.g. scoredist3d/assets/prior/vae")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--miniature", action="store_true", help="use tiny networks and a few steps, for tests")
    parser.add_argument(
        "--no-compile", action="store_true", help="do not use torch.compile, which is the default on CUDA"
    )
    parser.add_argument(
        "--export-only", action="store_true", help="only export the averaged weights of the last saved state"
    )
    for name, default in asdict(Recipe()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=None, help=f"default {default}")
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
    base = Recipe.miniature() if arguments.miniature else Recipe()
    changed = {name: value for name in asdict(base) if (value := getattr(arguments, name)) is not None}
    device = torch.device(arguments.device)
    run = Run(
        Recipe(**{**asdict(base), **changed}),
        FlowSizes.miniature() if arguments.miniature else FlowSizes(),
        PriorSizes.miniature() if arguments.miniature else PriorSizes(),
        arguments.work,
        arguments.out,
        device,
        device.type == "cuda" and not arguments.no_compile,
    )
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
    run.work.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer(run.work / "tokenizer")
    return export_state(run, tokenizer) if arguments.export_only else train(run, tokenizer, arguments.vae)


def train(run: Run, tokenizer: CLIPTokenizer, vae_folder: Path | None) -> int:
    """Run all stages and write the prior; finished stages are loaded from the work folder."""
    began = time.monotonic()
    recipe = run.recipe
    generator = torch.Generator(run.device).manual_seed(recipe.seed + 1)
    run.note(f"{json.dumps(asdict(recipe))} on {run.device}")
    pools = build_pools(run, tokenizer)
    for pool, _ in pools:
        pool.fill(0)
        run.note(f"{type(pool).__name__} of {pool.count:,} views rendered")
    vae = autoencoder(run, pools, generator, vae_folder)
    run.note(f"autoencoder: scaling {vae.config.scaling_factor}, shift {vae.config.shift_factor}")
    for pool, _ in pools:
        pool.encode_with(vae)
    run.note("pools encoded")
    model = build_model(run, vae, tokenizer)
    averaged = train_flow(
        model,
        pools,
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
    )
    export(run, vae, averaged)
    facts = {"recipe": asdict(recipe), "seconds": round(time.monotonic() - began), "device": str(run.device)}
    (run.work / "recipe.json").write_text(json.dumps(facts, indent=2))
    run.note(f"prior written to {run.out / FOLDER}")
    return 0


def build_pools(run: Run, tokenizer: CLIPTokenizer) -> list[tuple[Any, float]]:
    """The empty pools of training views with their shares of each batch."""
    recipe = run.recipe
    shared: dict[str, Any] = {
        "image_size": run.images.image_size,
        "antialias": recipe.antialias,
        "seed": recipe.seed,
        "device": run.device,
        "compile_": run.compile_,
    }
    pools: list[tuple[Any, float]] = [
        (Pool(tokenizer, objects=recipe.objects, views=recipe.views, **shared), 1.0 - recipe.lettered_share)
    ]
    if recipe.lettered_share > 0.0:
        from prior_training.lettered import LetteredPool

        lettered = LetteredPool(tokenizer, objects=recipe.lettered_objects, **shared)
        pools.append((lettered, recipe.lettered_share))
    return pools


def autoencoder(
    run: Run, pools: list[tuple[Any, float]], generator: torch.Generator, folder: Path | None
) -> AutoencoderKL:
    """The autoencoder with standardized latents, loaded from ``folder`` if given, otherwise trained on the first pool.

    A finished one is loaded from the work folder: its scaling factor must not change between sessions.
    """
    finished = run.work / "vae"
    if finished.is_dir():
        vae = AutoencoderKL.from_pretrained(finished).to(run.device)
    else:
        if folder is not None:
            vae = AutoencoderKL.from_pretrained(folder, torch_dtype=torch.float32).to(run.device)
        else:
            with torch.random.fork_rng():
                torch.manual_seed(run.recipe.seed)  # library modules draw their initial weights from the global stream
                vae = build_vae(run.images)
            steps, batch = run.recipe.vae_steps, run.recipe.vae_batch
            first = pools[0][0]
            shared: dict[str, Any] = {"work": run.work, "generator": generator, "compile_": run.compile_}
            vae = train_vae(vae, first, steps=steps, batch=batch, **shared)
        images = [pool.random_images(max(1, round(share * STANDARD_IMAGES)), generator) for pool, share in pools]
        standardize(vae, torch.cat(images))
        vae.save_pretrained(finished)
    vae.eval().requires_grad_(False)
    return vae


def build_model(run: Run, vae: AutoencoderKL, tokenizer: CLIPTokenizer) -> FlowModel:
    """The untrained transformer and text encoders."""
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    with torch.random.fork_rng():
        torch.manual_seed(run.recipe.seed)  # library modules draw their initial weights from the global stream
        transformer = build_transformer(run.sizes, vae.config.latent_channels, run.images.image_size // factor)
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

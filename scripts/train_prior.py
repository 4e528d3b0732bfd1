#!/usr/bin/env python
"""Train the embedded prior and its probe from scratch on procedural objects.

Every stage saves its state to ``--work`` once a minute; the same command resumes an interrupted training.

    python scripts/train_prior.py --work runs/prior --out scoredist3d/assets           # as published, on one H100
    python scripts/train_prior.py --work runs/mini --out runs/mini/assets --miniature   # seconds, on a CPU (tests)

The stages are: rendering a pool of captioned views; the autoencoder; the probe; the denoiser with its text encoder,
during which the pool may be replaced by new views (``--refreshes``); export as fp16 safetensors in diffusers format.
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
from prior_training.denoiser import Denoiser, train_denoiser
from prior_training.models import PriorSizes, build_text_encoder, build_unet, build_vae, save_prior
from prior_training.pool import Pool
from prior_training.probe import save_probe, train_probe
from prior_training.vae import reconstruction_psnr, train_vae
from transformers import CLIPTokenizer

from scoredist3d.procedural import build_tokenizer


@dataclass(frozen=True)
class Recipe:
    """Sizes of a training run.

    The weights of the package were trained with the defaults and ``--denoiser-minutes 10``, which gave 7,676 steps.
    """

    objects: int = 160_000
    views: int = 5
    refreshes: int = 0
    vae_steps: int = 3500
    vae_batch: int = 256
    probe_steps: int = 1800
    probe_batch: int = 512
    denoiser_steps: int = 9000
    denoiser_batch: int = 1024
    denoiser_minutes: float = 0.0
    probe_width: int = 24
    antialias: int = 2
    seed: int = 0

    @classmethod
    def miniature(cls) -> Recipe:
        """Sizes for tests, which train in seconds."""
        return cls(
            objects=28,
            views=2,
            refreshes=1,
            vae_steps=6,
            vae_batch=8,
            probe_steps=6,
            probe_batch=8,
            denoiser_steps=6,
            denoiser_batch=8,
            probe_width=8,
            antialias=1,
        )


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Options of the command line; every field of the recipe is an option."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the training states")
    parser.add_argument("--out", type=Path, required=True, help="target folder of prior/ and probe/")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--miniature", action="store_true", help="use tiny networks and a few steps, for tests")
    parser.add_argument(
        "--no-compile", action="store_true", help="do not use torch.compile, which is the default on CUDA"
    )
    parser.add_argument(
        "--export-only", action="store_true", help="only export the averaged weights of the last saved states"
    )
    for name, default in asdict(Recipe()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=None, help=f"default {default}")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run or resume the training; returns the exit code."""
    arguments = parse_arguments(argv)
    base = Recipe.miniature() if arguments.miniature else Recipe()
    changed = {name: value for name in asdict(base) if (value := getattr(arguments, name)) is not None}
    recipe = Recipe(**{**asdict(base), **changed})
    sizes = PriorSizes.miniature() if arguments.miniature else PriorSizes()
    device = torch.device(arguments.device)
    compile_ = device.type == "cuda" and not arguments.no_compile
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
    arguments.work.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer(arguments.work / "tokenizer")
    vae, denoiser = build_networks(sizes, tokenizer, recipe.seed)
    if arguments.export_only:
        return export_states(arguments.work, arguments.out / "prior", denoiser, device)
    train(recipe, sizes, tokenizer, vae, denoiser, arguments.work, arguments.out, device, compile_)
    return 0


def build_networks(sizes: PriorSizes, tokenizer: CLIPTokenizer, seed: int) -> tuple[AutoencoderKL, Denoiser]:
    """The untrained autoencoder and denoiser."""
    special = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id, "pad": tokenizer.pad_token_id}
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # library modules draw their initial weights from the global stream
        vae = build_vae(sizes)
        denoiser = Denoiser(
            build_unet(sizes, sizes.image_size // 4),
            build_text_encoder(sizes, len(tokenizer), tokenizer.model_max_length, special),
        )
    return vae, denoiser


def build_pool(
    recipe: Recipe, sizes: PriorSizes, tokenizer: CLIPTokenizer, device: torch.device, compile_: bool
) -> Pool:
    """The empty pool of training views."""
    return Pool(
        tokenizer,
        objects=recipe.objects,
        views=recipe.views,
        image_size=sizes.image_size,
        antialias=recipe.antialias,
        seed=recipe.seed,
        device=device,
        compile_=compile_,
    )


def train(
    recipe: Recipe,
    sizes: PriorSizes,
    tokenizer: CLIPTokenizer,
    vae: AutoencoderKL,
    denoiser: Denoiser,
    work: Path,
    out: Path,
    device: torch.device,
    compile_: bool,
) -> None:
    """Run all stages and write the prior and the probe to ``out``; finished stages are loaded from ``work``."""
    began = time.monotonic()

    def note(text: str) -> None:
        print(f"[{time.monotonic() - began:7.1f} s] {text}", flush=True)

    generator = torch.Generator(device).manual_seed(recipe.seed + 1)
    pool = build_pool(recipe, sizes, tokenizer, device, compile_)
    shared: dict[str, Any] = {"work": work, "generator": generator}
    note(f"{json.dumps(asdict(recipe))} on {device}")
    pool.fill(0)
    note(f"pool of {pool.count:,} views rendered")
    if (work / "vae").is_dir():  # finished earlier; its scaling factor must not change between sessions
        vae = AutoencoderKL.from_pretrained(work / "vae").to(device)
    else:
        vae = train_vae(vae, pool, steps=recipe.vae_steps, batch=recipe.vae_batch, compile_=compile_, **shared)
        vae.save_pretrained(work / "vae")
    vae.eval().requires_grad_(False)
    psnr = {
        name: round(reconstruction_psnr(vae, pool, generator, background=name), 2) for name in ("white", "gray", "rgb")
    }
    note(f"autoencoder: scaling {vae.config.scaling_factor:.4f}, PSNR {psnr}")
    probe_sizes: dict[str, Any] = {
        "steps": recipe.probe_steps,
        "batch": recipe.probe_batch,
        "width": recipe.probe_width,
    }
    save_probe(train_probe(pool, vae, **probe_sizes, **shared), out / "probe")
    note("probe trained")
    pool.encode_with(vae)
    note("pool encoded")
    averaged = train_denoiser(
        denoiser,
        pool,
        steps=recipe.denoiser_steps,
        batch=recipe.denoiser_batch,
        compile_=compile_,
        refreshes=recipe.refreshes,
        minutes=recipe.denoiser_minutes,
        **shared,
    )
    networks = {"vae": vae, "unet": averaged.unet, "text_encoder": averaged.text_encoder}
    save_prior(out / "prior", **networks, tokenizer=work / "tokenizer")
    facts = {"recipe": asdict(recipe), "seconds": round(time.monotonic() - began), "psnr": psnr, "device": str(device)}
    (work / "recipe.json").write_text(json.dumps(facts, indent=2))
    note(f"prior written to {out / 'prior'}")


def export_states(work: Path, folder: Path, denoiser: Denoiser, device: torch.device) -> int:
    """Write the averaged weights of an unfinished training; returns the exit code."""
    state = load_state(work / "denoiser.pt", device)
    if state is None or not (work / "vae").is_dir():
        print(f"--work: {work} contains no saved denoiser state yet; train first", file=sys.stderr)
        return 1
    denoiser.load_state_dict(state["emas"]["denoiser"])
    vae = AutoencoderKL.from_pretrained(work / "vae")
    save_prior(folder, vae=vae, unet=denoiser.unet, text_encoder=denoiser.text_encoder, tokenizer=work / "tokenizer")
    print(f"exported step {state['step']}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

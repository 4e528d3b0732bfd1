#!/usr/bin/env python
"""Train the embedded prior and its probe from scratch on procedural objects.

Every stage saves its state to ``--work`` once a minute; the same command resumes an interrupted training.

    python scripts/train_prior.py --work runs/prior --out scoredist3d/assets                  # full size
    python scripts/train_prior.py --work runs/mini --out runs/mini/assets --miniature   # seconds, on a CPU (tests)

The stages are: rendering a pool of captioned views; the autoencoder; the probe; the denoiser with its text encoder,
during which the pool may be replaced by new views (``--refreshes``); export as fp16 safetensors in diffusers format.
A long training is split into commands of a few minutes. Each continues from the exported prior of the last one:

    python scripts/train_prior.py --work W1 --out P1 --stages vae probe
    python scripts/train_prior.py --work W2 --out P2 --init P1 --stages denoiser --denoiser-minutes 8 --seed 1 --hold 1
    python scripts/train_prior.py --work W3 --out P3 --init P2 --stages denoiser --denoiser-minutes 8 --seed 2 --hold 0
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import torch
from diffusers import AutoencoderKL
from prior_training.acceleration import accelerate
from prior_training.commands import recipe_of, training_device, training_parser
from prior_training.common import load_exported, load_state
from prior_training.denoiser import Denoiser, train_denoiser
from prior_training.models import PriorSizes, build_text_encoder, build_unet, build_vae, save_prior
from prior_training.pool import build_pool
from prior_training.probe import train_probe
from prior_training.vae import encoder_gains, reconstruction_psnr, train_vae
from transformers import CLIPTokenizer

from scoredist3d.procedural import build_tokenizer

STAGES = ("vae", "probe", "denoiser")


@dataclass(frozen=True)
class Recipe:
    """Sizes of a training run; see the model card for those of the weights of the package."""

    objects: int = 150_000
    scenes: int = 48_000
    lettered: int = 5_000
    views: int = 2
    patterned: float = 0.0
    refreshes: int = 0
    vae_steps: int = 13_000
    vae_batch: int = 128
    vae_minutes: float = 0.0
    probe_steps: int = 2000
    probe_batch: int = 512
    probe_minutes: float = 0.0
    denoiser_steps: int = 9000
    denoiser_batch: int = 1024
    denoiser_minutes: float = 0.0
    peak_lr: float = 1e-3
    hold: float = 0.5
    probe_width: int = 40
    antialias: int = 2
    seed: int = 0

    @classmethod
    def miniature(cls) -> Recipe:
        """Sizes for tests, which train in seconds."""
        return cls(
            objects=24,
            scenes=4,
            lettered=2,
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
    parser = training_parser(__doc__, Recipe(), "prior/ and probe/")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES), help="stages to run; default all")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run or resume the training; returns the exit code."""
    arguments = parse_arguments(argv)
    recipe: Recipe = recipe_of(arguments, Recipe)
    sizes = PriorSizes.miniature() if arguments.miniature else PriorSizes()
    device, compile_ = training_device(arguments)
    arguments.work.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer(arguments.work / "tokenizer")
    vae, denoiser = build_networks(sizes, tokenizer, recipe.seed)
    if arguments.export_only:
        return export_states(arguments.work, arguments.out / "prior", denoiser, device)
    if arguments.init is not None:
        vae = AutoencoderKL.from_pretrained(arguments.init / "prior" / "vae", torch_dtype=torch.float32)
        vae.save_pretrained(arguments.work / "vae")
        load_denoiser(denoiser, arguments.init / "prior")
    Training(recipe, sizes, tokenizer, arguments.work, arguments.out, device, compile_).run(
        vae, denoiser, arguments.stages
    )
    return 0


def build_networks(sizes: PriorSizes, tokenizer: CLIPTokenizer, seed: int) -> tuple[AutoencoderKL, Denoiser]:
    """The untrained autoencoder and denoiser."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # library modules draw their initial weights from the global stream
        vae = build_vae(sizes)
        denoiser = Denoiser(build_unet(sizes), build_text_encoder(sizes, tokenizer))
    return vae, denoiser


def load_denoiser(denoiser: Denoiser, folder: Path) -> None:
    """Load the weights of an exported prior into the denoiser, if the folder contains any."""
    for part in ("unet", "text_encoder"):
        if (folder / part).is_dir():
            load_exported(getattr(denoiser, part), folder / part)


class Training:
    """All stages of the training on one pool.

    Args:
        recipe: Sizes and durations.
        sizes: Sizes of the networks.
        tokenizer: Tokenizer of the prior.
        work: Folder of the training states; finished stages are loaded from it.
        out: Target folder of ``prior/`` and ``probe/``.
        device: Device of the training.
        compile_: Whether to compile the ray caster and the transformer blocks.
    """

    def __init__(
        self,
        recipe: Recipe,
        sizes: PriorSizes,
        tokenizer: CLIPTokenizer,
        work: Path,
        out: Path,
        device: torch.device,
        compile_: bool,
    ) -> None:
        self.recipe, self.work, self.out, self.device = recipe, work, out, device
        self.generator = torch.Generator(device).manual_seed(recipe.seed + 1)
        self.pool = build_pool(recipe, tokenizer, sizes.image_size, device, compile_)
        self._loop: dict[str, Any] = {"work": work, "generator": self.generator}
        self._compile = compile_
        self.facts: dict[str, Any] = {"recipe": asdict(recipe), "device": str(device)}
        self._began = time.monotonic()

    def run(self, vae: AutoencoderKL, denoiser: Denoiser, stages: Sequence[str]) -> None:
        """Run the named stages and write their networks."""
        self._note(f"{json.dumps(asdict(self.recipe))} on {self.device}")
        self.pool.fill(0)
        self._note(f"pool of {self.pool.count:,} views rendered")
        vae = self._autoencoder(vae, "vae" in stages)
        if "probe" in stages:
            self._probe(vae)
        networks = {"vae": vae}
        if "denoiser" in stages:
            denoiser = self._denoiser(vae, denoiser)
            networks |= {"unet": denoiser.unet, "text_encoder": denoiser.text_encoder}
        save_prior(self.out / "prior", networks, tokenizer=self.work / "tokenizer")
        self.facts["seconds"] = round(time.monotonic() - self._began)
        (self.work / "recipe.json").write_text(json.dumps(self.facts, indent=2))
        self._note(f"prior written to {self.out / 'prior'}")

    def _note(self, text: str) -> None:
        print(f"[{time.monotonic() - self._began:7.1f} s] {text}", flush=True)

    def _autoencoder(self, vae: AutoencoderKL, trains: bool) -> AutoencoderKL:
        """The trained autoencoder, with its measurements in ``facts``."""
        if (self.work / "vae").is_dir():  # finished earlier; its scaling factor must not change between commands
            vae = AutoencoderKL.from_pretrained(self.work / "vae").to(self.device)
        elif trains:
            recipe = self.recipe
            vae = train_vae(
                vae,
                self.pool,
                steps=recipe.vae_steps,
                batch=recipe.vae_batch,
                minutes=recipe.vae_minutes,
                **self._loop,
            )
            vae.save_pretrained(self.work / "vae")
        else:
            raise SystemExit("--stages: there is no trained autoencoder yet; add vae, or give --init")
        accelerate(vae.requires_grad_(False))
        names = ["white", "gray", "rgb"] + ["lettered"] * bool(self.recipe.lettered)
        psnr = {name: round(reconstruction_psnr(vae, self.pool, self.generator, background=name), 2) for name in names}
        self.facts |= {"psnr": psnr, "gains": encoder_gains(vae, self.pool, self.generator)}
        self._note(f"autoencoder: scaling {vae.config.scaling_factor:.4f}, PSNR {psnr}, gains {self.facts['gains']}")
        return vae

    def _probe(self, vae: AutoencoderKL) -> None:
        probe = train_probe(
            self.pool,
            vae,
            steps=self.recipe.probe_steps,
            batch=self.recipe.probe_batch,
            width=self.recipe.probe_width,
            minutes=self.recipe.probe_minutes,
            **self._loop,
        )
        probe.save(self.out / "probe")
        self._note("probe trained")

    def _denoiser(self, vae: AutoencoderKL, denoiser: Denoiser) -> Denoiser:
        self.pool.encode_with(vae)
        self._note("pool encoded")
        recipe = self.recipe
        return train_denoiser(
            denoiser,
            self.pool,
            steps=recipe.denoiser_steps,
            batch=recipe.denoiser_batch,
            refreshes=recipe.refreshes,
            minutes=recipe.denoiser_minutes,
            peak_lr=recipe.peak_lr,
            hold=recipe.hold,
            compile_=self._compile,
            **self._loop,
        )


def export_states(work: Path, folder: Path, denoiser: Denoiser, device: torch.device) -> int:
    """Write the averaged weights of an unfinished training; returns the exit code."""
    state = load_state(work / "denoiser.pt", device)
    if state is None or not (work / "vae").is_dir():
        print(f"--work: {work} contains no saved denoiser state yet; train first", file=sys.stderr)
        return 1
    denoiser.load_state_dict(state["emas"]["denoiser"])
    vae = AutoencoderKL.from_pretrained(work / "vae")
    networks = {"vae": vae, "unet": denoiser.unet, "text_encoder": denoiser.text_encoder}
    save_prior(folder, networks, tokenizer=work / "tokenizer")
    print(f"exported step {state['step']}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

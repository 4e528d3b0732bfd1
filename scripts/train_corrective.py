#!/usr/bin/env python
"""Train the corrective b(z, t) of LMC for a prior, by regression to the unconditional one-step prediction.

The method is LMC (arXiv 2401.05293)::

    python scripts/train_corrective.py --out scoredist3d/assets/corrective     # that of the package
    python scripts/train_corrective.py --prior stable-diffusion-v1-5/stable-diffusion-v1-5 --images photos --out sd15
    python scripts/train_corrective.py --prior "{type: gaussian-mixture, image_size: 8}" --out blobs

The result is selected with ``system.guidance.type=lmc system.guidance.corrective=sd15``. Clean latents are encoded
images of ``--images``, or samples of the prior for the prompts in ``--prompts``. Without both, they are new renders of
procedural objects for the embedded prior, and samples for the empty prompt for other priors. Training stops at the knee
of the loss on held-out latents, because a wide network that is trained for long learns the images instead of the blur.
``--out`` is written at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, cast

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import torch
import yaml
from prior_training.corrective import (
    BINS,
    CleanLatents,
    Holdout,
    Recipe,
    Result,
    compact,
    fit,
    pictured_latents,
    rendered_latents,
    sampled_latents,
)

from scoredist3d import registry
from scoredist3d.config.validation import parse_component
from scoredist3d.files import write_atomically
from scoredist3d.guidance.core.corrective import Corrective, CorrectiveSizes, save_corrective
from scoredist3d.priors import Prior

CARD = """# Model card: an LMC corrective

b(z, t) = z + r(z, t) is a convolutional network with {parameters:,} parameters. For a clean latent z and a timestep t
it estimates the unconditional one-step prediction of one prior, averaged over the noise. LMC (arXiv 2401.05293)
compares the prediction with b(z, t) instead of z (`scoredist3d/guidance/lmc.py`). The network belongs to one prior,
latent shape and noise schedule, whose fingerprint is stored with the weights; any other is refused.

- Prior: `{prior}`; latents {shape}
- Clean latents: {data}; {latents:,} for training, {holdout:,} others for evaluation
- Training: {steps:,} steps of {batch} predictions ({drawn}), of at most {limit:,} (it stops at the knee of the
  held-out loss), Adam {lr:g}, EMA {ema:g}, t uniform in [{t_min:g}, {t_max:g}], {weights}; {seconds:.0f} s on
  {device}, torch {torch}
- Command: `{command}`

Held-out mean squared error by timestep. *Identity* is b(z, t) = z, that is SDS. *Floor* is an estimate of the variance
of the target over the noise, which no corrective can predict. *Learned* is the share of the difference between the two
that the network removes; it can exceed 1, because the floor is estimated from a finite number of noise samples.

{table}

## What of LMC is not verified

The paper has no public code, and this implementation was made from its abstract and second-hand summaries. The split of
the SDS gradient into a text term and an unconditional term is exact and tested. The regression of a shallow network of
the clean image and the timestep to the unconditional one-step prediction, once per model, agrees with the abstract. Not
verified are the architecture and size of the network, the data and length of its training, the weights of timesteps in
training and in use, whether the gradient passes through the network (`jacobian`; by default it does not), a
normalization (`remove_mean`; off by default) and the guidance scales. The blend `beta` is an addition. No number here
or in a benchmark of this project is taken from the paper.

## Limits

The network was trained only on clean latents of the kind named above. For latents far from them (noise, an empty scene)
its estimate is unreliable; increase `beta` from 0 in that phase. It was trained with the empty prompt, so it does not
match the predictions for a negative prompt. A wider network, or longer training, is expected to learn the images as
well as the blur, and so to remove the gradient that LMC needs; this was not measured.
"""


def card(result: Result, holdout: Holdout, recipe: Recipe, facts: dict[str, Any]) -> str:
    """Text of the model card of a trained corrective."""
    rows = ["| t | identity | this network | floor | learned |", "| --- | --- | --- | --- | --- |"]
    width = (recipe.t_max - recipe.t_min) / BINS
    columns = zip(holdout.identity.tolist(), result.error.tolist(), holdout.floor.tolist(), strict=True)
    for index, (identity, error, floor) in enumerate(columns):
        low = recipe.t_min + index * width
        learned = (identity - error) / max(identity - floor, 1e-12)
        rows.append(f"| {low:.2f}-{low + width:.2f} | {identity:.4f} | {error:.4f} | {floor:.4f} | {learned:.2f} |")
    parameters = sum(parameter.numel() for parameter in result.network.parameters())
    values = asdict(recipe) | {"steps": result.steps, "limit": recipe.steps, "holdout": len(holdout.z)}
    values["weights"] = "errors relative to the identity's" if recipe.balance else "plain errors"
    values["drawn"] = f"from {recipe.targets:,} predictions drawn once" if recipe.targets else "new ones at every step"
    return CARD.format(**(values | facts | {"parameters": parameters, "table": "\n".join(rows)}))


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Options of the command line; every field of the recipe is an option."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, required=True, help="target folder of the weights, their configuration and the model card"
    )
    parser.add_argument("--prior", default="embedded", help="diffusers folder, hub id, or the block of a prior in YAML")
    parser.add_argument("--images", type=Path, help="folder of images to train on")
    parser.add_argument(
        "--prompts", type=Path, help="text file with one prompt per line, to train on samples of the prior"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    for field in fields(Recipe):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=type(field.default), default=field.default)
    return parser.parse_args(argv)


def build_prior(text: str, device: torch.device) -> Prior:
    """The prior given with ``--prior``."""
    block = yaml.safe_load(text)
    block = block if isinstance(block, dict) else {"type": "diffusers", "pretrained_model_name_or_path": text}
    prior: Prior = registry.build(parse_component("prior", block))
    return prior.requires_grad_(False).to(device)


def clean_latents(
    prior: Prior, arguments: argparse.Namespace, recipe: Recipe, generator: torch.Generator
) -> tuple[CleanLatents, CleanLatents, str]:
    """Latents for training, latents for evaluation, and a description of their source."""
    if arguments.images is not None:
        every = pictured_latents(prior, arguments.images, generator.device)
        order = torch.randperm(len(every.z), generator=generator, device=generator.device)
        held = min(recipe.holdout, max(1, len(order) // 5))
        return every[order[held:]], every[order[:held]], "images of a folder"
    count = recipe.latents + recipe.holdout
    if arguments.prompts is None and arguments.prior == "embedded":
        every, source = rendered_latents(prior, count, generator), "encoded renders of new procedural objects"
    else:
        lines = [""] if arguments.prompts is None else arguments.prompts.read_text(encoding="utf-8").splitlines()
        prompts = [line.strip() for line in lines if line.strip()] or [""]
        source = f"samples of the prior, {recipe.sampling_steps} steps, {len(prompts)} prompts, scale {recipe.scale:g}"
        every = sampled_latents(
            prior, count, generator, prompts=prompts, steps=recipe.sampling_steps, scale=recipe.scale
        )
    index = torch.arange(count, device=generator.device)
    return every[index[recipe.holdout :]], every[index[: recipe.holdout]], source


def main(argv: list[str] | None = None) -> int:
    """Train a corrective and write it; returns the exit code."""
    arguments = parse_arguments(argv)
    recipe = Recipe(**{field.name: getattr(arguments, field.name) for field in fields(Recipe)})
    device = torch.device(arguments.device)
    began = time.monotonic()

    def note(text: str) -> None:
        print(f"[{time.monotonic() - began:7.1f} s] {text}", flush=True)

    prior = build_prior(arguments.prior, device)
    generator = torch.Generator(device).manual_seed(recipe.seed)
    note(f"{json.dumps(asdict(recipe))} on {device}")
    clean, held, source = clean_latents(prior, arguments, recipe, generator)
    note(f"{len(clean.z):,} + {len(held.z):,} clean latents: {source}")
    holdout = Holdout.make(prior, held, recipe, generator)
    note(f"identity by timestep {compact(holdout.identity)}")
    note(f"floor    by timestep {compact(holdout.floor)}")
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)  # library modules draw their initial weights from the global stream
        network = Corrective(CorrectiveSizes(clean.z.shape[1], recipe.width, recipe.depth)).to(device)
    result = fit(network, prior, clean, holdout, recipe, generator, note)
    command = " ".join(["python scripts/train_corrective.py", *(argv if argv is not None else sys.argv[1:])])
    facts = {
        "prior": arguments.prior,
        "shape": "x".join(str(side) for side in clean.z.shape[1:]),
        "data": source,
        "latents": len(clean.z),
        "seconds": time.monotonic() - began,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU",
        "torch": torch.__version__.split("+")[0],
        "command": command,
    }
    save_corrective(
        arguments.out,
        cast(Corrective, result.network),
        prior,
        {"recipe": asdict(recipe), "steps": result.steps, **facts},
    )
    write_atomically(arguments.out / "README.md", card(result, holdout, recipe, facts))
    note(f"written to {arguments.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

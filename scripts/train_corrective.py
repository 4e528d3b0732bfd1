#!/usr/bin/env python
"""Train LMC's corrective b(z, t) for a prior: regression to the unconditional one-step prediction (arXiv 2401.05293).

    python scripts/train_corrective.py --out scoredist3d/assets/corrective     # the shipped one, of the embedded prior
    python scripts/train_corrective.py --prior stable-diffusion-v1-5/stable-diffusion-v1-5 --images photos --out sd15
    python scripts/train_corrective.py --prior "{type: gaussian-mixture, image_size: 8}" --out blobs

Then ``system.guidance.type=lmc system.guidance.corrective=sd15``. Clean latents are encoded pictures of ``--images``,
or samples of the prior for the lines of ``--prompts``; without both, fresh renders of the procedural objects for the
embedded prior, and samples for the empty prompt for others. Training stops at the knee of the loss on held-out latents:
the longer and wider the network, the more it learns of the pictures instead of the blur. ``--out`` is written at the
end.
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

b(z, t) = z + r(z, t): a convolutional network of {parameters:,} parameters that answers, for a clean latent z and a
noise level t, what the unconditional one-step prediction of one prior is on average over the noise. LMC (arXiv
2401.05293) compares the prediction with b(z, t) instead of z (`scoredist3d/guidance/lmc.py`). It fits one prior, latent
shape and noise schedule, whose fingerprint is stored with the weights; any other is refused.

- Prior: `{prior}`; latents {shape}
- Clean latents: {data}; {latents:,} to learn from, {holdout:,} others to measure on
- Training: {steps:,} steps of {batch} predictions ({drawn}), of at most {limit:,} (it stops at the knee of the
  held-out loss), Adam {lr:g}, EMA {ema:g}, t uniform in [{t_min:g}, {t_max:g}], {weights}; {seconds:.0f} s on
  {device}, torch {torch}
- Command: `{command}`

Held-out mean square error by level. *Identity* is b(z, t) = z, that is SDS; *floor* estimates, from
finitely many noises, the part of the target that depends on the noise and not on z, which no corrective can answer;
*learnt* is the share of the difference, and may exceed 1 by that estimate's error.

{table}

## What of LMC is not verified

The paper has no public code, and this implementation was made from its abstract and second-hand summaries. The split
of the SDS gradient into a text term and an unconditional term is exact algebra (tested). That a shallow network of the
clean image and the level is regressed to the unconditional one-step prediction, once per model, agrees with the
abstract. Not verified: the network's architecture and size, the data and the length of its training, the weights of
levels in training and in use, whether the gradient passes through the network (`jacobian`; not, by default), any
normalization (`remove_mean`; off by default) and the guidance scales. The blend `beta` is an addition. No number here
or in a benchmark of this project is one of the paper's.

## Limits

It has seen clean latents of the kind named above only. For latents far from them (noise, an empty scene) its answer is
a guess; ramp `beta` up from 0 there. It was trained with the empty prompt: with a negative prompt the prediction that
it is compared with moves. A wider or longer trained network is expected to learn the pictures as well as the
blur, and so to cancel the pull that LMC is after; that was not measured.
"""


def card(result: Result, holdout: Holdout, recipe: Recipe, facts: dict[str, Any]) -> str:
    """The README of a trained corrective, from what was measured."""
    rows = ["| t | identity | this network | floor | learnt |", "| --- | --- | --- | --- | --- |"]
    width = (recipe.t_max - recipe.t_min) / BINS
    columns = zip(holdout.identity.tolist(), result.error.tolist(), holdout.floor.tolist(), strict=True)
    for index, (identity, error, floor) in enumerate(columns):
        low = recipe.t_min + index * width
        learnt = (identity - error) / max(identity - floor, 1e-12)
        rows.append(f"| {low:.2f}-{low + width:.2f} | {identity:.4f} | {error:.4f} | {floor:.4f} | {learnt:.2f} |")
    parameters = sum(parameter.numel() for parameter in result.network.parameters())
    values = asdict(recipe) | {"steps": result.steps, "limit": recipe.steps, "holdout": len(holdout.z)}
    values["weights"] = "errors relative to the identity's" if recipe.balance else "plain errors"
    values["drawn"] = f"from {recipe.targets:,} predictions drawn once" if recipe.targets else "new ones at every step"
    return CARD.format(**(values | facts | {"parameters": parameters, "table": "\n".join(rows)}))


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Command line: every recipe field is a flag."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, required=True, help="folder that receives the weights, their config and card"
    )
    parser.add_argument("--prior", default="embedded", help="diffusers folder, hub id, or a prior's block in YAML")
    parser.add_argument("--images", type=Path, help="folder of pictures to learn from")
    parser.add_argument("--prompts", type=Path, help="text file, one prompt a line, to sample pictures for")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    for field in fields(Recipe):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=type(field.default), default=field.default)
    return parser.parse_args(argv)


def build_prior(text: str, device: torch.device) -> Prior:
    """The prior that ``--prior`` names."""
    block = yaml.safe_load(text)
    block = block if isinstance(block, dict) else {"type": "diffusers", "pretrained_model_name_or_path": text}
    prior: Prior = registry.build(parse_component("prior", block))
    return prior.requires_grad_(False).to(device)


def clean_latents(
    prior: Prior, arguments: argparse.Namespace, recipe: Recipe, generator: torch.Generator
) -> tuple[CleanLatents, CleanLatents, str]:
    """Latents to learn from, others to measure on, and where they come from in words."""
    if arguments.images is not None:
        every = pictured_latents(prior, arguments.images, generator.device)
        order = torch.randperm(len(every.z), generator=generator, device=generator.device)
        held = min(recipe.holdout, max(1, len(order) // 5))
        return every[order[held:]], every[order[:held]], "pictures of a folder"
    count = recipe.latents + recipe.holdout
    if arguments.prompts is None and arguments.prior == "embedded":
        every, source = rendered_latents(prior, count, generator), "encoded renders of fresh procedural objects"
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
    """Train and write a corrective; returns the exit code."""
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
    note(f"identity by level {compact(holdout.identity)}")
    note(f"floor    by level {compact(holdout.floor)}")
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)  # initial weights of library modules are drawn from the global stream
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

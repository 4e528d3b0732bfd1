#!/usr/bin/env python
"""Evaluate the words in samples of a prior: signs and mugs with words that it was not trained on.

    python scripts/evaluate_words.py --prior embedded-flow --out docs/prior

The script samples captions such as "a red sign that says a b 1 2" and reads the samples with the reader, a network that
was trained on real renders only. For comparison it reads real renders of the same words, directly and after encoding.
The results are ``words.json``, ``words.md`` and a sheet of samples, ``words.png``, in ``--out``.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import torch
from prior_training.evaluation import Sampler, render_in_blocks
from torch import Tensor

from scoredist3d.export.images import image_grid, save_png
from scoredist3d.priors.diffusers_prior import DiffusersPrior
from scoredist3d.procedural.lettering import (
    KINDS,
    captions_for_lettered,
    lettering_cameras,
    render_lettered,
    sample_lettered,
)
from scoredist3d.procedural.reader import Reader, character_accuracy, exact_match

_BLOCK = 128
_SHEET = 48


def measures(reader: Reader, images: Tensor, words: Sequence[str], kind: Tensor) -> dict[str, float]:
    """Shares of exact words and of correct characters, overall, and of exact words for each kind of object."""
    read = [word for block in images.split(_BLOCK) for word in reader.read(block)]
    result = {"exact": exact_match(read, words), "characters": character_accuracy(read, words)}
    for index, name in enumerate(KINDS):
        chosen = (kind == index).nonzero()[:, 0].tolist()
        result[name] = exact_match([read[k] for k in chosen], [words[k] for k in chosen]) if chosen else float("nan")
    return result


@torch.no_grad()
def evaluate(
    sampler: Sampler, reader: Reader, *, count: int, scales: Sequence[float], held_out: bool
) -> tuple[dict[str, dict[str, float]], list[Tensor]]:
    """The measures of real renders and of samples at each guidance scale, and the first samples of each scale."""
    prior, device = sampler.prior, sampler.device
    lettered = sample_lettered(count, torch.Generator().manual_seed(7), device, held_out=held_out)
    cameras = lettering_cameras(lettered, prior.image_size, torch.Generator().manual_seed(8))
    texts = captions_for_lettered(lettered.to("cpu"), random.Random(9))
    real = render_in_blocks(lettered, cameras, render=render_lettered)
    encoded = torch.cat([prior.decode(prior.encode(block)).clamp(0, 1) for block in real.split(_BLOCK)])
    table = {
        "real renders": measures(reader, real, lettered.words, lettered.kind),
        "real renders, encoded": measures(reader, encoded, lettered.words, lettered.kind),
    }
    sheets = []
    for scale in scales:
        images = sampler(texts, cameras, scale=scale, seed=11)
        table[f"{sampler.steps} steps, scale {scale:g}"] = measures(reader, images, lettered.words, lettered.kind)
        sheets.append(images[:_SHEET].cpu())
    return table, sheets


def markdown(table: dict[str, dict[str, float]]) -> str:
    """The measures as a Markdown table."""
    columns = ("exact", "characters", *KINDS)
    text = "| images | " + " | ".join(columns) + " |\n" + "| --- " * (len(columns) + 1) + "|\n"
    for name, row in table.items():
        text += f"| {name} | " + " | ".join(f"{row[column]:.3f}" for column in columns) + " |\n"
    return text


def main(argv: list[str] | None = None) -> int:
    """Run the evaluation; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prior", default="embedded-flow", help="diffusers folder, hub id, or 'embedded-flow'")
    parser.add_argument("--reader", type=Path, help="folder of the reader (default: the one of the package)")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--count", type=int, default=768, help="number of words")
    parser.add_argument("--steps", type=int, default=28, help="number of steps of the sampler")
    parser.add_argument("--scales", type=float, nargs="+", default=[1.0, 3.0, 5.0], help="guidance scales")
    parser.add_argument("--training-words", action="store_true", help="use words of the training data, for comparison")
    arguments = parser.parse_args(argv)
    device = torch.device(arguments.device)
    prior = DiffusersPrior(DiffusersPrior.Config(pretrained_model_name_or_path=arguments.prior)).to(device)
    table, sheets = evaluate(
        Sampler(prior, arguments.steps),
        Reader.load(arguments.reader, device),
        count=arguments.count,
        scales=arguments.scales,
        held_out=not arguments.training_words,
    )
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "words.json").write_text(json.dumps(table, indent=2) + "\n")
    (arguments.out / "words.md").write_text(markdown(table))
    save_png(image_grid(torch.cat(sheets), columns=12), arguments.out / "words.png")
    print(markdown(table))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

#!/usr/bin/env python
"""Evaluate a prior: accuracy of its samples, effect of the conditioning per timestep, and a sheet of samples.

    python scripts/evaluate_prior.py --prior embedded --out docs/prior

The script samples "a COLOR CATEGORY" with DDIM for all categories and colors, from random cameras. The probe predicts
the category, color and azimuth of the samples, and, for comparison, of real renders from the same distribution of
cameras, with and without the prior's autoencoder. The results are ``evaluation.json``, ``evaluation.md`` and
``samples.png`` in ``--out``.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import torch
from prior_training.pool import training_cameras
from torch import Tensor

from scoredist3d.diffusion.samplers import sample
from scoredist3d.export.images import image_grid, save_png
from scoredist3d.priors.base import Prior
from scoredist3d.priors.conditioning import CFGConditions, Conditioning
from scoredist3d.priors.diffusers_prior import DiffusersPrior
from scoredist3d.procedural import (
    AZIMUTH_SYMMETRY,
    CATEGORIES,
    COLORS,
    azimuth_symmetry,
    render_objects,
    sample_objects,
    simple_caption,
)
from scoredist3d.procedural.probe import Probe


def accuracy(
    probe: Probe, images: Tensor, category: Tensor, color: Tensor, azimuth: Tensor, order: Tensor
) -> dict[str, float]:
    """Shares of correct categories and colors; median and mean azimuth error in degrees, of objects with a front."""
    readings = [probe(chunk) for chunk in images.split(256)]
    right_category = torch.cat([r.category.argmax(-1) for r in readings]) == category
    right_color = torch.cat([r.color.argmax(-1) for r in readings]) == color
    parts = zip(readings, azimuth.split(256), order.split(256), strict=True)
    error = torch.cat([r.azimuth_error_deg(a, k) for r, a, k in parts])
    error = error[~error.isnan()]
    return {
        "category": right_category.float().mean().item(),
        "color": right_color.float().mean().item(),
        "azimuth_median_deg": error.median().item(),
        "azimuth_mean_deg": error.mean().item(),
    }


def grid_of_captions(per_pair: int, limit: int, device: torch.device) -> tuple[Tensor, Tensor, list[str]]:
    """Categories, colors and captions: every category with every color, ``per_pair`` times, cut to ``limit``."""
    category = torch.arange(len(CATEGORIES)).repeat_interleave(len(COLORS) * per_pair)[:limit]
    color = torch.arange(len(COLORS)).repeat_interleave(per_pair).repeat(len(CATEGORIES))[:limit]
    texts = [simple_caption(CATEGORIES[c], COLORS[k]) for c, k in zip(category.tolist(), color.tolist(), strict=True)]
    return category.to(device), color.to(device), texts


@torch.no_grad()
def sampled_accuracy(
    prior: Prior, probe: Probe, *, scale: float, steps: int, per_pair: int, limit: int, device: torch.device
) -> dict[str, float]:
    """Accuracy of DDIM samples at one guidance scale."""
    generator = torch.Generator(device).manual_seed(1234)
    category, color, texts = grid_of_captions(per_pair, limit, device)
    cameras = training_cameras(len(texts), prior.image_size, generator, device)
    images = []
    for start in range(0, len(texts), 192):
        part = slice(start, start + 192)
        views = cameras[part]
        conditions = CFGConditions(prior.embed(texts[part], views), prior.embed([""] * len(views), views))
        z = sample(prior, conditions, steps=steps, scale=scale, generator=generator)
        images.append(prior.decode(z).clamp(0, 1))
    # Families that are round unless stretched count as round: the azimuth of their samples is not evaluated.
    order = torch.tensor([AZIMUTH_SYMMETRY[name] for name in CATEGORIES], device=device)[category]
    return accuracy(probe, torch.cat(images), category, color, cameras.azimuth, order)


@torch.no_grad()
def probe_floor(prior: Prior, probe: Probe, *, count: int, device: torch.device) -> dict[str, dict[str, float]]:
    """Accuracy of the probe on new real renders over white, before and after the prior's autoencoder."""
    generator = torch.Generator(device).manual_seed(4321)
    objects = sample_objects(count, generator, device)
    cameras = training_cameras(count, prior.image_size, generator, device)
    images = render_objects(objects, cameras, antialias=2).over(torch.ones(3, device=device))
    through = torch.cat([prior.decode(prior.encode(chunk)).clamp(0, 1) for chunk in images.split(256)])
    truth = (objects.category, objects.color, cameras.azimuth, azimuth_symmetry(objects))
    return {"real renders": accuracy(probe, images, *truth), "real, encoded": accuracy(probe, through, *truth)}


@torch.no_grad()
def where_conditioning_acts(prior: Prior, *, count: int, device: torch.device) -> list[dict[str, float]]:
    """Ratio of the x0 error with a wrong color, category or camera to that with the correct one, per timestep."""
    generator = torch.Generator(device).manual_seed(99)
    color = torch.randint(0, len(COLORS), (count,), generator=generator, device=device)
    objects = sample_objects(count, generator, device, color=color, second_color=color)
    cameras = training_cameras(count, prior.image_size, generator, device)
    images = render_objects(objects, cameras, antialias=2).over(torch.ones(3, device=device))
    z = torch.cat([prior.encode(chunk) for chunk in images.split(256)])
    other_color = (objects.color + 1 + torch.arange(count, device=device) % (len(COLORS) - 1)) % len(COLORS)
    other_category = (objects.category + 1 + torch.arange(count, device=device) % (len(CATEGORIES) - 1)) % len(
        CATEGORIES
    )

    def texts(category: Tensor, color: Tensor) -> list[str]:
        return [
            simple_caption(CATEGORIES[c], COLORS[k]) for c, k in zip(category.tolist(), color.tolist(), strict=True)
        ]

    right = prior.embed(texts(objects.category, objects.color), cameras)
    rolled = cameras[torch.arange(count, device=device).roll(1)]
    wrong = {
        "color": prior.embed(texts(objects.category, other_color), cameras),
        "category": prior.embed(texts(other_category, objects.color), cameras),
        "camera": prior.embed(texts(objects.category, objects.color), rolled),
    }

    def error(conditioning: Conditioning, x_t: Tensor, t: Tensor) -> float:
        total = 0.0
        for start in range(0, count, 256):
            part = slice(start, start + 256)
            x0 = prior.predict(x_t[part], t[part], conditioning[part]).x0
            total += (x0 - z[part]).square().sum().item()
        return total

    rows = []
    for timestep in (0.05, 0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98):
        t = torch.full((count,), timestep, device=device)
        noise = torch.randn(z.shape, generator=generator, device=device, dtype=z.dtype)
        x_t = prior.schedule.add_noise(z, noise, t)
        base = error(right, x_t, t)
        alpha, sigma = prior.schedule.alpha(t)[0].item(), prior.schedule.sigma(t)[0].item()
        signal = 20 * torch.log10(torch.tensor(alpha * z.std().item() / sigma)).item()
        rows.append({"t": timestep, "snr_db": signal} | {name: error(c, x_t, t) / base for name, c in wrong.items()})
    return rows


@torch.no_grad()
def sample_sheet(prior: Prior, path: Path, *, scale: float, steps: int, limit: int, device: torch.device) -> None:
    """Write an image with one row of samples per category, in alternating colors."""
    generator = torch.Generator(device).manual_seed(7)
    columns = 10
    texts = [simple_caption(c, COLORS[(i + j) % len(COLORS)]) for i, c in enumerate(CATEGORIES) for j in range(columns)]
    texts = texts[:limit]
    cameras = training_cameras(len(texts), prior.image_size, generator, device)
    images = []
    for start in range(0, len(texts), 140):
        views = cameras[start : start + 140]
        conditions = CFGConditions(
            prior.embed(texts[start : start + 140], views), prior.embed([""] * len(views), views)
        )
        images.append(
            prior.decode(sample(prior, conditions, steps=steps, scale=scale, generator=generator)).clamp(0, 1)
        )
    save_png(image_grid(torch.cat(images).cpu(), columns=2 * columns), path)


def markdown(result: dict[str, Any]) -> str:
    """The measurements as Markdown tables, for the model card."""
    head = "| images | category | color | azimuth error, median (mean) |\n| --- | --- | --- | --- |\n"
    rows = "".join(
        f"| {name} | {row['category']:.3f} | {row['color']:.3f} "
        f"| {row['azimuth_median_deg']:.1f} ({row['azimuth_mean_deg']:.1f}) deg |\n"
        for name, row in result["accuracy"].items()
    )
    acts = "| t | SNR of latents, dB | wrong color | wrong category | wrong camera |\n| --- | --- | --- | --- | --- |\n"
    acts += "".join(
        f"| {r['t']:.2f} | {r['snr_db']:.1f} | {r['color']:.2f} | {r['category']:.2f} | {r['camera']:.2f} |\n"
        for r in result["where_conditioning_acts"]
    )
    return f"{head}{rows}\n{acts}"


def main(argv: list[str] | None = None) -> int:
    """Run the evaluation; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prior", default="embedded", help="diffusers folder, hub id, or 'embedded'")
    parser.add_argument(
        "--probe", type=Path, default=None, help="folder of the probe (default: the one of the package)"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--per-pair", type=int, default=3, help="samples per category and color")
    parser.add_argument("--limit", type=int, default=None, help="maximum number of images, for a quick test")
    parser.add_argument("--steps", type=int, default=25, help="DDIM steps")
    parser.add_argument("--scales", type=float, nargs="+", default=[1.0, 2.0, 3.0, 5.0, 7.5], help="guidance scales")
    arguments = parser.parse_args(argv)
    device = torch.device(arguments.device)
    limit = arguments.limit or sys.maxsize
    prior = DiffusersPrior(DiffusersPrior.Config(pretrained_model_name_or_path=arguments.prior)).to(device)
    probe = Probe.load(arguments.probe, device) if arguments.probe else Probe.load(device=device)
    began = time.monotonic()
    table = probe_floor(prior, probe, count=min(arguments.per_pair * 336, limit), device=device)
    for scale in arguments.scales:
        name = f"DDIM-{arguments.steps}, scale {scale:g}"
        table[name] = sampled_accuracy(
            prior,
            probe,
            scale=scale,
            steps=arguments.steps,
            per_pair=arguments.per_pair,
            limit=limit,
            device=device,
        )
        print(name, {k: round(v, 3) for k, v in table[name].items()}, flush=True)
    result = {
        "accuracy": table,
        "where_conditioning_acts": where_conditioning_acts(
            prior, count=min(512 * arguments.per_pair, limit), device=device
        ),
        "per_pair": arguments.per_pair,
        "seconds": round(time.monotonic() - began),
        "device": str(device),
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "evaluation.json").write_text(json.dumps(result, indent=2) + "\n")
    (arguments.out / "evaluation.md").write_text(markdown(result))
    sample_sheet(prior, arguments.out / "samples.png", scale=3.0, steps=arguments.steps, limit=limit, device=device)
    print(markdown(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

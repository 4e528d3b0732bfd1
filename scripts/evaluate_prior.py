#!/usr/bin/env python
"""Evaluate a prior: accuracy of its samples, effect of the conditioning per timestep, and sheets of samples.

    python scripts/evaluate_prior.py --prior embedded --out docs/prior

The script samples captions with DDIM from random cameras: "a COLOR CATEGORY" for all categories and colors, patterned
objects, scenes of two objects, and captions that name a defect. The probe predicts the attributes of the samples, and,
for comparison, of real renders. The answer of the autoencoder to detail is measured by spatial frequency. The results
are ``evaluation.json``, ``evaluation.md`` and sheets of samples (PNG) in ``--out``.
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
from prior_training.evaluation import (
    Sampler,
    defect_statistics,
    pattern_accuracy,
    probe_floor,
    render_in_blocks,
    sampled_accuracy,
    scene_accuracy,
    where_conditioning_acts,
)
from prior_training.sheets import write_sheets
from prior_training.spectrum import gains

from scoredist3d.priors.diffusers_prior import DiffusersPrior
from scoredist3d.procedural import sample_objects
from scoredist3d.procedural.probe import Probe


@torch.no_grad()
def autoencoder_measures(sampler: Sampler, *, count: int) -> dict[str, Any]:
    """Reconstruction PSNR in dB of renders over white, and the answer to detail by spatial frequency."""
    prior, device = sampler.prior, sampler.device
    generator = torch.Generator(device).manual_seed(3)
    images = render_in_blocks(sample_objects(count, generator, device), sampler.cameras(count, 97))
    errors = [(prior.decode(prior.encode(x)).clamp(0, 1) - x).square().mean((1, 2, 3)) for x in images.split(128)]
    psnr = -10 * torch.log10(torch.cat(errors).mean()).item()
    result = gains(
        lambda x: prior.encode(x.movedim(1, -1)),
        lambda z: prior.decode(z).movedim(-1, 1),
        images.movedim(-1, 1),
        generator,
    )
    return {"psnr": psnr, "gains": result}


def markdown(result: dict[str, Any]) -> str:
    """The measurements as Markdown tables, for the model card."""
    text = "| images | category | worst | color | worst | azimuth error, median (mean) |\n" + "| --- " * 6 + "|\n"
    for name, row in result["accuracy"].items():
        text += (
            f"| {name} | {row['category']:.3f} | {row['worst_category']:.2f} ({row['worst_category_name']}) "
            f"| {row['color']:.3f} | {row['worst_color']:.2f} ({row['worst_color_name']}) "
            f"| {row['azimuth_median_deg']:.1f} ({row['azimuth_mean_deg']:.1f}) deg |\n"
        )
    for title in ("patterns", "scenes"):
        row = result[title]
        text += f"\n| {title} | " + " | ".join(row) + " |\n" + "| --- " * (len(row) + 1) + "|\n"
        text += "| | " + " | ".join(f"{value:.3f}" for value in row.values()) + " |\n"
    text += "\n| images | saturation | sharpness | noise |\n| --- | --- | --- | --- |\n"
    for name, row in result["defects"].items():
        text += f"| {name} | {row['saturation']:.3f} | {row['sharpness']:.3f} | {row['noise']:.4f} |\n"
    text += (
        "\n| t | SNR of latents, dB | wrong color | wrong category | wrong camera |\n| --- | --- | --- | --- | --- |\n"
    )
    for r in result["where_conditioning_acts"]:
        text += f"| {r['t']:.2f} | {r['snr_db']:.1f} | {r['color']:.2f} | {r['category']:.2f} | {r['camera']:.2f} |\n"
    text += "\n| cycles per pixel | change of latents | change of the reconstruction |\n| --- | --- | --- |\n"
    for band, row in result["autoencoder"]["gains"].items():
        text += f"| {band} | {row['latents']:.2f} | {row['image']:.2f} |\n"
    return text


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
    parser.add_argument("--scale", type=float, default=3.0, help="guidance scale of everything but the first table")
    arguments = parser.parse_args(argv)
    device = torch.device(arguments.device)
    limit = arguments.limit or sys.maxsize
    prior = DiffusersPrior(DiffusersPrior.Config(pretrained_model_name_or_path=arguments.prior)).to(device)
    probe = Probe.load(arguments.probe, device) if arguments.probe else Probe.load(device=device)
    sampler, scale = Sampler(prior, arguments.steps), arguments.scale
    began = time.monotonic()
    count = min(arguments.per_pair * 512, limit)
    table = probe_floor(sampler, probe, count=count)
    for guidance in arguments.scales:
        name = f"DDIM-{arguments.steps}, scale {guidance:g}"
        table[name] = sampled_accuracy(sampler, probe, scale=guidance, per_pair=arguments.per_pair, limit=limit)
        print(name, table[name], flush=True)
    result: dict[str, Any] = {
        "accuracy": table,
        "patterns": pattern_accuracy(sampler, probe, scale=scale, limit=limit),
        "scenes": scene_accuracy(sampler, probe, scale=scale, count=min(512, limit)),
        "defects": defect_statistics(sampler, scale=scale, count=min(192, limit)),
        "where_conditioning_acts": where_conditioning_acts(sampler, count=count),
        "autoencoder": autoencoder_measures(sampler, count=min(256, limit)),
        "per_pair": arguments.per_pair,
        "device": str(device),
    }
    result["seconds"] = round(time.monotonic() - began)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "evaluation.json").write_text(json.dumps(result, indent=2) + "\n")
    (arguments.out / "evaluation.md").write_text(markdown(result))
    print(markdown(result), flush=True)
    write_sheets(sampler, arguments.out, scale=scale, limit=limit)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

#!/usr/bin/env python
"""Quality of the quickstart: is the asset what the prompt says, from every side?

    python benchmarks/quickstart_quality.py --out outputs/quality                 # 12 prompts x 3 seeds, on the CPU
    python benchmarks/quickstart_quality.py --out outputs/quality --gpu 0 --jobs 6

Each asset is seen from 8 held-out cameras (azimuths and elevations between those of the previews) over white; the
probe reads category and color. Silhouettes from 12 cameras are compared with 256 random members of the category's
family: the best mean IoU is reported, with ``--rivals`` beside that of the best other family (64 members each; minutes
on a CPU). The exported mesh is checked for holes. Writes ``quality.md``, ``quality.json`` and ``sheet.png``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch
from torch import Tensor

from scoredist3d.cameras import Cameras, orbit

PROMPTS = (
    "a red mug",
    "a blue chair",
    "a green pine tree",
    "a yellow house",
    "an orange rocket",
    "a purple mushroom",
    "a pink teapot",
    "a brown teddy bear",
    "a cyan car",
    "a gray robot",
    "a red lighthouse",
    "a white snowman",
)
SEEDS = (0, 1, 2)
NUM_VIEWS = 8


def prior_size() -> int:
    """Side of the images of the embedded prior in pixels, which is also the size of the views for the probe."""
    from scoredist3d.priors.diffusers_loading import EMBEDDED_FOLDER

    size: int = json.loads((EMBEDDED_FOLDER / "vae" / "config.json").read_text())["sample_size"]
    return size


def ring(azimuths: list[float], elevations: list[float], size: int, device: torch.device) -> Cameras:
    """Cameras around the object at the prior's distance and field of view."""
    azimuth = torch.tensor(azimuths)
    elevation = torch.tensor([elevations[i % len(elevations)] for i in range(len(azimuths))])
    distance, fovy = torch.full_like(azimuth, 3.2), torch.full_like(azimuth, 40.0)
    return orbit(azimuth, elevation, distance, fovy, size, size).to(device)


@torch.no_grad()
def measure(system: Any, prompt: str, device: torch.device, *, rivals: bool = False) -> tuple[dict[str, Any], Tensor]:
    """Figures of one finished asset, and its 8 views (8, H, W, 3)."""
    from scoredist3d.procedural import AZIMUTH_SYMMETRY, CATEGORIES, COLORS
    from scoredist3d.procedural.probe import Probe
    from scoredist3d.procedural.shape_match import best_family_iou

    color, category = prompt.split(" ", 2)[1:]
    held_back = ring([22.5 + 45.0 * i for i in range(NUM_VIEWS)], [5.0, 25.0, 40.0], prior_size(), device)
    scene = system.scenes[0]
    views = torch.cat([scene(held_back[i], step=scene.step, rng=None).rgb for i in range(NUM_VIEWS)])
    reading = Probe.load(device=device)(views)
    symmetry = torch.full((NUM_VIEWS,), AZIMUTH_SYMMETRY[category], device=device)
    outline = ring([30.0 * i for i in range(12)], [0.0, 20.0, 45.0], 64, device)
    opacity = torch.cat([scene(outline[i], step=scene.step, rng=None).opacity[..., 0] for i in range(12)])
    figures: dict[str, Any] = {
        "category": (reading.category.argmax(-1) == CATEGORIES.index(category)).float().mean().item(),
        "color": (reading.color.argmax(-1) == COLORS.index(color)).float().mean().item(),
        "seen_categories": [CATEGORIES[i] for i in reading.category.argmax(-1).tolist()],
        "seen_colors": [COLORS[i] for i in reading.color.argmax(-1).tolist()],
        "azimuth_error_deg": reading.azimuth_error_deg(held_back.azimuth, symmetry).median().item(),
        "iou": best_family_iou(opacity, outline, category),
    }
    if rivals:
        ious = {name: best_family_iou(opacity, outline, name, members=64) for name in CATEGORIES if name != category}
        figures["best_other"] = max(ious, key=lambda name: ious[name])
        figures["best_other_iou"] = ious[figures["best_other"]]
    return figures, views


def work(prompt: str, seed: int, out: Path, gpu: str, rivals: bool, overrides: list[str]) -> None:
    """Make and measure one asset; writes ``asset.json`` and ``views.pt`` into ``out``."""
    from scoredist3d.config.validation import load_experiment
    from scoredist3d.training.distributed import Devices
    from scoredist3d.training.run import run_training

    files = [ROOT / "configs" / "quickstart.yaml"]
    config = load_experiment(files, [f"prompt={prompt}", f"seed={seed}", f"output_root={out}", *overrides])
    devices = gpu if gpu == "cpu" else [int(gpu)]
    result = run_training(config, devices=devices)
    if result.system is None:
        raise RuntimeError(f"{prompt}: no system came back")
    figures, views = measure(result.system, prompt, torch.device(Devices.parse(devices).first), rivals=rivals)
    report = json.loads((result.folder / "export" / "report.json").read_text())
    mesh = {key: report[key] for key in ("faces", "watertight", "holes", "components")}
    mesh["bytes"] = next(size for name, size in report["bytes"].items() if name.endswith(".glb"))
    figures |= {"prompt": prompt, "seed": seed, "seconds": sum(result.seconds.values()), "mesh": mesh}
    torch.save(views.cpu(), out / "views.pt")
    (out / "asset.json").write_text(json.dumps(figures, indent=2))


def run_worker(prompt: str, seed: int, out: Path, arguments: argparse.Namespace, overrides: list[str]) -> None:
    """One asset in its own process, unless it is there already."""
    folder = out / f"{prompt.replace(' ', '-')}-{seed}"
    if (folder / "asset.json").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, __file__, "--out", str(folder), "--gpu", arguments.gpu]
    command += ["--worker", prompt, str(seed), *overrides, *(["--rivals"] if arguments.rivals else [])]
    environment = dict(os.environ, OMP_NUM_THREADS=str(arguments.threads))
    process = subprocess.run(command, capture_output=True, text=True, env=environment)
    (folder / "log.txt").write_text(process.stdout + process.stderr)
    print(f"{prompt} seed {seed}: {'done' if process.returncode == 0 else 'FAILED, see ' + str(folder / 'log.txt')}")


def summarise(out: Path, expected: int) -> int:
    """Write the tables and the sheet; returns the exit code, 1 where fewer than ``expected`` assets came out."""
    from scoredist3d.export.images import image_grid, save_png

    assets = sorted(out.glob("*/asset.json"))
    rows = [json.loads(path.read_text()) for path in assets]
    if not rows:
        print(f"no finished asset in {out}", file=sys.stderr)
        return 1
    rivals = all("best_other" in row for row in rows)
    iou = "IoU (best other family)" if rivals else "IoU"
    lines = [
        f"| prompt | seed | category | color | {iou} | faces | watertight | GLB MiB |",
        "| --- " * 8 + "|",
    ]
    for row in rows:
        mesh = row["mesh"]
        rival = f" ({row['best_other']} {row['best_other_iou']:.2f})" if rivals else ""
        whole = "yes" if mesh["watertight"] else f"no, {mesh['holes']} holes"
        lines.append(
            f"| {row['prompt']} | {row['seed']} | {row['category']:.2f} | {row['color']:.2f} "
            f"| {row['iou']:.2f}{rival} | {mesh['faces']:,} | {whole} "
            f"| {mesh['bytes'] / 2**20:.1f} |"
        )

    def mean(key: str) -> float:
        return sum(row[key] for row in rows) / len(rows)

    good = sum(row["category"] >= 0.9 and row["color"] >= 0.9 for row in rows)
    other = f" (best other family {mean('best_other_iou'):.2f})" if rivals else ""
    closed = sum(row["mesh"]["watertight"] for row in rows)
    lines += [
        "",
        f"{len(rows)} assets: category {mean('category'):.3f}, color {mean('color'):.3f} of all views, "
        f"IoU {mean('iou'):.2f}{other}; "
        f"{good} of {len(rows)} assets reach 0.9 in both; {closed} meshes are watertight; "
        f"{mean('seconds'):.0f} s per asset.",
    ]
    (out / "quality.md").write_text("\n".join(lines) + "\n")
    (out / "quality.json").write_text(json.dumps(rows, indent=2) + "\n")
    views = torch.cat([torch.load(path.parent / "views.pt", weights_only=True) for path in assets])
    save_png(image_grid(views, columns=min(3, len(rows)) * NUM_VIEWS), out / "sheet.png")
    print("\n".join(lines))
    if len(rows) < expected:
        print(f"{expected - len(rows)} of {expected} assets failed and are NOT in these means", file=sys.stderr)
        return 1
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="finished assets found here are not made again")
    parser.add_argument("--prompts", nargs="+", default=list(PROMPTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--gpu", default="cpu", help="'cpu' or a GPU number")
    parser.add_argument("--jobs", type=int, default=1, help="assets made at the same time")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of each job")
    parser.add_argument("--rivals", action="store_true", help="also compare with every other family")
    parser.add_argument("--worker", nargs=2, metavar=("PROMPT", "SEED"), help=argparse.SUPPRESS)
    arguments, overrides = parser.parse_known_args(argv)
    if arguments.worker:
        work(arguments.worker[0], int(arguments.worker[1]), arguments.out, arguments.gpu, arguments.rivals, overrides)
        return 0
    jobs = [(prompt, seed) for seed in arguments.seeds for prompt in arguments.prompts]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        list(pool.map(lambda job: run_worker(job[0], job[1], arguments.out, arguments, overrides), jobs))
    return summarise(arguments.out, len(jobs))


if __name__ == "__main__":
    raise SystemExit(main())

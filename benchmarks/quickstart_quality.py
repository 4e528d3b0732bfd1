#!/usr/bin/env python
"""Quality of the quickstart: is the asset what the prompt says, from every side?

    python benchmarks/quickstart_quality.py --out outputs/quality                 # 12 prompts x 3 seeds, on the CPU
    python benchmarks/quickstart_quality.py --out outputs/quality --gpu 0 --jobs 6
    python benchmarks/quickstart_quality.py --out outputs/quality --config configs/fast.yaml
    python benchmarks/quickstart_quality.py --out outputs/quality --runs outputs/quickstart/*  # runs that exist

The asset of a pipeline is that of its last stage; its time is the sum over the stages.

Each asset is seen from 8 held-out cameras (azimuths and elevations between those of the previews) over white; the
probe reads category, color and, if the prompt names one, the pattern. These columns have two values: the object in its
own renderer, and the GLB. Silhouettes from 12 cameras are compared with 256 random members of the category's family:
the best mean IoU is reported, with ``--rivals`` beside that of the best other family (64 members each; minutes on a
CPU). The exported mesh is checked for holes.

The GLB is read back from the file. The true object is the member of the family whose depths from those 12 cameras are
nearest to the GLB's: the best of 768 random members, whose proportions are then refined (seconds on a CPU; see
:mod:`scoredist3d.evaluation.nearest_object`). It has the color of the prompt, and a second color or pattern only if the
prompt names one. The GLB is neither moved nor scaled. Both are compared from the 8 held-out cameras at 256 pixels
over white, under the same light: PSNR in dB and SSIM of the colors, mean Euclidean distance of the probe's features,
mean angle between the normals at nearest surface points, and share of the common pixels whose depths differ by more
than 0.08 radii. The other columns with two values are the GLB and the true object: length-weighted mean dihedral angle,
share of the edge length sharper than 45 degrees, genus, and mean saturation (max - min over the channels, of the
covered pixels). The mesh of the true object is extracted and simplified as that of the run. Clipped texels have a
channel at 0 or 255.

Writes ``quality.md``, ``quality.json`` and ``sheet.png``, which shows each GLB above its true object.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np
import torch
from overrides import split_overrides
from summaries import object_folder, phase_seconds, read_summary
from torch import Tensor

from scoredist3d.cameras import Cameras, orbit

if TYPE_CHECKING:
    from scoredist3d.config.experiment import ExperimentConfig
    from scoredist3d.evaluation.true_objects import Stated

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
TRUTH_SIZE = 256  # pixels of the views of GLB and true object
READ = ("category", "color", "pattern")
ASSET_FILES = ("asset.json", "views.png")


def prior_size() -> int:
    """Side of the images of the embedded prior in pixels, which is also the size of the views for the probe."""
    from scoredist3d.priors.model_files import EMBEDDED_FOLDER

    size: int = json.loads((EMBEDDED_FOLDER / "vae" / "config.json").read_text())["sample_size"]
    return size


def ring(azimuths: list[float], elevations: list[float], size: int, device: torch.device) -> Cameras:
    """Cameras around the object at the prior's distance and field of view."""
    azimuth = torch.tensor(azimuths)
    elevation = torch.tensor([elevations[i % len(elevations)] for i in range(len(azimuths))])
    distance, fovy = torch.full_like(azimuth, 3.2), torch.full_like(azimuth, 40.0)
    return orbit(azimuth, elevation, distance, fovy, size, size).to(device)


def outlines(device: torch.device) -> Cameras:
    """The 12 cameras that find the best match, at 64 pixels."""
    return ring([30.0 * i for i in range(12)], [0.0, 20.0, 45.0], 64, device)


def held_out(size: int, device: torch.device) -> Cameras:
    """The 8 held-out cameras."""
    return ring([22.5 + 45.0 * i for i in range(NUM_VIEWS)], [5.0, 25.0, 40.0], size, device)


class Measured(NamedTuple):
    """A finished asset as its own renderer shows it.

    Attributes:
        figures: Figures by name.
        views: (8, H, W, 3), its held-out views.
    """

    figures: dict[str, Any]
    views: Tensor


@torch.no_grad()
def measure(system: Any, stated: Stated, device: torch.device, *, rivals: bool = False) -> Measured:
    """Measure one finished asset as its own renderer shows it, of a prompt that states ``stated``."""
    from quickstart_truth import shares

    from scoredist3d.procedural import AZIMUTH_SYMMETRY, CATEGORIES, COLORS
    from scoredist3d.procedural.probe import Probe
    from scoredist3d.procedural.shape_match import best_family_match

    category = stated.category
    held_back = held_out(prior_size(), device)
    scene = system.scenes[0]
    views = torch.cat([scene(held_back[i], step=scene.step, rng=None).rgb for i in range(NUM_VIEWS)])
    reading = Probe.load(device=device)(views)
    symmetry = torch.full((NUM_VIEWS,), AZIMUTH_SYMMETRY[category], device=device)
    outline = outlines(device)
    opacity = torch.cat([scene(outline[i], step=scene.step, rng=None).opacity[..., 0] for i in range(12)])
    figures: dict[str, Any] = {
        **shares(reading, stated),
        "seen_categories": [CATEGORIES[i] for i in reading.category.argmax(-1).tolist()],
        "seen_colors": [COLORS[i] for i in reading.color.argmax(-1).tolist()],
        "azimuth_error_deg": reading.azimuth_error_deg(held_back.azimuth, symmetry).median().item(),
        "iou": best_family_match(opacity, outline, category).iou,
    }
    if rivals:
        others = [name for name in CATEGORIES if name != category]
        ious = {name: best_family_match(opacity, outline, name, members=64).iou for name in others}
        figures["best_other"] = max(ious, key=lambda name: ious[name])
        figures["best_other_iou"] = ious[figures["best_other"]]
    return Measured(figures, views)


def record(system: Any, config: ExperimentConfig, run: Path, out: Path, device: torch.device, *, rivals: bool) -> None:
    """Measure the asset of a finished run; writes ``asset.json`` and ``views.png`` into ``out``.

    Args:
        system: The trained system.
        config: The config of the run.
        run: Folder of the run or pipeline.
        out: Folder of the results.
        device: Device of the system.
        rivals: Whether to compare the silhouettes with other families, too.

    Raises:
        ValueError: The prompt has another form than those of the benchmark, or no GLB was exported.
    """
    from quickstart_truth import compare_with_truth, exported_glb, shares

    from scoredist3d.evaluation.true_objects import Stated
    from scoredist3d.export.images import save_png
    from scoredist3d.procedural.probe import Probe

    stated = Stated.of(config.prompt)
    figures, _ = measure(system, stated, device, rivals=rivals)
    glb = exported_glb(object_folder(run) / "export")
    probe = Probe.load(device=device)
    compared = compare_with_truth(glb.delivered, config, outlines(device), held_out(TRUTH_SIZE, device), probe)
    mesh = {key: glb.report[key] for key in ("faces", "watertight", "holes", "components")}
    mesh["bytes"] = glb.bytes
    seconds = sum(phase_seconds(read_summary(run)).values())
    figures |= compared.figures | {"glb": shares(probe(compared.ours), stated)}
    figures |= {"prompt": config.prompt, "seed": config.seed, "seconds": seconds, "mesh": mesh}
    figures |= {"name": out.name, "run": str(run)}
    out.mkdir(parents=True, exist_ok=True)
    save_png(compared.picture(f"{config.prompt}, seed {config.seed}"), out / "views.png")
    (out / "asset.json").write_text(json.dumps(figures, indent=2))


def finished(run: Path, devices: Any) -> tuple[Any, ExperimentConfig]:
    """The system of a finished run, or of the last stage of a pipeline, from its last checkpoint, and its config."""
    from scoredist3d.config.validation import load_experiment
    from scoredist3d.training.checkpoint import load_weights, read_checkpoint
    from scoredist3d.training.distributed import Devices
    from scoredist3d.training.fit import RankContext, build_system
    from scoredist3d.training.folder import find_run

    folder, checkpoint = find_run(object_folder(run))
    config, where = load_experiment([folder.resolved_config]), Devices.parse(devices)
    system, state = build_system(config, RankContext(where)), read_checkpoint(checkpoint)
    load_weights(system, state["state_dict"])
    system.to_device(torch.device(where.first))
    system.restore_step(state["global_step"])
    return system, config


def trained(file: Path, overrides: list[str], devices: Any) -> tuple[Any, ExperimentConfig, Path]:
    """The system and config of a new run, or of the last stage of a new pipeline, and the folder of the whole."""
    from scoredist3d.config.loader import merge_layers
    from scoredist3d.config.pipeline import is_pipeline, load_pipeline
    from scoredist3d.config.validation import load_experiment
    from scoredist3d.training.pipeline import run_pipeline
    from scoredist3d.training.run import run_training

    if is_pipeline(merge_layers([file])):
        pipeline = load_pipeline([file], overrides)
        whole = run_pipeline(pipeline, devices=devices)
        last = list(pipeline.stages)[-1]
        return whole.stages[last].system, pipeline.stages[last], whole.folder
    config = load_experiment([file], overrides)
    result = run_training(config, devices=devices)
    return result.system, config, result.folder


def work(arguments: argparse.Namespace, overrides: list[str]) -> None:
    """Make one asset, unless a run is given, and measure it."""
    from scoredist3d.training.distributed import Devices

    out = arguments.out
    devices = arguments.gpu if arguments.gpu == "cpu" else [int(arguments.gpu)]
    if arguments.runs:
        run = arguments.runs[0]
        system, config = finished(run, devices)
    else:
        prompt, seed = arguments.worker
        asked = [f"prompt={prompt}", f"seed={seed}", f"output_root={out}", *overrides]
        system, config, run = trained(arguments.config, asked, devices)
    device = torch.device(Devices.parse(devices).first)
    record(system, config, run, out, device, rivals=arguments.rivals)


class Job(NamedTuple):
    """One asset.

    Attributes:
        name: Name of its folder.
        arguments: Arguments of the worker that makes or measures it.
    """

    name: str
    arguments: list[str]

    @classmethod
    def new(cls, prompt: str, seed: int) -> Job:
        """An asset that is made."""
        return cls(f"{prompt.replace(' ', '-')}-{seed}", ["--worker", prompt, str(seed)])

    @classmethod
    def of_run(cls, run: Path) -> Job:
        """The asset of a run that exists."""
        run = run.resolve()
        return cls("-".join(run.parts[-3:]), ["--worker", "", "0", "--runs", str(run)])


def run_worker(job: Job, arguments: argparse.Namespace, overrides: list[str]) -> None:
    """One asset in its own process, unless it is there already."""
    folder = arguments.out / job.name
    done = all((folder / name).is_file() for name in ASSET_FILES)
    if done and "glb" in json.loads((folder / "asset.json").read_text()):
        return
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, __file__, "--out", str(folder), "--gpu", arguments.gpu]
    command += ["--config", str(arguments.config)]
    command += [*job.arguments, *overrides, *(["--rivals"] if arguments.rivals else [])]
    environment = dict(os.environ, OMP_NUM_THREADS=str(arguments.threads))
    process = subprocess.run(command, capture_output=True, text=True, env=environment)
    (folder / "log.txt").write_text(process.stdout + process.stderr)
    print(f"{job.name}: {'done' if process.returncode == 0 else 'FAILED, see ' + str(folder / 'log.txt')}", flush=True)


def _read(row: dict[str, Any], key: str) -> str:
    """Cell with the shares of the views of the field and of the GLB that the probe reads correctly."""
    return "-" if row[key] is None else f"{row[key]:.2f} / {row['glb'][key]:.2f}"


def table(rows: list[dict[str, Any]], *, rivals: bool) -> list[str]:
    """Lines of the Markdown table, one row per asset."""
    from quickstart_truth import COLUMNS, cells

    iou = "IoU (best other family)" if rivals else "IoU"
    columns = ["prompt", "seed", "category", "color", "pattern", iou, "faces", "watertight", "GLB MiB", *COLUMNS]
    lines = [f"| {' | '.join(columns)} |", "| --- " * len(columns) + "|"]
    counts = Counter((row["prompt"], row["seed"]) for row in rows)
    for row in rows:
        mesh = row["mesh"]
        rival = f" ({row['best_other']} {row['best_other_iou']:.2f})" if rivals else ""
        whole = "yes" if mesh["watertight"] else f"no, {mesh['holes']} holes"
        # Runs that exist may have the same prompt and seed.
        name = f" ({row['name']})" if counts[row["prompt"], row["seed"]] > 1 else ""
        lines.append(
            f"| {row['prompt']}{name} | {row['seed']} | {' | '.join(_read(row, key) for key in READ)} "
            f"| {row['iou']:.2f}{rival} | {mesh['faces']:,} | {whole} "
            f"| {mesh['bytes'] / 2**20:.1f} | {' | '.join(cells(row))} |"
        )
    return lines


def sheet(assets: list[Path]) -> np.ndarray:
    """The pictures of all assets as one image, (H, W, 3) uint8."""
    from PIL import Image
    from quickstart_truth import sheet_of

    pictures = []
    for path in assets:
        with Image.open(path.parent / "views.png") as picture:
            pictures.append(np.asarray(picture.convert("RGB")))
    return sheet_of(pictures)


def summarise(out: Path, expected: int) -> int:
    """Write the tables and the sheet; returns the exit code, 1 where fewer than ``expected`` assets came out."""
    from quickstart_truth import beside, mean_of

    from scoredist3d.export.images import save_png

    assets = [path for path in sorted(out.glob("*/asset.json")) if (path.parent / "views.png").is_file()]
    rows = [json.loads(path.read_text()) for path in assets]
    old = [path for path, row in zip(assets, rows, strict=True) if "glb" not in row]
    if old:
        print(f"{old[0]} was written by an earlier version; delete its folder", file=sys.stderr)
        return 1
    if not rows:
        print(f"no finished asset in {out}", file=sys.stderr)
        return 1

    mean = partial(mean_of, rows)
    patterned = any(row["pattern"] is not None for row in rows)
    patterns = f"pattern {mean('pattern'):.2f} (GLB {mean('pattern', 'glb'):.2f}), " if patterned else ""
    rivals = all("best_other" in row for row in rows)
    good = sum(row["category"] >= 0.9 and row["color"] >= 0.9 for row in rows)
    other = f" (best other family {mean('best_other_iou'):.2f})" if rivals else ""
    closed = sum(row["mesh"]["watertight"] for row in rows)
    lines = [
        *table(rows, rivals=rivals),
        "",
        f"{len(rows)} assets: category {mean('category'):.3f} (GLB {mean('category', 'glb'):.3f}), color "
        f"{mean('color'):.3f} (GLB {mean('color', 'glb'):.3f}), {patterns}of all views; "
        f"IoU {mean('iou'):.2f}{other}; "
        f"{good} of {len(rows)} assets reach 0.9 in both; {closed} meshes are watertight; "
        f"{mean('seconds'):.0f} s per asset.",
        beside(rows),
    ]
    (out / "quality.md").write_text("\n".join(lines) + "\n")
    (out / "quality.json").write_text(json.dumps(rows, indent=2) + "\n")
    save_png(sheet(assets), out / "sheet.png")
    print("\n".join(lines))
    if len(rows) < expected:
        print(f"{expected - len(rows)} of {expected} assets failed and are NOT in these means", file=sys.stderr)
        return 1
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="finished assets found here are not made again")
    default = ROOT / "configs" / "quickstart.yaml"
    parser.add_argument("--config", type=Path, default=default, help="recipe of new assets, a run or a pipeline")
    parser.add_argument("--prompts", nargs="+", default=list(PROMPTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--gpu", default="cpu", help="'cpu' or a GPU number")
    parser.add_argument("--jobs", type=int, default=1, help="assets made at the same time")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of each job")
    parser.add_argument("--rivals", action="store_true", help="also compare with every other family")
    parser.add_argument("--runs", type=Path, nargs="+", help="folders of finished runs to measure instead of new ones")
    parser.add_argument("--worker", nargs=2, metavar=("PROMPT", "SEED"), help=argparse.SUPPRESS)
    options, overrides = split_overrides(argv)
    arguments = parser.parse_args(options)
    if arguments.runs and overrides:
        parser.error(f"--runs measures runs as they are, so {' '.join(overrides)} cannot apply")
    if arguments.worker:
        work(arguments, overrides)
        return 0
    if arguments.runs:
        jobs = [Job.of_run(run) for run in arguments.runs]
    else:
        jobs = [Job.new(prompt, seed) for seed in arguments.seeds for prompt in arguments.prompts]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        list(pool.map(lambda job: run_worker(job, arguments, overrides), jobs))
    return summarise(arguments.out, len(jobs))


if __name__ == "__main__":
    raise SystemExit(main())

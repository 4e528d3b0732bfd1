#!/usr/bin/env python
"""What each representation can do: recover a known object from 24 posed views, without any distillation.

    python benchmarks/representations.py                     # on this machine's CPU
    python benchmarks/representations.py --gpu 0 --size 256  # on a GPU
    python benchmarks/representations.py --only dmtet gaussians --steps 200

The object is procedural, its views come from an exact ray caster. Every representation is the fragment of
``configs/representation`` named in the table, fitted by Adam to the squared difference of color and coverage over its
own backgrounds. PSNR is over 12 views that were held out, Chamfer distance (mean, both ways, in thousandths of the
ball's radius) is between the exported surface and the points of the true one that can be seen from outside. Time is
that of the steps alone (warm-up of one step left out), memory is the process's peak on a CPU and torch's peak on a GPU.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import numpy as np
import torch

from scoredist3d.cameras import sphere_cameras
from scoredist3d.config.loader import load, merge
from scoredist3d.config.optimizer import OptimizerConfig
from scoredist3d.config.validation import parse, parse_component
from scoredist3d.evaluation.surface_distance import chamfer_distance, visible_points
from scoredist3d.export.images import image_grid, save_png
from scoredist3d.meshes.isosurface_extraction import find_surface
from scoredist3d.meshes.mesh import drop_small_components
from scoredist3d.meshes.sampling import mesh_points
from scoredist3d.procedural import CATEGORIES, COLORS, Objects, render_objects, sample_objects
from scoredist3d.seeding import Rng
from scoredist3d.systems.scene import Scene, SceneShape
from scoredist3d.training.reconstruction import FitSettings, PosedViews, fit_scene, view_psnr

TRAINING_VIEWS, HELD_OUT_VIEWS = 24, 12


@dataclass(frozen=True)
class Case:
    """One row of the table.

    Attributes:
        files: Fragments of ``configs/representation``.
        system: What is added to their ``system`` block.
        optimizer: Learning rates of the fit.
        losses: Regularisers of the fit.
        steps: Optimiser steps.
    """

    files: tuple[str, ...]
    optimizer: dict[str, Any]
    system: dict[str, Any] = field(default_factory=dict)
    losses: dict[str, Any] = field(default_factory=dict)
    steps: int = 500


def falling(rate: float) -> dict[str, Any]:
    """A learning rate that falls to a tenth over the fit."""
    return {"from": rate, "to": rate / 10, "end": 500, "shape": "exp"}


def rates(rate: float, **groups: Any) -> dict[str, Any]:
    """Adam, with other rates for some of the geometry's groups."""
    return {"lr": falling(rate), "eps": 1e-15, "lr_groups": {f"geometry.{name}": lr for name, lr in groups.items()}}


NETWORK = {"geometry": {"sdf_source": "network"}}
GAUSSIAN_RATES = rates(0.01, means=falling(0.002), scales=0.01, quaternions=0.01, opacities=0.05, features=0.03)
CASES: dict[str, Case] = {
    "hash-nerf": Case(("hash-nerf-small",), rates(0.02)),
    "hash-nerf, importance": Case(("hash-nerf-small",), rates(0.02), {"renderer": {"estimator": "importance"}}),
    "hash-nerf, proposal": Case(("hash-nerf-small",), rates(0.02), {"renderer": {"estimator": "proposal"}}),
    "sdf": Case(("sdf-small",), rates(0.02), {"geometry": {"beta": 0.02}}, {"eikonal": 0.03}),
    "neus": Case(("neus-small",), rates(0.01), losses={"eikonal": 0.1}),
    "dmtet": Case(("dmtet-small",), rates(0.01, deform=falling(0.003)), NETWORK, {"normal-consistency": 0.02}),
    "dmtet, vertices": Case(
        ("dmtet-small",),
        rates(0.02, sdf=falling(0.02), deform=falling(0.003)),
        {"geometry": {"gradient_smoothing": 0}},  # with the filter, a fit from a ball converges too slowly
        losses={"normal-consistency": 0.1, "laplacian": 2.0},
    ),
    "flexicubes": Case(
        ("flexicubes-small",),
        rates(0.01, deform=falling(0.003)),
        NETWORK,
        {"normal-consistency": 0.05, "dual-deviation": 0.25},
    ),
    "gaussians": Case(
        ("gaussians-small",), GAUSSIAN_RATES, {"geometry": {"densify": {"grad_threshold": 0, "densify_fraction": 0.15}}}
    ),
}


def parts_of(case: Case) -> Any:
    """The system block of a representation, validated."""
    merged = load([ROOT / "configs" / "representation" / f"{name}.yaml" for name in case.files])
    return parse_component("system", merge(merged["system"], case.system))


def true_object(category: str, color: str, seed: int) -> Objects:
    """One object of one color with parts of another."""
    generator = torch.Generator().manual_seed(seed)
    other = (COLORS.index(color) + 3) % len(COLORS)
    return sample_objects(
        1, generator, category=CATEGORIES.index(category), color=COLORS.index(color), second_color=other, size=1
    )


@torch.no_grad()
def posed_views(object: Objects, count: int, size: int, turn: float = 0.0) -> PosedViews:
    """Antialiased pictures from all around."""
    cameras = sphere_cameras(count, distance=3.2, fovy_deg=40.0, size=size, turn=turn).to(object.device)
    seen = render_objects(object.repeat_interleave(count), cameras, antialias=3)
    return PosedViews(cameras, seen.rgba[..., :3], seen.rgba[..., 3:])


def measure(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Fit one representation and say how well that went."""
    case, device = CASES[name], torch.device("cpu" if arguments.gpu is None else f"cuda:{arguments.gpu}")
    block, rng = parts_of(case), Rng(arguments.seed)
    object = true_object(arguments.category, arguments.color, arguments.seed)
    views, held_out = (
        posed_views(object, count, arguments.size, turn).to(device)
        for count, turn in ((TRAINING_VIEWS, 0.0), (HELD_OUT_VIEWS, 0.5))
    )
    parts = (block.geometry, block.material, block.background, block.renderer)
    scene = Scene(*parts, rng=rng).to(device)
    optimizer = parse(OptimizerConfig, case.optimizer)
    losses = {key: parse_component("loss", {"type": key, "weight": value}) for key, value in case.losses.items()}
    steps = arguments.steps or case.steps
    ticks: list[float] = []

    def tick(step: int, loss: float) -> None:
        ticks.append(time.perf_counter())

    settings = FitSettings(steps=steps, batch_size=arguments.batch, optimizer=optimizer, losses=losses)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    fit_scene(scene, views, settings, rng, tick)
    memory = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_rss()
    row = {
        "name": name,
        "steps": steps,
        "seconds": ticks[-1] - ticks[0],
        "ms": 1000.0 * float(np.median(np.diff(ticks))),
        "gib": memory / 2**30,
        "psnr": view_psnr(scene, held_out),
        "training psnr": view_psnr(scene, views),
        "parameters": sum(parameter.numel() for parameter in scene.parameters()),
    }
    row |= surface_error(scene, object)
    if arguments.pictures:
        save_pictures(scene, held_out, Path(arguments.pictures) / f"{name.replace(', ', '-')}.png")
    return row


def surface_error(scene: Scene, object: Objects) -> dict[str, Any]:
    """Chamfer distance of what would be exported, and whether that is closed."""
    generator = np.random.default_rng(0)
    found = find_surface(SceneShape(scene), 128).mesh
    mesh, _ = drop_small_components(found, 0.02)
    truth = visible_points(object).numpy()
    truth = truth[generator.permutation(len(truth))[:20000]]
    return {"chamfer": 1000.0 * chamfer_distance(mesh_points(mesh, 20000, generator), truth), "faces": len(mesh.faces)}


@torch.no_grad()
def save_pictures(scene: Scene, views: PosedViews, path: Path) -> None:
    """Held-back views above, renders below."""
    columns = min(6, len(views))
    index = torch.arange(columns, device=views.rgb.device)
    shown = [scene(views.cameras[int(i)], step=scene.step, rng=None) for i in index]
    renders = torch.cat([render.rgb + (1.0 - render.background) * (1.0 - render.opacity) for render in shown])
    path.parent.mkdir(parents=True, exist_ok=True)
    save_png(image_grid(torch.cat([views[index].over(1.0), renders]).cpu(), columns), path)


def peak_rss() -> int:
    """Bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main(argv: list[str] | None = None) -> int:
    """Measure every representation in a process of its own and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=CASES, metavar="NAME", help=", ".join(CASES))
    parser.add_argument("--gpu", type=int)
    parser.add_argument("--size", type=int, default=128, help="pixels per side of the views")
    parser.add_argument("--steps", type=int, help="in place of each representation's own number")
    parser.add_argument("--batch", type=int, default=2, help="views per step")
    parser.add_argument("--category", default="mug", choices=CATEGORIES)
    parser.add_argument("--color", default="red", choices=COLORS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pictures", help="folder for pictures of the held-out views")
    parser.add_argument("--json", action="store_true", help="one line of figures, for one --only, in this process")
    arguments = parser.parse_args(argv)
    if arguments.json:
        print(json.dumps(measure(arguments.only[0], arguments)))
        return 0
    rows = [measured_apart(name, sys.argv[1:] if argv is None else argv) for name in arguments.only or CASES]
    where = platform.processor() if arguments.gpu is None else torch.cuda.get_device_name(arguments.gpu)
    size = f"{arguments.size} x {arguments.size} pixels"
    print(f"\n{where}, torch {torch.__version__}, {size}, {arguments.batch} views per step\n")
    print("| representation | steps | ms/step | peak GiB | PSNR, dB | Chamfer, 1/1000 radius | faces |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for row in rows:
        quality = f"{row['psnr']:.1f} | {row['chamfer']:.1f} | {row['faces']:,}"
        print(f"| {row['name']} | {row['steps']} | {row['ms']:.1f} | {row['gib']:.2f} | {quality} |")
    return 0


def measured_apart(name: str, argv: list[str]) -> dict[str, Any]:
    """:func:`measure` in a fresh process, so that peak memory is one representation's own."""
    kept = [argument for argument in argv if argument not in CASES and argument != "--only"]
    command = [sys.executable, str(Path(__file__)), *kept, "--only", name, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name}: {done.stderr.strip().splitlines()[-1]}")
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps(row), flush=True)
    return row


if __name__ == "__main__":
    raise SystemExit(main())

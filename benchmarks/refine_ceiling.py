#!/usr/bin/env python
"""What limits the last stage of the quickstart? The stage once more, with renders of the true object as its targets.

    python benchmarks/refine_ceiling.py --out outputs/ceiling outputs/quality/*/quickstart/*
    python benchmarks/refine_ceiling.py --out outputs/ceiling --gpu 0 --jobs 12 outputs/quality/*/quickstart/*

The arguments are folders of finished pipelines whose last stage ``refine`` is ``configs/recipe/embedded-finish.yaml``.
The true object of each delivered GLB is found as in ``quickstart_quality.py``. The stage then starts from the coarse
stage again, but HiFA's kept targets are renders of that object from the same cameras, with the size of the prior's
images. ``images`` estimates normals and depths from them as the recipe does, ``surface`` takes them from the object.

Writes ``ceiling.md`` and ``ceiling.json``: the delivered GLB and the GLBs of both runs beside the true object.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch
import yaml
from overrides import split_overrides
from quickstart_quality import TRUTH_SIZE, held_out, outlines
from quickstart_truth import Comparison, compare_with_truth, exported_glb, mean_of, true_object
from torch import Tensor

from scoredist3d.config import option
from scoredist3d.config.validation import load_experiment
from scoredist3d.evaluation.true_objects import object_views
from scoredist3d.export.images import save_png
from scoredist3d.guidance.core.context import StepContext
from scoredist3d.guidance.core.image_space import resized
from scoredist3d.guidance.hifa import HiFA
from scoredist3d.priors.base import Prior
from scoredist3d.priors.conditioning import CFGConditions
from scoredist3d.procedural import Objects
from scoredist3d.procedural.probe import Probe
from scoredist3d.procedural.surface_estimator import SurfaceEstimate
from scoredist3d.registry import register
from scoredist3d.seeding import Rng
from scoredist3d.training.run import run_training

TARGETS = ("images", "surface")


@register("guidance", "hifa-true-object", summary="HiFA whose kept targets are renders of a known object.")
class TrueObjectHiFA(HiFA):
    """HiFA with renders of the true object of a GLB in place of denoised images."""

    @dataclass
    class Config(HiFA.Config):
        """Options of HiFA, and the object."""

        glb_folder: str = option("", "Folder with the GLB whose true object is the target, and with its report.json.")
        prompt: str = option("", "Prompt of the GLB.")
        true_surface: bool = option(False, "Take normals and depths from the object instead of estimating them.")

    config: Config

    def __init__(self, config: Config, *, prior: Prior, rng: Rng | None = None) -> None:
        super().__init__(config, prior=prior, rng=rng)
        self._member = member_of(Path(config.glb_folder), config.prompt)

    def target_images(self, z: Tensor, conditions: CFGConditions, ctx: StepContext) -> Tensor:
        """Renders (B, H, W, 3) of the object over the backgrounds of the step."""
        assert ctx.background is not None and conditions.cameras is not None
        size = self.prior.decode(z[:1].detach()).shape[1]
        render = object_views(self._member.to(z.device), conditions.cameras.with_size(size, size))
        return render.over(resized(ctx.background.detach(), render.rgba)).clamp(0.0, 1.0)

    def target_surface(self, images: Tensor, conditions: CFGConditions, ctx: StepContext) -> Tensor:
        """Estimates from the images; with ``true_surface`` the normals and depths are those of the object."""
        estimated = super().target_surface(images, conditions, ctx)
        if not self.config.true_surface:
            return estimated
        assert conditions.cameras is not None
        height, width = images.shape[1:3]
        render = object_views(self._member.to(images.device), conditions.cameras.with_size(height, width))
        guess, opacity = SurfaceEstimate.unpacked(estimated), render.rgba[..., 3:]
        normal = torch.where(opacity > 0.5, render.normal, guess.normal)
        depth = torch.where(opacity > 0.5, render.depth[..., None], guess.depth)
        return SurfaceEstimate(normal, depth, opacity, guess.normal_error, guess.depth_error).packed()


@lru_cache(maxsize=1)
def member_of(export: Path, prompt: str) -> Objects:
    """The true object of the GLB in an export folder, on the CPU; the search takes longer than the renders."""
    return true_object(exported_glb(export).delivered, prompt, outlines(torch.device("cpu")))


def work(pipeline: Path, targets: str, out: Path, gpu: str, overrides: list[str]) -> dict[str, Any]:
    """Run the stage with the given targets (``delivered``: no run) and compare its GLB with the true object."""
    stage, device = pipeline / "refine", torch.device("cpu" if gpu == "cpu" else f"cuda:{gpu}")
    config, delivered = load_experiment([stage / "configs" / "config.yaml"]), stage / "export"
    export = delivered
    if targets != "delivered":
        own = load_experiment(
            [stage / "configs" / "config.yaml", _layer(stage, targets, out)],
            [f"output_root={out / targets}", "test.enabled=false", *overrides],
        )
        export = run_training(own, devices="cpu" if gpu == "cpu" else [int(gpu)]).folder / "export"
    views, probe = held_out(TRUTH_SIZE, device), Probe.load(device=device)
    member = member_of(delivered, config.prompt).to(device)
    found = compare_with_truth(exported_glb(export).delivered, config, outlines(device), views, probe, member=member)
    _save(found, f"{config.prompt}, {targets}", out / f"{pipeline.name}-{targets}")
    return {"prompt": config.prompt, "run": pipeline.name, "targets": targets, **found.figures}


def _layer(stage: Path, targets: str, out: Path) -> Path:
    """Config file that replaces the guidance of the stage; a new type would discard its options, so all are written."""
    system = yaml.safe_load((stage / "configs" / "config.yaml").read_text(encoding="utf-8"))["system"]
    own = {"type": "hifa-true-object", "glb_folder": str(stage / "export"), "true_surface": targets == "surface"}
    prompt = load_experiment([stage / "configs" / "config.yaml"]).prompt
    path = out / f"{stage.parent.name}-{targets}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    guidance = {**system["guidance"], **own, "prompt": prompt}
    path.write_text(yaml.safe_dump({"system": {"guidance": guidance}}), encoding="utf-8")
    return path


def _save(found: Comparison, label: str, stem: Path) -> None:
    stem.parent.mkdir(parents=True, exist_ok=True)
    save_png(found.picture(label), stem.with_suffix(".png"))


def table(rows: list[dict[str, Any]]) -> str:
    """Normals of the three GLBs of each prompt, and the means, as a Markdown table."""
    kinds = ("delivered", *TARGETS)
    lines = [f"| prompt | {' | '.join(f'normals (deg), {kind}' for kind in kinds)} |", "| --- " * 4 + "|"]
    for run in dict.fromkeys(row["run"] for row in rows):
        own = {row["targets"]: row for row in rows if row["run"] == run}
        cells = [f"{own[kind]['normal_angle_deg']:.1f}" if kind in own else "-" for kind in kinds]
        lines.append(f"| {next(iter(own.values()))['prompt']} | {' | '.join(cells)} |")
    means = [mean_of([row for row in rows if row["targets"] == kind], "normal_angle_deg") for kind in kinds]
    return "\n".join([*lines, f"| mean | {' | '.join(f'{value:.1f}' for value in means)} |"]) + "\n"


def main(argv: list[str] | None = None) -> int:
    """Run the stages, each in its own process; returns the exit code, 1 if any of them failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipelines", type=Path, nargs="+", help="folders of finished pipelines")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--gpu", default="cpu", help="'cpu' or a GPU number")
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of each job")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options, overrides = split_overrides(argv)
    arguments = parser.parse_args(options)
    if arguments.worker:
        row = work(arguments.pipelines[0].resolve(), arguments.worker, arguments.out, arguments.gpu, overrides)
        (arguments.out / f"{row['run']}-{row['targets']}.json").write_text(json.dumps(row, indent=2))
        return 0

    def start(job: tuple[Path, str]) -> None:
        pipeline, targets = job
        command = [sys.executable, __file__, str(pipeline), "--out", str(arguments.out), "--gpu", arguments.gpu]
        command += ["--worker", targets, *overrides]
        environment = dict(os.environ, OMP_NUM_THREADS=str(arguments.threads))
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        name = f"{pipeline.name}-{targets}"
        (arguments.out / f"{name}.log").write_text(done.stdout + done.stderr)
        print(f"{name}: {'done' if done.returncode == 0 else 'FAILED'}", flush=True)

    arguments.out.mkdir(parents=True, exist_ok=True)
    jobs = [(pipeline, targets) for pipeline in arguments.pipelines for targets in ("delivered", *TARGETS)]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        list(pool.map(start, jobs))
    files = [arguments.out / f"{pipeline.resolve().name}-{targets}.json" for pipeline, targets in jobs]
    rows = [json.loads(path.read_text()) for path in files if path.is_file()]
    (arguments.out / "ceiling.json").write_text(json.dumps(rows, indent=2) + "\n")
    (arguments.out / "ceiling.md").write_text(table(rows))
    print(table(rows))
    return 0 if len(rows) == len(jobs) else 1


if __name__ == "__main__":
    raise SystemExit(main())

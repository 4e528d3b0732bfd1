"""Runs of the benchmark ``methods.py``: each job is a process that writes images and measurements to files."""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import methods_glb
import torch
from methods_counter import Counter
from methods_references import (
    DDIM_SCALE,
    DDIM_STEPS,
    NUM_VIEWS,
    REAL_2D,
    REAL_3D,
    REFERENCES,
    ddim,
    held_back,
    real,
    source_prompt,
)
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
DIMENSIONS = ("2d", "3d")
NOT_A_METHOD = ("compare",)
QUICK = (
    "preview.every_n_steps=0",
    "checkpoint.every_n_steps=0",
    "log.tensorboard=false",
    "log.every_n_steps=100",
)


@dataclass(frozen=True)
class Task:
    """One run; ``seed`` is the number of particles in 2D and the seed of the run in 3D."""

    prompt: str
    seed: int

    @property
    def name(self) -> str:
        """Stem of the run's files."""
        return f"{self.prompt.replace(' ', '-')}-{self.seed}"


@dataclass(frozen=True)
class Job:
    """Tasks of one method that one process runs."""

    dimension: str
    method: str
    tasks: tuple[Task, ...]

    def to_text(self) -> str:
        """The job as one command-line argument."""
        return json.dumps(asdict(self))

    @classmethod
    def from_text(cls, text: str) -> Job:
        """Job from the output of :meth:`to_text`."""
        values = json.loads(text)
        return cls(values["dimension"], values["method"], tuple(Task(**task) for task in values["tasks"]))


def recipes(dimension: str, only: Sequence[str]) -> list[str]:
    """Names of the recipes of a dimension: all of them, or those in ``only``.

    Raises:
        ValueError: ``only`` contains a name without a recipe in either dimension.
    """
    known = {
        d: sorted(p.stem for p in (ROOT / "configs" / f"text-to-{d}").glob("*.yaml") if p.stem not in NOT_A_METHOD)
        for d in DIMENSIONS
    }
    unknown = [name for name in only if not any(name in names for names in known.values())]
    if unknown:
        raise ValueError(f"no recipe is called {unknown[0]!r}; recipes are {', '.join(known['2d'])}")
    return [name for name in known[dimension] if not only or name in only]


def configured(dimension: str, method: str, prompt: str, overrides: Sequence[str]) -> Any:
    """Typed config of one run."""
    from scoredist3d.config.validation import load_experiment

    file = ROOT / "configs" / f"text-to-{dimension}" / f"{method}.yaml"
    return load_experiment([file], [f"prompt={prompt}", *QUICK, *overrides])


def edits(dimension: str, method: str) -> bool:
    """Whether a recipe's guidance edits a source."""
    from scoredist3d import registry
    from scoredist3d.config.loader import load

    block = load([ROOT / "configs" / f"text-to-{dimension}" / f"{method}.yaml"])["system"]["guidance"]
    needs_source: bool = registry.lookup("guidance", block["type"]).cls.needs_source  # type: ignore[attr-defined]
    return needs_source


def fingerprint(dimension: str, method: str, overrides: Sequence[str]) -> str:
    """Hash of a recipe with everything it includes, for detecting changed recipes."""
    from scoredist3d.config.loader import load

    if method in REFERENCES:
        return f"{REAL_2D}, {REAL_3D}, {DDIM_STEPS}, {DDIM_SCALE}"
    file = ROOT / "configs" / f"text-to-{dimension}" / f"{method}.yaml"
    text = json.dumps(load([file], ["prompt=x", *overrides]), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def folder_of(out: Path, dimension: str, method: str) -> Path:
    """Folder of a method's results."""
    return out / dimension / method.replace(" ", "-")


def is_done(out: Path, dimension: str, method: str, task: Task, recipe: str) -> bool:
    """Whether results of this run with the same recipe exist; those of a method in 3D include the GLB."""
    path = folder_of(out, dimension, method) / f"{task.name}.json"
    if not path.is_file():
        return False
    found = json.loads(path.read_text())
    return found["recipe"] == recipe and ("glb" in found or dimension == "2d" or method in REFERENCES)


def work(job: Job, out: Path, gpu: str, overrides: list[str]) -> int:
    """Run every task of a job; a failure is reported and the next task runs. Returns the exit code."""
    from scoredist3d.custom import custom_folders, load_custom

    load_custom(custom_folders(builds=True))
    recipe, failed = fingerprint(job.dimension, job.method, overrides), 0
    for task in job.tasks:
        try:
            made = make(job, task, out, gpu, overrides)
            figures = {"recipe": recipe, "device": device_name(gpu), **made.figures}
            save(folder_of(out, job.dimension, job.method), task, made.images, figures, made.strip)
        # Any method may fail in any way, and the results of the others are still needed.
        except Exception:
            traceback.print_exc()
            print(f"FAILED: {job.dimension} {job.method} {task.prompt!r}", flush=True)
            failed += 1
    return 1 if failed else 0


def save(folder: Path, task: Task, images: Tensor, figures: dict[str, Any], strip: Tensor | None = None) -> None:
    """Write ``<task>.pt`` (8-bit images), the strip of the GLB if there is one, and at last ``<task>.json``.

    The presence of the .json file marks the task as finished.
    """
    from scoredist3d.export.images import image_grid, save_png

    folder.mkdir(parents=True, exist_ok=True)
    torch.save((images.clamp(0, 1) * 255).round().to(torch.uint8).cpu(), folder / f"{task.name}.pt")
    results = folder / f"{task.name}.json"
    methods_glb.strip_path(results).unlink(missing_ok=True)
    if strip is not None:
        save_png(image_grid(strip, len(strip), gap=0), methods_glb.strip_path(results))
    results.write_text(json.dumps({"prompt": task.prompt, "seed": task.seed, **figures}, indent=2) + "\n")


class Made(NamedTuple):
    """Results of one task.

    Attributes:
        images: (assets, views, H, W, 3).
        figures: Measurements by name; those of the GLB of a 3D run are under the key ``glb``.
        strip: (4, H, W, 3), views of that GLB; None if there is none.
    """

    images: Tensor
    figures: dict[str, Any]
    strip: Tensor | None = None


def make(job: Job, task: Task, out: Path, gpu: str, overrides: list[str]) -> Made:
    """Run one task."""
    if job.method == "real renders":
        return Made(real(job.dimension, task.prompt, task.seed), {})
    if job.method == "DDIM samples":
        return Made(ddim(job.dimension, task.prompt, task.seed, device_of(gpu)), {})
    options = [*overrides, f"seed={0 if job.dimension == '2d' else task.seed}"]
    if job.dimension == "2d":
        options.append(f"system.geometry.particles={task.seed}")
    if edits(job.dimension, job.method):
        options += editing_overrides(job.dimension, task, out / "sources", gpu, overrides)
    config = configured(job.dimension, job.method, task.prompt, options)
    run = folder_of(out, job.dimension, job.method) / "runs" / task.name
    system, figures = train(config, run, gpu)
    images = pictures_of(system, job.dimension)
    shutil.rmtree(run / "ckpts")  # large, and not needed after rendering
    if job.dimension == "2d":
        return Made(images, figures)
    glb = methods_glb.deliver(system, config, run, device_of(gpu))
    return Made(images, {**figures, "glb": glb.figures}, glb.strip)


def editing_overrides(dimension: str, task: Task, out: Path, gpu: str, overrides: list[str]) -> list[str]:
    """Overrides that give an editing method its source; in 3D the source is trained here with SDS."""
    source = source_prompt(task.prompt)
    described = f"system.guidance.source_prompt={source}"
    if dimension == "2d":
        return [described, f"system.geometry.init_prompt={source}"]
    folder = out / f"{Task(source, task.seed).name}-{time.time_ns()}"
    train(configured("3d", "sds", source, [*overrides, f"seed={task.seed}"]), folder, gpu)
    return [described, f"system.init_from={folder}"]


def device_of(gpu: str) -> torch.device:
    """Device ``cpu``, or the GPU with that number."""
    return torch.device("cpu" if gpu == "cpu" else f"cuda:{gpu}")


def train(config: Any, folder: Path, gpu: str) -> tuple[Any, dict[str, Any]]:
    """Train without video and without export; returns the system and the measurements."""
    from scoredist3d.config.validation import to_yaml
    from scoredist3d.files import write_atomically
    from scoredist3d.training.console import Console
    from scoredist3d.training.distributed import Devices
    from scoredist3d.training.fit import RankContext, begin, build_system, fit, import_lightning
    from scoredist3d.training.folder import RunFolder
    from scoredist3d.training.interrupt import InterruptGuard

    import_lightning()
    run, console = RunFolder(folder), Console()
    write_atomically(run.resolved_config, to_yaml(config))
    place = RankContext(Devices.parse("cpu" if gpu == "cpu" else [int(gpu)]))
    system = build_system(config, place)
    begin(system, config, place, resumed=False)
    start_memory(device_of(gpu))
    with InterruptGuard(console.say) as guard, Counter(system).counting() as counter:
        began = time.perf_counter()
        steps = fit(system, config, run, place, console, guard)
        synchronize(device_of(gpu))
        seconds = time.perf_counter() - began
    if guard.requested:
        raise KeyboardInterrupt
    system.to_device(device_of(gpu))
    return system, {
        "seconds": seconds,
        "steps": steps,
        "memory_mib": peak_memory(device_of(gpu)),
        **counter.per_image(),
    }


@torch.no_grad()
def pictures_of(system: Any, dimension: str) -> Tensor:
    """Images (assets, views, H, W, 3): the particles in 2D, the held-out views of every scene in 3D."""
    if dimension == "2d":
        images: Tensor = system.canvas.images(system.prior)
        return images[:, None]
    cameras = held_back().to(system.device)
    return torch.stack(
        [
            torch.cat([scene(cameras[view], step=scene.step, rng=None).rgb for view in range(NUM_VIEWS)])
            for scene in system.scenes
        ]
    )


def untimed(out: Path, only: Sequence[str], overrides: Sequence[str]) -> list[str]:
    """2D recipes that have not been timed in their present form."""
    path = out / "timing.json"
    known = json.loads(path.read_text()) if path.is_file() else {}
    return [
        name for name in recipes("2d", only) if known.get(name, {}).get("recipe") != fingerprint("2d", name, overrides)
    ]


def time_methods(methods: list[str], steps: int, particles: int, out: Path, gpu: str, overrides: list[str]) -> int:
    """Time single steps spread over the schedule, with nothing else running, and write them to ``timing.json``."""
    from scoredist3d.custom import custom_folders, load_custom

    load_custom(custom_folders(builds=True))
    path, failed = out / "timing.json", 0
    known = json.loads(path.read_text()) if path.is_file() else {}
    for method in methods:
        try:
            figures = time_method(method, steps, particles, gpu, overrides)
            recipe = fingerprint("2d", method, overrides)
            known[method] = {"recipe": recipe, "device": device_name(gpu), **figures}
        # As in work(): a failure of one method must not hide the others.
        except Exception:
            traceback.print_exc()
            print(f"FAILED: timing of {method}", flush=True)
            failed += 1
    path.write_text(json.dumps(known, indent=2) + "\n")
    return 1 if failed else 0


def time_method(method: str, steps: int, particles: int, gpu: str, overrides: list[str]) -> dict[str, float]:
    """Mean milliseconds of a 2D step, including the optimizer, and peak memory."""
    options = [*overrides, f"system.geometry.particles={particles}"]
    if edits("2d", method):
        options += editing_overrides("2d", Task("a red mug", 0), Path(), gpu, overrides)
    config = configured("2d", method, "a red mug", options)
    last = config.trainer.max_steps
    warm_up = [0, last // 2, last - 1]
    seconds, memory = time_steps(config, warm_up, [round((index + 0.5) * last / steps) for index in range(steps)], gpu)
    return {"ms_per_step": 1000 * seconds, "steps": last, "memory_mib": memory}


def time_steps(config: Any, warm_up: Sequence[int], timed: Sequence[int], gpu: str) -> tuple[float, float]:
    """Mean seconds of single steps of a new system, including the optimizer, and peak memory in MiB."""
    from scoredist3d.seeding import Rng
    from scoredist3d.training.distributed import Devices
    from scoredist3d.training.fit import RankContext, build_system
    from scoredist3d.training.optimizer import build_optimizer, set_learning_rates

    system = build_system(config, RankContext(Devices.parse("cpu" if gpu == "cpu" else [int(gpu)])))
    device = device_of(gpu)
    system.to_device(device)
    start_memory(device)
    optimizer = build_optimizer(system.config.optimizer, system.parameter_groups())
    began = 0.0
    for index, step in enumerate([*warm_up, *timed]):
        if index == len(warm_up):
            synchronize(device)
            began = time.perf_counter()
        set_learning_rates(optimizer, system.config.optimizer, step)
        system.prepare_step(step, Rng())
        optimizer.zero_grad()
        system.training_step(step, Rng()).loss.backward()
        optimizer.step()
    synchronize(device)
    return (time.perf_counter() - began) / len(timed), peak_memory(device)


def device_name(gpu: str) -> str:
    """Name of the device, and the version of torch."""
    name = torch.cuda.get_device_name(int(gpu)) if gpu != "cpu" else platform.processor() or platform.machine()
    return f"{name}, torch {torch.__version__}"


def synchronize(device: torch.device) -> None:
    """Wait for pending work of a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def start_memory(device: torch.device) -> None:
    """Reset the peak memory of a GPU; the peak of a process cannot be reset."""
    if device.type == "cuda":
        torch.cuda.init()
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> float:
    """Peak memory in MiB: allocated on the GPU, or resident in the process."""
    from scoredist3d.training.console import peak_memory_gib

    return torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else 1024 * peak_memory_gib()

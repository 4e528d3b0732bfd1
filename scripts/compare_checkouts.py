"""Run the same training in two checkouts on one machine and compare all trained tensors.

    python scripts/compare_checkouts.py /path/to/old /path/to/new --work /tmp/compare

A refactoring must not change what the program computes. The cases are recipes of the old checkout: every method in 2D
and 3D, and every small representation with its renderer, 20 steps each on the CPU with one thread. The old checkout
writes the resolved configurations and both checkouts read them, which also tests that the new one still accepts the old
keys and names. Editing methods start from the scene of the case ``text-to-3d/sds``.

Tensors are matched by their names in the checkpoint; a tensor that only one checkout has counts as a difference. The
exit code is 1 if a case fails or if a tensor differs by more than ``--tolerance``, relative to its largest absolute
value. Finished cases are kept in ``--work``, so an interrupted command can be repeated.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

SHORT = [
    "prompt=a red mug",
    "seed=3",
    "preview.every_n_steps=0",
    "checkpoint.every_n_steps=0",
    "log.tensorboard=false",
    "test.frames=1",
    "exporter.resolution=16",
    "exporter.texture_size=64",
    "exporter.max_faces=100",
]
SOURCE = "text-to-3d/sds"


def main() -> int:
    """Run the missing cases in both checkouts and compare them; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path, help="reference checkout, which provides the recipes")
    parser.add_argument("new", type=Path, help="checkout to compare with the reference")
    parser.add_argument("--work", type=Path, required=True, help="folder for configurations, runs and logs")
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps of each case")
    parser.add_argument("--only", default="", metavar="REGEX", help="run only the cases whose names match")
    parser.add_argument("--tolerance", type=float, default=1e-6, help="largest acceptable relative difference")
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, help="number of parallel cases, one thread each"
    )
    options = parser.parse_args()
    old, new = options.old.resolve(), options.new.resolve()
    names = [name for name in case_names(old) if re.search(options.only, name)]
    if not names:
        parser.error(f"--only: no case matches {options.only!r}; the names are those of the files in configs/")
    work = options.work.resolve()
    first = [name for name in names if name == SOURCE] or [SOURCE]
    for group in (first, [name for name in names if name not in first]):
        with ThreadPoolExecutor(options.jobs) as pool:
            for future in [pool.submit(run_both, name, old, new, work, options.steps) for name in group]:
                future.result()
    results = {name: differences(work, name) for name in names}
    (work / "differences.json").write_text(json.dumps(results, indent=2), encoding="utf-8")
    return report(results, options.tolerance)


def case_names(checkout: Path) -> list[str]:
    """Names of the recipes that run without downloads, e.g. ``text-to-2d/sds`` or ``representation/dmtet-small``."""
    configs = checkout / "configs"
    recipes = [path for kind in ("text-to-2d", "text-to-3d") for path in sorted((configs / kind).glob("*.yaml"))]
    recipes += sorted((configs / "representation").glob("*-small.yaml"))
    found = [path.relative_to(configs).with_suffix("").as_posix() for path in recipes]
    return [name for name in found if name not in ("text-to-2d/compare", "representation/textured-mesh-small")]


def run_both(name: str, old: Path, new: Path, work: Path, steps: int) -> None:
    """Write the configuration of a case and train it in both checkouts; existing results are kept."""
    config = work / "configs" / f"{name}.yaml"
    if not config.is_file():
        arguments = [*recipe_of(name, old), "--train", "--dry-run", *SHORT, f"trainer.max_steps={steps}"]
        resolved = launch(old, arguments, work / "logs" / "configs" / f"{name}.txt")
        config.parent.mkdir(parents=True, exist_ok=True)
        config.write_text(resolved, encoding="utf-8")
    for checkout, label in ((old, "old"), (new, "new")):
        folder = work / label / name
        if next(folder.rglob("last.ckpt"), None) is not None:
            continue
        arguments = ["--config", str(config), "--train", "--gpu", "cpu", f"output_root={folder}"]
        # Earlier checkouts have the key start_from, which later ones accept as an alias of init_from.
        source = re.search(r"\b(init_from|start_from): outputs/source", config.read_text(encoding="utf-8"))
        if source is not None:
            arguments.append(f"system.{source[1]}={next((work / label / SOURCE).rglob('last.ckpt'))}")
        print(f"{label}: {name}", flush=True)
        launch(checkout, arguments, work / "logs" / label / f"{name}.txt")


def recipe_of(name: str, checkout: Path) -> list[str]:
    """Command-line arguments with the configuration of a case; representations are added to the recipe ``fast``."""
    files = [f"configs/{name}.yaml"]
    # In earlier checkouts, the recipe has the name quickstart.
    base = next(file for file in ("configs/fast.yaml", "configs/quickstart.yaml") if (checkout / file).is_file())
    return ["--config", *([base, *files] if name.startswith("representation/") else files)]


def launch(checkout: Path, arguments: list[str], log: Path) -> str:
    """Run the program of a checkout and return its standard output.

    All output goes to ``log``. A failed training is detected later by its missing checkpoint.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": str(checkout)}
    command = [sys.executable, "launch.py", *arguments]
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, check=False)
    log.write_text(f"{done.stdout}\n{done.stderr}", encoding="utf-8")
    return done.stdout


def differences(work: Path, name: str) -> dict[str, Any]:
    """Largest relative difference of a case, its tensor, and the tensors that only one checkout has."""
    found = [next((work / label / name).rglob("last.ckpt"), None) for label in ("old", "new")]
    if None in found:
        missing = " and ".join(label for label, path in zip(("old", "new"), found, strict=True) if path is None)
        return {"failed": f"no checkpoint from {missing}; see {work / 'logs'}"}
    states = [dict(tensors(path)) for path in found if path is not None]
    lacking = sorted(states[0].keys() ^ states[1].keys())
    worst, where = 0.0, ""
    for key in sorted(states[0].keys() & states[1].keys()):
        difference = relative_difference(states[0][key], states[1][key])
        if difference > worst or not where:
            worst, where = difference, key
    return {"difference": worst, "tensor": where, "tensors": len(states[0]), "only in one": lacking}


def tensors(checkpoint: Path) -> Iterator[tuple[str, Any]]:
    """Names and values of all tensors in the ``state_dict`` of a checkpoint, including nested states."""
    import torch

    def walk(path: str, value: Any) -> Iterator[tuple[str, Any]]:
        if isinstance(value, torch.Tensor):
            yield path, value
        elif isinstance(value, dict):
            for key, item in value.items():
                yield from walk(f"{path}.{key}", item)
        elif isinstance(value, (list, tuple)):
            for index, item in enumerate(value):
                yield from walk(f"{path}.{index}", item)

    for key, value in torch.load(checkpoint, map_location="cpu", weights_only=True)["state_dict"].items():
        yield from walk(key, value)


def relative_difference(first: Any, second: Any) -> float:
    """Largest absolute difference, relative to the largest absolute value; infinite if the shapes differ."""
    if first.shape != second.shape:
        return float("inf")
    if first.numel() == 0:
        return 0.0
    first, second = first.double(), second.double()
    scale = first.abs().max().item()
    return float((first - second).abs().max().item() / (scale or 1.0))


def report(results: dict[str, dict[str, Any]], tolerance: float) -> int:
    """Print one line per case; returns the exit code."""
    bad = 0
    for name, result in results.items():
        failed = "failed" in result or result["difference"] > tolerance or bool(result["only in one"])
        bad += failed
        text = result.get("failed") or (
            f"{result['difference']:.1e} at {result['tensor']} of {result['tensors']} tensors"
            + (f"; only in one: {', '.join(result['only in one'][:4])}" if result["only in one"] else "")
        )
        print(f"{'DIFFERS' if failed else 'equal  '}  {name:<40} {text}")
    print(f"{len(results) - bad} of {len(results)} cases agree to {tolerance:g}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())

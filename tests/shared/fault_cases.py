"""Small trainings with all kinds of products, in which tests cause faults, and the comparison with undisturbed ones."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from scoredist3d import cli
from shared.fault_client import CommandOutcome, FaultServer
from shared.fault_server import KILLED
from shared.figures import counted
from shared.run_products import UndisturbedRun
from shared.surface_scenes import write_cube
from shared.tiny_runs import plain

NOTHING_SAVED = r"^error: .* (has no checkpoint yet .*; train the run first|is not a run folder: .*; give a folder .*)$"
"""Answer to ``--resume`` of a run that was stopped before its first checkpoint."""
_HASH_GRID = {"grid": {"num_levels": 2, "log2_hashmap_size": 6}, "network": {"hidden_width": 8}}
_DENSIFY = {"start": 1, "every": 1, "grad_threshold": 0.0, "densify_fraction": 0.2, "opacity_reset_every": 5}
_ON_SURFACE = {"renderer": {"type": "mesh-rasterizer"}, "loss": {}}
_SYSTEMS: dict[str, dict[str, Any]] = {
    "implicit-volume": {},
    "implicit-sdf": {
        "geometry": {"type": "implicit-sdf", "shape_init_resolution": 8, **_HASH_GRID},
        "renderer": {"num_samples": 8, "occupancy": {"resolution": 8, "every": 2}},
        "loss": {"eikonal": 0.1},
    },
    "dmtet": {"geometry": {"type": "dmtet", "resolution": 8, **_HASH_GRID}, **_ON_SURFACE},
    "flexicubes": {"geometry": {"type": "flexicubes", "resolution": 8, **_HASH_GRID}, **_ON_SURFACE},
    "textured-mesh": {"geometry": {"type": "textured-mesh", "mesh": "", "texture_size": 16}, **_ON_SURFACE},
    "gaussians": {
        "geometry": {"type": "gaussians", "num_points": 40, "densify": _DENSIFY},
        "material": {"type": "spherical-harmonics", "degree": 2, "degree_every": 3},
        "renderer": {"type": "gaussian-splatting"},
        "loss": {},
    },
    "vsd": {"guidance": {"type": "vsd", "guidance_scale": 7.5, "phi": {"network": "unet", "channels": [4, 8]}}},
}
REPRESENTATIONS = ("implicit-volume", "implicit-sdf", "dmtet", "flexicubes", "textured-mesh", "gaussians")


def _config(name: str, folder: Path) -> dict[str, Any]:
    """The config of a case: checkpoints, previews and rows of metrics at different steps."""
    steps = 5 if name == "images" else 3
    changes: dict[str, Any] = {
        "trainer": {"max_steps": steps},
        "checkpoint": {"every_n_steps": 2 if name == "images" else 1, "keep": 2},
        "preview": {"every_n_steps": 2, "size": 8},
        "log": {"every_n_steps": 3 if name == "images" else 2, "tensorboard": False},
        "name": "run",
    }
    if name == "images":
        return plain(folder, "text-to-2d", **changes)
    config = plain(folder, **changes)
    if name == "pipeline":
        return config | {"stages": {"coarse": {}, "refine": {"trainer": {"max_steps": 2}}}}
    config["system"] |= _SYSTEMS.get(name, {})
    if name == "textured-mesh":
        config["system"]["geometry"] = config["system"]["geometry"] | {"mesh": str(write_cube(folder))}
    return config


@dataclass
class FaultCase:
    """A training that is disturbed again and again, each time in a folder of its own.

    Attributes:
        name: ``images``, ``pipeline``, ``extended`` (a finished run that is continued), ``vsd`` or a representation.
        server: Runs the commands.
        folder: Folder for all files.
        devices: The option ``--gpu``.
        operations: Descriptions of the file operations of the disturbed command, in an undisturbed run.
    """

    name: str
    server: FaultServer
    folder: Path
    devices: str = "cpu"
    operations: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True)
        self.file, self.result = self.folder / "config.yaml", self.folder / "result"
        self.file.write_text(yaml.safe_dump(_config(self.name, self.folder)))
        self.start = self._trained(self.folder / "start") if self.name == "extended" else None
        kept = self.folder / "whole"
        sessions = []
        self.prepared(kept)
        if self.start is not None:
            first = self._trained(kept, "checkpoint.keep=100")
            sessions.append(Path(shutil.copytree(first, self.folder / "first")))
        assert self.command(kept, "checkpoint.keep=100").code == cli.OK
        self.whole = UndisturbedRun(*sessions, self.run_in(kept))
        outcome = self.command(self.prepared(self.folder / "count"), fault="count", result=str(self.result))
        assert outcome.code == cli.OK, outcome.text
        found = json.loads(self.result.read_text())
        self.operations = found["operations"]
        self.server.prepare(found["modules"])
        undisturbed = self.whole.differences(self.run_in(self.folder / "count"))
        assert undisturbed == [], "two undisturbed runs differ"

    def command(self, out: Path, *overrides: str, **fault: Any) -> CommandOutcome:
        """Run the disturbed command with its files in ``out``."""
        if self.start is None:
            return self._train(out, *overrides, **fault)
        return self.resume(out, *overrides, **fault)

    def resume(self, out: Path, *overrides: str, **fault: Any) -> CommandOutcome:
        """Continue the run in ``out``."""
        longer = ["trainer.max_steps=5"] if self.name == "extended" else []
        arguments = ["--train", "--resume", str(self.run_in(out)), "--gpu", self.devices, *longer, *overrides]
        return self.server.run(arguments, self.folder / "output.txt", **{"root": str(out), **fault})

    def run_in(self, out: Path) -> Path:
        """The newest run in ``out``."""
        return max(out.glob("run/*"), key=lambda path: (path.name.partition("@")[2], path.name))

    def kill_at(self, number: int) -> list[str]:
        """Kill the command ahead of an operation and resume; returns what was lost."""
        out = self.prepared(self.folder / "killed")
        outcome = self.command(out, fault="kill", at=number)
        assert outcome.code == KILLED, outcome.text
        problems = self.recover(out)
        counted("kill points", problems)
        return self._named(problems, f"{number}, {self.operations[number - 1]}")

    def recover(self, out: Path) -> list[str]:
        """Check the products that a fault has left in ``out``, and resume; returns the problems."""
        if not list(out.glob("run/*")):
            return self._again(out)
        run = self.run_in(out)
        problems = self.whole.problems(run)
        saved = any(self.whole.newest_steps(run).values())
        outcome = self.resume(out)
        if outcome.code == cli.USAGE_ERROR and not saved and re.search(NOTHING_SAVED, outcome.text, re.MULTILINE):
            shutil.rmtree(out / "run")
            return problems + self._again(out)
        if outcome.code != cli.OK:
            return [*problems, f"resuming failed: {outcome.text}"]
        return problems + self.whole.differences(run)

    def _again(self, out: Path) -> list[str]:
        outcome = self._train(out)
        return self.whole.differences(self.run_in(out)) if outcome.code == cli.OK else [f"failed: {outcome.text}"]

    def _train(self, out: Path, *overrides: str, **fault: Any) -> CommandOutcome:
        arguments = ["--config", str(self.file), "--train", "--gpu", self.devices, f"output_root={out}", *overrides]
        return self.server.run(arguments, self.folder / "output.txt", **{"root": str(out), **fault})

    def _trained(self, out: Path, *overrides: str) -> Path:
        out.mkdir(exist_ok=True)
        outcome = self._train(out, *overrides)
        assert outcome.code == cli.OK, outcome.text
        return self.run_in(out)

    def prepared(self, out: Path) -> Path:
        """An output folder as it is ahead of the disturbed command."""
        shutil.rmtree(out, ignore_errors=True)
        if self.start is not None and out.name != "whole":
            shutil.copytree(self.folder / "start", out)
        else:
            out.mkdir()
        return out

    @staticmethod
    def _named(problems: Iterable[str], where: str) -> list[str]:
        return [f"{where}: {problem}" for problem in problems]


def spread(count: int, number: int) -> list[int]:
    """``number`` evenly spread integers from 1 to ``count``, both included."""
    if number >= count:
        return list(range(1, count + 1))
    return sorted({1 + index * (count - 1) // (number - 1) for index in range(number)})

"""The products of a run folder: whole or absent after a fault, and equal to those of an undisturbed run at the end."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import torch
import yaml
from PIL import Image

from scoredist3d.training.checkpoint import checkpoint_step, read_checkpoint
from scoredist3d.training.folder import PIPELINE_CONFIG, RunFolder, step_of
from scoredist3d.training.lock import LOCK
from scoredist3d.training.metrics import read_rows

_SETS = ("videos", "export")
"""Folders whose files are replaced as one set."""
_PREVIOUS = "previous-"


def difference(first: Any, second: Any, path: str = "") -> str:
    """The place of the first difference of two states, in structure, types or bits; empty if there is none."""
    if type(first) is not type(second):
        return path or "type"
    if isinstance(first, torch.Tensor):
        return "" if torch.equal(first, second) else path
    if isinstance(first, dict):
        if first.keys() != second.keys():
            return f"keys of {path}"
        pairs = [(first[key], second[key], f"{path}/{key}") for key in first]
    elif isinstance(first, (list, tuple)):
        if len(first) != len(second):
            return f"length of {path}"
        pairs = [(a, b, f"{path}/{index}") for index, (a, b) in enumerate(zip(first, second, strict=True))]
    else:
        return "" if first == second else path
    return next((found for a, b, place in pairs if (found := difference(a, b, place))), "")


class UndisturbedRun:
    """Products of a run without faults, or of several sessions of a run: what faults must not change.

    ``sessions`` are copies of the run folder after each session; the run has kept all of its checkpoints.
    """

    def __init__(self, *sessions: Path) -> None:
        self.sessions = sessions
        self.final = sessions[-1]
        self.states: dict[tuple[str, int], dict[str, Any]] = {}
        is_pipeline = (self.final / PIPELINE_CONFIG).is_file()
        self.stages = [path.parent.name for path in self.final.glob("*/configs")] if is_pipeline else ["."]
        for session in sessions:
            for stage, run in self._runs(session).items():
                for path in (run / "ckpts").glob("step-*.ckpt"):
                    self.states[stage, step_of(path)] = read_checkpoint(path)
        self._known: set[tuple[str, str]] = set()

    def problems(self, folder: Path) -> list[str]:
        """What is neither whole and correct nor absent in a run folder after a fault."""
        found: list[str] = []
        paths = [(name, run, path) for name, run in self._runs(folder).items() for path in sorted(_visible(run))]
        if self.stages != ["."]:
            paths += [(".", folder, path) for path in folder.iterdir() if path.is_file() and path.name[0] != "."]
        for stage, run, path in paths:
            try:
                problem = self._problem(stage, run, path)
            except Exception as error:  # A damaged file fails in many ways.
                problem = f"{type(error).__name__}: {error}"
            if problem:
                found.append(f"{path.relative_to(folder)}: {problem}")
        for stage, run in self._runs(folder).items():
            found += [
                f"{stage}/{name}: {problem}" for name in _SETS if (problem := self._set_problem(stage, run, name))
            ]
        return found

    def differences(self, folder: Path) -> list[str]:
        """What differs from the undisturbed run in a run folder that is complete."""
        found = self.problems(folder)
        # Nobody holds or removes the lock of a stage that was done when its process was killed.
        hidden = [path for path in folder.rglob("*") if path.name.startswith(".")]
        left = [path for path in hidden if path.name != LOCK or path.parent == folder]
        found += [f"{path.relative_to(folder)} remains" for path in left]
        for summary in [folder / "summary.json", *(run / "summary.json" for run in self._runs(folder).values())]:
            if json.loads(summary.read_text())["status"] != "done":
                found.append(f"{summary.relative_to(folder)}: not done")
        for stage, run in self._runs(self.final).items():
            for path in _visible(run):
                relative = path.relative_to(run)
                if relative.parts[:2] == ("configs", "history") or relative.suffix == ".ckpt":
                    continue
                if not (folder / stage / relative).is_file():
                    found.append(f"{stage}/{relative} is missing")
            last = max(step for name, step in self.states if name == stage)
            state = read_checkpoint(folder / stage / "ckpts" / "last.ckpt")
            place = difference(self.states[stage, last], state)
            found += [f"{stage}/last.ckpt: {place} differs"] if place else []
            metrics = [path / stage / "metrics.csv" for path in (self.final, folder)]
            if metrics[0].read_bytes() != metrics[1].read_bytes():
                found.append(f"{stage}/metrics.csv differs")
        return found

    def newest_steps(self, folder: Path) -> dict[str, int]:
        """Step of the checkpoint from which each run would resume; 0 if there is none."""
        newest = {stage: RunFolder(run).newest_checkpoint for stage, run in self._runs(folder).items()}
        return {stage: 0 if path is None else checkpoint_step(path) for stage, path in newest.items()}

    def _runs(self, folder: Path) -> dict[str, Path]:
        """The run itself, named ``.``, or the stages of a pipeline that have a folder, by name."""
        return {stage: folder / stage for stage in self.stages if (folder / stage).is_dir()}

    def _problem(self, stage: str, run: Path, path: Path) -> str:
        """What is wrong with one file; empty if nothing is. Damaged files raise various errors."""
        content, relative = path.read_bytes(), path.relative_to(run)
        key = (f"{stage}/{relative}", hashlib.sha256(content).hexdigest())
        if key in self._known:
            return ""
        problem = self._problem_of(stage, run, relative, content)
        if not problem and path.suffix != ".json":  # What JSON files name may be missing next time.
            self._known.add(key)
        return problem

    def _problem_of(self, stage: str, run: Path, relative: Path, content: bytes) -> str:
        if relative.suffix == ".ckpt":
            state = read_checkpoint(run / relative)
            place = difference(self.states[stage, state["global_step"]], state)
            return f"{place} differs" if place else ""
        if relative.name == "metrics.csv":
            return self._metrics_problem(stage, run / relative)
        if relative.suffix == ".yaml":
            return "" if isinstance(yaml.safe_load(content), dict) else "empty"
        if relative.suffix == ".json":
            return _json_problem(run, run / relative, json.loads(content))
        if relative.suffix == ".png":
            with Image.open(io.BytesIO(content)) as image:
                image.load()
        if relative.parts[0] == "images" and content not in self._contents(stage, relative):
            return "differs"
        return "" if content or relative.name == "changes.diff" else "empty"

    def _metrics_problem(self, stage: str, path: Path) -> str:
        (_, rows), (_, expected) = read_rows(path), read_rows(self.final / stage / "metrics.csv")
        for row, other in zip(rows, expected, strict=False):
            if any(other[name] != value for name, value in row.items()):
                return f"row of step {row['step']} differs"
        return "too many rows" if len(rows) > len(expected) else ""

    def _contents(self, stage: str, relative: Path) -> list[bytes]:
        paths = [session / stage / relative for session in self.sessions]
        return [path.read_bytes() for path in paths if path.is_file()]

    def _set_problem(self, stage: str, run: Path, name: str) -> str:
        """What is wrong with the files of a set and with its earlier versions."""
        wanted = [found for session in self.sessions if (found := _set_of(session / stage / name))]
        folders = [run / name, *(run / name).glob(f"{_PREVIOUS}*")]
        for folder in folders:
            found = _set_of(folder)
            if found and found not in wanted:
                return f"the files {', '.join(sorted(found))} of {folder.name} are not one set"
        return ""


def _set_of(folder: Path) -> dict[str, bytes]:
    """Contents of the files of a set by name; of reports, which contain times, only the presence."""
    files = [path for path in folder.glob("*") if path.is_file() and not path.name.startswith(".")]
    return {path.name: b"" if path.name.startswith("report") else path.read_bytes() for path in files}


def _visible(run: Path) -> list[Path]:
    paths = [path for path in run.rglob("*") if path.is_file()]
    return [path for path in paths if not any(part.startswith(".") for part in path.relative_to(run).parts)]


def _json_problem(run: Path, path: Path, content: dict[str, Any]) -> str:
    if path.name.startswith("report"):
        sizes = {name: (path.parent / name).stat().st_size for name in content["bytes"]}
        return "" if sizes == content["bytes"] else "the sizes differ"
    if path.name == "summary.json" and content["status"] == "done":
        missing = [name for name in content["paths"].values() if not (run / name).exists()]
        return f"{', '.join(missing)} missing" if missing else ""
    return ""

"""Messages about a run: its settings, printed before it starts, and how to continue it after an interrupt."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from scoredist3d.config.experiment import ExperimentConfig
from scoredist3d.config.fields import ConfigError
from scoredist3d.config.resume import changed_schedules, changed_settings
from scoredist3d.config.validation import load_experiment
from scoredist3d.paths import command_name
from scoredist3d.training.console import Console
from scoredist3d.training.distributed import Devices
from scoredist3d.training.folder import RunFolder, kept_checkpoints, step_of


def announce(
    config: ExperimentConfig, devices: Devices, folder: RunFolder, resume: Path | None, done: int, console: Console
) -> None:
    """Print the prompt, method, steps and folder of a run, and the changed settings of a resumed run."""
    system = config.system
    parts = [getattr(system, name, None) for name in ("geometry", "material", "background", "renderer")]
    source = getattr(config.prior, "pretrained_model_name_or_path", None)
    lines = {
        "prompt": f'"{config.prompt}"' + (f', not "{config.negative_prompt}"' if config.negative_prompt else ""),
        "prior": config.prior.type + (f" ({source})" if source else ""),
        "guidance": _methods(system),
        "representation": f"{system.type}: {', '.join(part.type for part in parts if part is not None)}",
        "steps": f"{config.trainer.max_steps}, seed {config.seed}, precision {config.trainer.precision}",
        "device": devices.describe(),
        "output": f"{folder.root}",
    }
    if resume is not None:
        lines["resume"] = f"{resume}, step {done}"
    for name, text in lines.items():
        console.say(f"{name:<16} {text}")
    if resume is not None:
        for line in changed_settings(folder.resolved_config, config):
            console.say(f"{'changed':<16} {line}")
        for line in _schedule_lines(config, folder, done):
            console.say(line)


def _schedule_lines(config: ExperimentConfig, folder: RunFolder, done: int) -> list[str]:
    """Messages about schedules that a resumed run does not stretch or that change abruptly at step ``done``."""
    steps, kept = config.trainer.max_steps, config.trainer.schedule_steps
    lines = []
    if kept not in (None, steps):
        lines.append(
            f"Schedules that depend on trainer.max_steps still end at step {kept}; set "
            f"trainer.schedule_steps={steps} to stretch them to the new length."
        )
    try:
        before = load_experiment([folder.resolved_config])
    except ConfigError:
        return lines  # Another version of the program wrote this config, so it cannot be compared.
    changed = changed_schedules(before, config, done)
    if changed:
        lines.append(f"These scheduled values change abruptly at step {done}: {', '.join(changed)}.")
    return lines


def _methods(system: Any) -> str:
    """Name of the distillation method of a run, or the labels of the methods of a comparison."""
    return system.guidance.type if hasattr(system, "guidance") else ", ".join(system.chosen)


def shell_path(path: Path) -> str:
    """A path as an argument of a command that a message shows, quoted if a shell needs it."""
    return shlex.quote(str(path))


def how_to_resume(folder: RunFolder, resume_from: Path | None) -> str:
    """Message with the command that continues a run, or the pipeline ``resume_from``."""
    return f"To continue: {command_name()} --train --resume {shell_path(resume_from or folder.root)}"


def after_failure(folder: RunFolder, resume_from: Path | None, condition: str = "", overrides: str = "") -> str:
    """Message about what a failed run has saved, and how to continue it.

    Args:
        folder: Folder of the run.
        resume_from: The pipeline to which the run belongs.
        condition: What must be true before, such as ``once there is space``.
        overrides: Form of the changed settings, such as ``KEY=VALUE``.
    """
    after = f" {condition}" if condition else ""
    steps = [step_of(path) for path in kept_checkpoints(folder.checkpoints)]
    if not steps and resume_from is None:
        return f"No checkpoint has been saved yet, so start the run again{after}"
    saved = f"The checkpoint of step {steps[-1]} is kept" if steps else "Finished stages are kept"
    prefix = f" stages.{folder.root.name}." if resume_from is not None else " "
    run = shell_path(resume_from or folder.root)
    command = f"{command_name()} --train --resume {run}{prefix + overrides if overrides else ''}"
    return f"{saved}. To continue{after}: {command}"


def after_interrupt(folder: RunFolder, resume_from: Path | None) -> str:
    """Message about what an interrupted run has saved."""
    newest = folder.newest_checkpoint
    if newest is None:
        return "Stopped before the first checkpoint; there is nothing to resume."
    return f"Stopped; the last checkpoint is {newest}. {how_to_resume(folder, resume_from)}"

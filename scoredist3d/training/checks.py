"""Checks of a run's configuration before anything is written: inputs, prompt, and changes to a resumed run."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from scoredist3d.config.experiment import ExperimentConfig
from scoredist3d.config.fields import ConfigError
from scoredist3d.config.loader import merge_layers
from scoredist3d.config.pipeline import source_stage
from scoredist3d.config.validation import missing_files, resolve_run
from scoredist3d.prompts.wording import check_prompts
from scoredist3d.training.checkpoint import checkpoint_step
from scoredist3d.training.fit import start_of
from scoredist3d.training.folder import RunFolder, find_run, kept_checkpoints, step_of


def check_new(config: ExperimentConfig) -> None:
    """Check the inputs and the prompt of a new run."""
    check_sources(config)
    check_prompts([config])


def check_sources(config: ExperimentConfig) -> None:
    """Check that all inputs of a new run exist.

    Raises:
        ConfigError: Files or runs named in the config do not exist; the message has one line for each.
    """
    problems = missing_files(config)
    start = start_of(config)
    if start is not None and source_stage(config) is None:
        try:
            find_run(start)
        except ValueError as error:
            problems.append(f"system.init_from: {error}")
    if problems:
        raise ConfigError("\n".join(problems))


def check_resume(config: ExperimentConfig, folder: RunFolder, checkpoint: Path, allowed: Collection[str]) -> int:
    """Number of optimizer steps of the checkpoint that a run continues from.

    Args:
        config: Config of the new session.
        folder: Folder of the run.
        checkpoint: The checkpoint.
        allowed: Keys of :data:`scoredist3d.config.resume.GUARDED_KEYS` that may change.

    Raises:
        ConfigError: Keys change that are not allowed to; the message has one line for each.
    """
    done = checkpoint_step(checkpoint)
    check_changes(config, folder, done, allowed, checkpoint)
    return done


def check_changes(
    config: ExperimentConfig, folder: RunFolder, done: int, allowed: Collection[str], checkpoint: Path | None = None
) -> None:
    """Check that a run with ``done`` finished steps keeps its seed and prompt and needs no fewer steps.

    Raises:
        ConfigError: As for :func:`check_resume`.
    """
    before = resolve_run(merge_layers([folder.resolved_config]))
    problems = [
        f"{key}: the run was trained with {before[key]!r}, not {after!r}; keep the value, start a new run, or add "
        f"--allow-change {key}"
        for key, after in (("seed", config.seed), ("prompt", config.prompt))
        if key in before and before[key] != after and key not in allowed
    ]
    wanted = config.trainer.max_steps
    if wanted < done and "trainer.max_steps" not in allowed:
        earlier = [path.name for path in kept_checkpoints(folder.checkpoints) if step_of(path) <= wanted]
        instead = f", resume from {folder.checkpoints / earlier[-1]}" if earlier else ""
        problems.append(
            f"trainer.max_steps: {wanted} is less than the {done} steps of {checkpoint or folder.root}; set it to "
            f"{done} or more{instead}, or add --allow-change trainer.max_steps to take the state as it is"
        )
    if problems:
        raise ConfigError("\n".join(problems))

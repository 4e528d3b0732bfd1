"""Configuration of a resumed run: the stored one merged with new files and overrides, without changes to schedules."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scoredist3d.config.experiment import ExperimentConfig
from scoredist3d.config.loader import STAGES, merge, merge_layers
from scoredist3d.config.pipeline import Pipeline
from scoredist3d.config.schedule import Schedule
from scoredist3d.config.validation import dump, load_plain, resolve_run

GUARDED_KEYS = ("seed", "prompt", "trainer.max_steps")
"""Keys whose changes would mix two different runs: they must be allowed (for the number of steps: if it falls below
the number of finished steps)."""


def resumed_layers(
    stored: str | Path, files: Sequence[str | Path] = (), overrides: Sequence[str] = ()
) -> dict[str, Any]:
    """Merged layers of a resumed run, with unresolved interpolations.

    A new ``trainer.max_steps`` does not change the schedules: unless ``files`` or ``overrides`` set
    ``trainer.schedule_steps``, this function sets it to the earlier number of steps, which remains the value of
    ``${trainer.max_steps}``.

    Args:
        stored: The config file of the run.
        files: Further config files; later ones take precedence.
        overrides: Strings ``key.path=value``, merged after all files.

    Raises:
        ConfigError: As for :func:`scoredist3d.config.loader.load`.
    """
    merged = merge_layers([stored, *files], overrides)
    if _sets_schedule_steps(merge_layers(files, overrides)):
        return merged
    return _with_schedule_steps(merged, _schedule_steps(stored))


def resumed_stages(pipeline: Pipeline, resolved: Mapping[str, str | Path]) -> dict[str, dict[str, Any]]:
    """Merged layers of each stage of a resumed pipeline, by name; for schedules, see :func:`resumed_layers`.

    Args:
        pipeline: The pipeline with the new files and overrides.
        resolved: Mapping from the names of the stages that have started to their resolved config files.
    """
    stages = dict(pipeline.written[STAGES])
    for name, file in resolved.items():
        if name in stages and not _sets_schedule_steps(stages[name]):
            stages[name] = _with_schedule_steps(stages[name], _schedule_steps(file))
    return stages


def load_resumed(
    stored: str | Path, files: Sequence[str | Path] = (), overrides: Sequence[str] = ()
) -> ExperimentConfig:
    """The typed configuration of a resumed run; see :func:`resumed_layers`."""
    return load_plain(resumed_layers(stored, files, overrides))


def changed_schedules(before: Any, after: Any, step: int, path: str = "") -> list[str]:
    """A line ``key old -> new`` for every schedule whose value at ``step`` differs between two configurations.

    Only keys that are present in both configurations are compared.
    """
    if isinstance(before, Schedule) and isinstance(after, Schedule):
        old, new = before(step), after(step)
        same = abs(old - new) <= 1e-9 * max(abs(old), abs(new))
        return [] if same else [f"{path} {old:.4g} -> {new:.4g}"]
    first, second = _children(before), _children(after)
    return [
        line
        for key in first
        if key in second
        for line in changed_schedules(first[key], second[key], step, f"{path}.{key}" if path else key)
    ]


def changed_settings(stored: str | Path, config: ExperimentConfig) -> list[str]:
    """A line ``key: old -> new`` for every key whose value in the stored config file differs from that in ``config``.

    If the type of a component changes, its other keys are not compared.
    """
    return _differences(resolve_run(merge_layers([stored])), dump(config), "")


def _differences(before: Any, after: Any, path: str) -> list[str]:
    if not isinstance(before, dict) or not isinstance(after, dict):
        return [] if before == after else [f"{path}: {_shown(before)} -> {_shown(after)}"]
    if before.get("type") != after.get("type"):
        return [f"{path}.type: {_shown(before.get('type'))} -> {_shown(after.get('type'))}"]
    return [
        line
        for key in dict.fromkeys([*before, *after])
        for line in _differences(before.get(key), after.get(key), f"{path}.{key}" if path else str(key))
    ]


def _shown(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


def _children(config: Any) -> dict[str, Any]:
    if isinstance(config, dict):
        return config
    if dataclasses.is_dataclass(config) and not isinstance(config, (type, Schedule)):
        return {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return {}


def _sets_schedule_steps(layers: dict[str, Any]) -> bool:
    trainer = layers.get("trainer")
    return isinstance(trainer, dict) and "schedule_steps" in trainer


def _schedule_steps(stored: str | Path) -> Any:
    """The value of ``${trainer.max_steps}`` in a stored config; None if the config is invalid."""
    trainer = resolve_run(merge_layers([stored]))["trainer"]
    return (trainer["schedule_steps"] or trainer["max_steps"]) if isinstance(trainer, dict) else None


def _with_schedule_steps(merged: dict[str, Any], steps: Any) -> dict[str, Any]:
    """``merged`` with ``trainer.schedule_steps`` set to ``steps``, or unchanged if no value depends on that key."""
    kept: dict[str, Any] = merge(merged, {"trainer": {"schedule_steps": steps}})
    before, after = (merge(resolve_run(layers), {"trainer": {"schedule_steps": None}}) for layers in (merged, kept))
    return merged if before == after else kept

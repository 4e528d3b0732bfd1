"""Several runs, one after the other, each starting from what the one before has made.

A pipeline is a config file with ``stages:``, a block per stage in the order of running. A stage's block is a config of
its own (with ``include``); what stands beside ``stages`` holds for all of them, a stage's own values win over it, and
the command line wins over both: ``trainer.max_steps=10`` for every stage, ``stages.coarse.trainer.max_steps=10`` for
one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scoredist3d.config.experiment import ExperimentConfig
from scoredist3d.config.fields import ConfigError
from scoredist3d.config.loader import STAGES, merge, merge_layers, parse_overrides
from scoredist3d.config.validation import load_plain

STAGE_PREFIX = "stage:"


@dataclass(frozen=True)
class Pipeline:
    """The validated runs of a pipeline.

    Attributes:
        stages: By name, in order; the ``system.init_from`` of one that starts from another is ``stage:<its name>``.
        written: The stages with everything merged and interpolations kept: a pipeline file that runs again by itself.
    """

    stages: dict[str, ExperimentConfig]
    written: dict[str, Any]

    @property
    def first(self) -> ExperimentConfig:
        """The first stage, whose name, tag and output_root are those of all."""
        return next(iter(self.stages.values()))


def is_pipeline(merged: dict[str, Any]) -> bool:
    """Whether merged layers describe several runs."""
    return STAGES in merged


def load_pipeline(files: Sequence[str | Path], overrides: Sequence[str] = ()) -> Pipeline:
    """Files and overrides to the typed runs of a pipeline.

    Raises:
        ConfigError: As for a single run, each line with the stage in front; unknown or badly named stages.
    """
    written, asked = merge_layers(files), parse_overrides(overrides)
    blocks = written.get(STAGES)
    if not isinstance(blocks, dict) or not blocks:
        raise ConfigError(f"{STAGES}: must hold at least one stage")
    own = asked.pop(STAGES, {})
    if not isinstance(own, dict):
        raise ConfigError(f"{STAGES}: override single values, as in {STAGES}.{next(iter(blocks))}.trainer.max_steps=10")
    for name in {*own} - {*blocks}:
        raise ConfigError(f"{STAGES}.{name}: there is no such stage; stages are {', '.join(blocks)}")
    common = {key: value for key, value in written.items() if key != STAGES}
    stages: dict[str, ExperimentConfig] = {}
    merged: dict[str, Any] = {}
    problems: list[str] = []
    previous: str | None = None
    for name, block in blocks.items():
        merged[name] = _merged([common, block, asked, own.get(name, {})], common, previous)
        try:
            stages[name] = _stage(str(name), merged[name], list(blocks))
        except ConfigError as error:
            problems += [f"{STAGES}.{name}.{line}" for line in str(error).splitlines()]
        previous = str(name)
    if problems:
        raise ConfigError("\n".join(dict.fromkeys(problems)))
    return Pipeline(stages, {STAGES: merged})


def _merged(layers: list[dict[str, Any]], common: dict[str, Any], previous: str | None) -> dict[str, Any]:
    """A stage's layers in one, starting from the stage before it where it does not say otherwise."""
    merged: dict[str, Any] = {}
    for layer in layers:
        merged = merge(merged, layer)
    if "name" in common:
        merged["name"] = common["name"]  # not that of an included recipe
    system = merged.setdefault("system", {})
    if previous is not None and "init_from" not in system:
        system["init_from"] = STAGE_PREFIX + previous
    return merged


def _stage(name: str, merged: dict[str, Any], names: list[str]) -> ExperimentConfig:
    if not name.replace("-", "").replace("_", "").isalnum():
        raise ConfigError(f"name: a stage is a folder, so its name may hold letters, digits, - and _; got {name!r}")
    config = load_plain(merged)
    start = getattr(config.system, "init_from", None)
    if start is not None and start.startswith(STAGE_PREFIX):
        source = start.removeprefix(STAGE_PREFIX)
        if source not in names[: names.index(name)]:
            earlier = ", ".join(names[: names.index(name)]) or "none"
            raise ConfigError(f"system.init_from: {start} is no earlier stage; those are {earlier}")
    return config

"""Several runs, one after the other, each starting from what the one before has made.

A pipeline is a config file with ``stages:``, a block per stage in the order of running. A stage's block is a config of
its own (with ``include``); what stands beside ``stages`` holds for all of them, a stage's own values win over it, and
the command line, like the files that follow the pipeline's, wins over both: ``trainer.max_steps=10`` for every stage,
``stages.coarse.trainer.max_steps=10`` for one, ``stages.coarse=null`` to take one out.
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


def source_stage(config: ExperimentConfig) -> str | None:
    """The stage that a stage starts from, if it starts from one."""
    start = getattr(config.system, "init_from", None)
    return start.removeprefix(STAGE_PREFIX) if start is not None and start.startswith(STAGE_PREFIX) else None


def at_stage(name: str, message: str) -> str:
    """A message about a stage's config, line by line, with the keys as they are in the pipeline's."""
    return "\n".join(f"{STAGES}.{name}.{line}" for line in message.splitlines())


def is_pipeline(merged: dict[str, Any]) -> bool:
    """Whether merged layers describe several runs."""
    return STAGES in merged


def load_pipeline(files: Sequence[str | Path], overrides: Sequence[str] = ()) -> Pipeline:
    """Files and overrides to the typed runs of a pipeline.

    Raises:
        ConfigError: As for a single run, each line with the stage in front; unknown or badly named stages.
    """
    written, later = _split(files)
    asked = merge(later, parse_overrides(overrides))
    blocks = written.get(STAGES)
    if not isinstance(blocks, dict) or not blocks:
        raise ConfigError(f"{STAGES}: must hold at least one stage")
    own = asked.pop(STAGES, {})
    _check_names(blocks, own, asked)
    common = {key: value for key, value in written.items() if key != STAGES}
    stages: dict[str, ExperimentConfig] = {}
    merged: dict[str, Any] = {}
    problems: dict[str, list[str]] = {}
    previous: str | None = None
    for name in [str(name) for name in blocks if own.get(name, {}) is not None]:
        merged[name] = _merged(common, blocks[name], asked, own.get(name, {}), previous)
        try:
            stages[name] = _stage(name, merged[name], list(merged))
        except ConfigError as error:
            for line in str(error).splitlines():
                problems.setdefault(line, []).append(name)
        previous = name
    if problems:
        raise ConfigError("\n".join(_told(line, names, len(merged)) for line, names in problems.items()))
    if not merged:
        raise ConfigError(f"{STAGES}: every stage has been taken out")
    return Pipeline(stages, {STAGES: merged})


def _split(files: Sequence[str | Path]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The layers up to the last file with stages, and those of the files after it: they hold for every stage."""
    last = max(index for index, file in enumerate(files) if STAGES in merge_layers([file]))
    return merge_layers(files[: last + 1]), merge_layers(files[last + 1 :])


def _check_names(blocks: dict[str, Any], own: Any, asked: dict[str, Any]) -> None:
    """Overrides are for stages that there are."""
    if not isinstance(own, dict):
        raise ConfigError(f"{STAGES}: override single values, as in {STAGES}.{next(iter(blocks))}.trainer.max_steps=10")
    for name, block in own.items():
        if name not in blocks:
            raise ConfigError(f"{STAGES}.{name}: there is no such stage; stages are {', '.join(blocks)}")
        if block is not None and not isinstance(block, dict):
            raise ConfigError(
                f"{STAGES}.{name}: must be a block, got {block!r}; override single values, as in "
                f"{STAGES}.{name}.trainer.max_steps=10, or take the stage out with {STAGES}.{name}=null"
            )
    for name in blocks:
        if name in asked:
            raise ConfigError(f"{name}: is a stage; write {STAGES}.{name} in front, as in {STAGES}.{name}.trainer...")


def _told(line: str, names: list[str], count: int) -> str:
    """A mistake that every stage makes is told once, another one with its stage."""
    if len(names) == count:
        return line
    return "\n".join(at_stage(name, line) for name in names)


def _merged(
    common: dict[str, Any], block: dict[str, Any], asked: dict[str, Any], own: dict[str, Any], previous: str | None
) -> dict[str, Any]:
    """A stage's layers in one, starting from the stage before it where it does not say otherwise."""
    merged: dict[str, Any] = merge(common, block)
    if "name" in common:
        merged["name"] = common["name"]  # not that of an included recipe
    merged = merge(merge(merged, asked), own)
    system = merged.setdefault("system", {})
    if previous is not None and "init_from" not in system:
        system["init_from"] = STAGE_PREFIX + previous
    return merged


def _stage(name: str, merged: dict[str, Any], names: list[str]) -> ExperimentConfig:
    if not name.replace("-", "").replace("_", "").isalnum():
        raise ConfigError(f"name: a stage is a folder, so its name may hold letters, digits, - and _; got {name!r}")
    config = load_plain(merged)
    source, earlier = source_stage(config), names[: names.index(name)]
    if source is not None and source not in earlier:
        known = ", ".join(earlier) or "none"
        raise ConfigError(f"system.init_from: {STAGE_PREFIX}{source} is no earlier stage; those are {known}")
    return config

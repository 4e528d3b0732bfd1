"""Pipelines: several runs in sequence, each of which starts from the result of the previous one.

A pipeline is a config file with a mapping ``stages:``, which contains one block per stage, in order. The block of a
stage is a complete config and may have an ``include``. Keys next to ``stages`` apply to all stages; keys in the block
of a stage take precedence over them. The command line and the files after the pipeline file take precedence over both.
The override ``trainer.max_steps=10`` sets a value in every stage, ``stages.coarse.trainer.max_steps=10`` sets it in
one, and ``stages.coarse=null`` removes a stage.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scoredist3d.config.coercion import shown
from scoredist3d.config.experiment import ExperimentConfig
from scoredist3d.config.fields import ConfigError
from scoredist3d.config.loader import STAGES, merge, merge_layers, parse_overrides
from scoredist3d.config.validation import load_plain

STAGE_PREFIX = "stage:"


@dataclass(frozen=True)
class Pipeline:
    """Validated configurations of the stages of a pipeline.

    Attributes:
        stages: Mapping from the names of the stages to their configurations, in order.
            ``system.init_from`` is ``stage:NAME`` in a stage that starts from another stage.
        written: The merged stages before interpolations are resolved, as the content of a complete pipeline file.
    """

    stages: dict[str, ExperimentConfig]
    written: dict[str, Any]

    @property
    def first(self) -> ExperimentConfig:
        """The configuration of the first stage, whose name, tag and output_root apply to all stages."""
        return next(iter(self.stages.values()))


def source_stage(config: ExperimentConfig) -> str | None:
    """The name of the stage that ``config`` starts from, or None if it does not start from a stage."""
    start = getattr(config.system, "init_from", None)
    return start.removeprefix(STAGE_PREFIX) if start is not None and start.startswith(STAGE_PREFIX) else None


def at_stage(name: str, message: str) -> str:
    """``message`` with ``stages.<name>.`` prepended to each line, since each line starts with a key of the stage."""
    return "\n".join(f"{STAGES}.{name}.{line}" for line in message.splitlines())


def is_pipeline(merged: dict[str, Any]) -> bool:
    """Whether merged layers describe a pipeline rather than a single run."""
    return STAGES in merged


def load_pipeline(files: Sequence[str | Path], overrides: Sequence[str] = ()) -> Pipeline:
    """The pipeline that config files and overrides describe.

    Raises:
        ConfigError: The configuration of a stage is invalid (each line names the stage, unless the problem concerns all
            stages); or a stage is unknown or has an invalid name.
    """
    written, later = _split(files)
    given = merge(later, parse_overrides(overrides))
    blocks = written.get(STAGES)
    if not isinstance(blocks, dict) or not blocks:
        raise ConfigError(f"{STAGES}: at least one stage is required; add a block under the name of the stage")
    blocks = {str(name): block for name, block in blocks.items()}
    own = given.pop(STAGES, {})
    _check_names(blocks, own, given)
    common = {key: value for key, value in written.items() if key != STAGES}
    kept = [name for name in blocks if own.get(name, {}) is not None]
    _check_geometry({name: merge(common, blocks[name]) for name in kept}, given)
    stages: dict[str, ExperimentConfig] = {}
    merged: dict[str, Any] = {}
    problems: dict[str, list[str]] = {}
    previous: str | None = None
    for name in kept:
        merged[name] = _merged(common, blocks[name], given, own.get(name, {}), previous)
        try:
            stages[name] = _stage(name, merged[name], list(merged))
        except ConfigError as error:
            for line in error.full.splitlines():
                problems.setdefault(line, []).append(name)
        previous = name
    if problems:
        raise ConfigError("\n".join(_located(line, names, len(merged)) for line, names in problems.items()))
    if not merged:
        raise ConfigError(f"{STAGES}: the overrides remove every stage; keep at least one")
    return Pipeline(stages, {STAGES: merged})


def _split(files: Sequence[str | Path]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The merged files up to the last one with ``stages``, and the merged files after it, which apply to all stages."""
    last = max(index for index, file in enumerate(files) if STAGES in merge_layers([file]))
    return merge_layers(files[: last + 1]), merge_layers(files[last + 1 :])


def _check_names(blocks: dict[str, Any], own: Any, given: dict[str, Any]) -> None:
    """Check overrides of stages, both below ``stages`` (``own``) and at the top level (``given``).

    Raises:
        ConfigError: An override is neither a block nor null, names a stage that does not exist, or lacks the prefix
            ``stages.``.
    """
    if not isinstance(own, dict):
        raise ConfigError(
            f"{STAGES}: must be a mapping; override single values, as in "
            f"{STAGES}.{next(iter(blocks))}.trainer.max_steps=10"
        )
    for name, block in own.items():
        if name not in blocks:
            raise ConfigError(f"{STAGES}.{name}: no such stage; the stages are {', '.join(blocks)}")
        if block is not None and not isinstance(block, dict):
            raise ConfigError(
                f"{STAGES}.{name}: must be a block, got {shown(block)}; override single values, as in "
                f"{STAGES}.{name}.trainer.max_steps=10, or remove the stage with {STAGES}.{name}=null"
            )
    for name in blocks:
        if name in given:
            raise ConfigError(
                f"{name}: this is a stage; write {STAGES}.{name} instead, as in {STAGES}.{name}.trainer.max_steps=10"
            )


def _check_geometry(stages: dict[str, dict[str, Any]], given: dict[str, Any]) -> None:
    """Check that the layers for all stages (``given``) do not replace the geometries of stages whose geometries differ.

    Raises:
        ConfigError: They do, as the fragment of a representation does.
    """
    new, old = _geometry(given), {name: str(_geometry(stage) or "default") for name, stage in stages.items()}
    if new is not None and len(set(old.values())) > 1:
        now, stage = ", ".join(f"{name}: {kind}" for name, kind in old.items()), list(stages)[-1]
        raise ConfigError(
            f"system.geometry.type: {new} would replace the geometry of every stage ({now}). Use a recipe with one "
            "stage, such as configs/fast.yaml, or set the keys of one stage, as in "
            f"{STAGES}.{stage}.system.geometry.type={new}"
        )


def _geometry(layers: dict[str, Any]) -> Any:
    """The type of the geometry in merged layers, or None if they do not set it."""
    block = layers
    for key in ("system", "geometry"):
        block = block.get(key)  # type: ignore[assignment]
        if not isinstance(block, dict):
            return None
    return block.get("type")


def _located(line: str, names: list[str], count: int) -> str:
    """``line`` unchanged if all ``count`` stages have this problem; otherwise one line for each stage in ``names``."""
    if len(names) == count:
        return line
    return "\n".join(at_stage(name, line) for name in names)


def _merged(
    common: dict[str, Any], block: dict[str, Any], given: dict[str, Any], own: dict[str, Any], previous: str | None
) -> dict[str, Any]:
    """The merged layers of a stage; ``system.init_from``, if not set, becomes the ``previous`` stage."""
    merged: dict[str, Any] = merge(common, block)
    if "name" in common:
        merged["name"] = common["name"]  # takes precedence over the name in an included recipe
    merged = merge(merge(merged, given), own)
    system = merged.setdefault("system", {})
    if previous is not None and isinstance(system, dict) and "init_from" not in system:
        system["init_from"] = STAGE_PREFIX + previous
    return merged


def _stage(name: str, merged: dict[str, Any], names: list[str]) -> ExperimentConfig:
    if not name.replace("-", "").replace("_", "").isalnum():
        raise ConfigError(
            f"name: the name of a stage is a folder name, so only letters, digits, - and _ are allowed; got {name!r}"
        )
    config = load_plain(merged)
    source, earlier = source_stage(config), names[: names.index(name)]
    if source is not None and source not in earlier:
        known = ", ".join(earlier) or "none"
        raise ConfigError(f"system.init_from: {STAGE_PREFIX}{source} is not an earlier stage; earlier stages: {known}")
    return config

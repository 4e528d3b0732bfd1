"""Messages of runs that fail because a value is not finite, the memory is full or the disk is full.

A message names the stage of a pipeline, the part of the run, the settings that help, and how to continue.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from scoredist3d.config.errors import brief
from scoredist3d.config.experiment import ExperimentConfig
from scoredist3d.guidance.core.checks import NonFiniteError
from scoredist3d.reasons import ExplainedError, is_disk_full, is_out_of_memory, part_of, reason


class OutOfMemoryError(ExplainedError, MemoryError):
    """The memory of the computer or of a GPU is full; the message says what needs less."""


class DiskFullError(ExplainedError, OSError):
    """A disk is full; the message says how to continue once there is space."""


@contextmanager
def explaining(
    config: ExperimentConfig, continuing: Callable[[str, str], str] = lambda *_: "", stage: str | None = None
) -> Iterator[None]:
    """Context manager that replaces exceptions of its body by those of :func:`explained`.

    Args:
        config: Config of the run.
        continuing: Function that says how to continue; called with a condition, such as ``once there is space``, and
            the form of the overrides that help, such as ``KEY=VALUE``; by default, nothing is said.
        stage: Name of the stage if the run is part of a pipeline.
    """
    try:
        yield
    except Exception as error:
        told = explained(error, config, continuing, stage)
        if told is error:
            raise
        raise told from error


def explained(
    error: Exception,
    config: ExperimentConfig,
    continuing: Callable[[str, str], str] = lambda *_: "",
    stage: str | None = None,
) -> Exception:
    """The error with a complete message, or ``error`` itself if its kind is not one of this module.

    The arguments are those of :func:`explaining`.
    """
    where = "" if stage is None else f"stage {stage}, "
    if isinstance(error, NonFiniteError) and not error.complete:
        remedy = f"{_list(_steadier(error.term, config))}. {continuing('', 'KEY=VALUE')}"
        return NonFiniteError(error.step, error.term, remedy.strip(), where)
    if isinstance(error, ExplainedError):
        return error
    if is_out_of_memory(error):
        return OutOfMemoryError(_joined(where, _memory(error, config), continuing("", "KEY=VALUE")))
    if is_disk_full(error):
        return DiskFullError(_joined(where, reason(error), continuing("once there is space", "")))
    return error


def _joined(where: str, problem: str, how: str) -> str:
    return brief(f"{where}{problem}. {how}" if how else f"{where}{problem}")


def _memory(error: Exception, config: ExperimentConfig) -> str:
    """What is full, where, and the settings that need less."""
    found, on_gpu = part_of(error), isinstance(error, torch.OutOfMemoryError) or "CUDA" in str(error)
    changes = [f"lower {name}" for name in _existing((found and found.settings) or _step_settings(config), config)]
    if on_gpu and config.trainer.precision == "32-true":
        changes.append("set trainer.precision=bf16-mixed")
    if on_gpu and getattr(config.prior, "precision", None) == "fp32":
        changes.append("set prior.precision=fp16")
    changes.append(f"use {'a GPU' if on_gpu else 'a computer'} with more memory")
    full = "the memory of the GPU" if on_gpu else "the memory"
    return f"{full} is full in {found.name if found else 'this run'}. {_list(changes)}"


def _step_settings(config: ExperimentConfig) -> tuple[str, ...]:
    """Settings that reduce the memory of one step."""
    if hasattr(config.system, "renderer"):
        return ("data.batch_size", "data.height", "data.width", "system.particles_per_step")
    return ("system.particles_per_step", "system.geometry.particles", "prior.image_size")


def _steadier(term: str, config: ExperimentConfig) -> list[str]:
    """Changes that make a term finite again."""
    losses: Mapping[str, Any] = getattr(config.system, "loss", {})
    loss = next((name for name in losses if term.endswith(f"/{name}")), None)
    guidance = ["system.guidance.guidance_scale", "system.guidance.t_max"]
    keys = ["system.optimizer.lr", *(guidance if loss is None else [f"system.loss.{loss}.weight"])]
    changes = [f"lower {name}" for name in _existing(keys, config)]
    if config.trainer.precision != "32-true":
        changes.append("set trainer.precision=32-true")
    precision = getattr(config.prior, "precision", "fp32")
    if precision not in ("fp32", "auto") or (precision == "auto" and torch.cuda.is_initialized()):
        changes.append("set prior.precision=fp32")
    return changes


def _existing(keys: tuple[str, ...] | list[str], config: ExperimentConfig) -> list[str]:
    """The keys that ``config`` has."""
    return [key for key in keys if _value(config, key) is not None]


def _value(block: Any, key: str) -> Any:
    for name in key.split("."):
        block = block.get(name) if isinstance(block, Mapping) else getattr(block, name, None)
    return block


def _list(changes: list[str]) -> str:
    """Changes as a sentence without a full stop: "Lower a, b or c, or set d"."""
    lowered = [change.removeprefix("lower ") for change in changes if change.startswith("lower ")]
    others = [change for change in changes if not change.startswith("lower ")]
    first = ["lower " + " or ".join([", ".join(lowered[:-1]), lowered[-1]] if lowered[1:] else lowered)] * bool(lowered)
    sentence = ", or ".join([*first, *others])
    return sentence[:1].upper() + sentence[1:]

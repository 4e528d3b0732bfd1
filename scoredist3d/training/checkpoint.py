"""Checkpoint files: written atomically, read without executing code.

A checkpoint is a plain dict of tensors, numbers, strings and containers of these. Its ``scoredist3d`` entry holds the
number of the file format and the version of the program that wrote the file.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import scoredist3d
from scoredist3d.files import atomic_file, sync_file, sync_folder
from scoredist3d.geometry.base import prepare_loading
from scoredist3d.reasons import is_out_of_memory, reason
from scoredist3d.tensor_files import LOADING_ERRORS, load_tensors
from scoredist3d.training.folder import LAST_CHECKPOINT, kept_checkpoints

MARKER = "scoredist3d"
FORMAT = 1


def write_checkpoint(checkpoint: dict[str, Any], path: str | Path) -> None:
    """Write a checkpoint atomically: even after a power failure, ``path`` is the old or the complete new file."""
    path = Path(path)
    with atomic_file(path) as file:
        torch.save(checkpoint | {MARKER: {"format": FORMAT, "version": scoredist3d.__version__}}, file)


def read_checkpoint(path: str | Path, *, mmap: bool = False) -> dict[str, Any]:
    """Load a checkpoint to the CPU; only tensors and plain values are accepted, so a file cannot execute code.

    See :mod:`scoredist3d.tensor_files` for the checks.

    Args:
        path: Checkpoint file.
        mmap: Leave the tensors on disk until they are used.

    Raises:
        ValueError: The file is missing, damaged, written by another program, or has an unsupported format.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"checkpoint {path} does not exist{_alternatives(path)}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # They concern pickles, which are rejected anyway.
            checkpoint = load_tensors(path, mmap=mmap)
    except PermissionError as error:
        raise ValueError(f"{path} cannot be read: permission denied; change its permissions") from error
    except LOADING_ERRORS as error:
        reason = f" ({error})" if type(error) is ValueError else ""
        raise ValueError(
            f"{path} is damaged or not a checkpoint of this program{reason}{_alternatives(path)}"
        ) from error
    marker = checkpoint.get(MARKER) if isinstance(checkpoint, dict) else None
    if not isinstance(marker, dict):
        raise ValueError(f"{path} was not written by this program{_alternatives(path)}")
    if marker.get("format") != FORMAT:
        raise ValueError(
            f"{path} has checkpoint format {marker.get('format')} (version {marker.get('version')}), but this program "
            f"reads format {FORMAT}; use the version of the program that wrote it"
        )
    return checkpoint


@dataclass(frozen=True)
class TrainedState:
    """Result of training.

    Attributes:
        weights: The ``state_dict`` of the system.
        step: Number of optimizer steps.
    """

    weights: dict[str, Any]
    step: int


def read_trained(path: str | Path) -> TrainedState:
    """The trained state in a checkpoint.

    Raises:
        ValueError: As for :func:`read_checkpoint`, or the checkpoint contains no weights or no number of steps.
    """
    checkpoint = read_checkpoint(path)
    _check_entries(checkpoint, Path(path), {"state_dict": dict})
    return TrainedState(checkpoint["state_dict"], _steps(checkpoint, Path(path)))


def read_resumable(path: str | Path) -> dict[str, Any]:
    """A checkpoint from which training can continue.

    Raises:
        ValueError: As for :func:`read_trained`, or the states of optimizers or of parts of the run are missing.
    """
    checkpoint = read_checkpoint(path)
    _steps(checkpoint, Path(path))
    _check_entries(
        checkpoint, Path(path), {"state_dict": dict, "optimizer_states": list, "loops": dict, "callbacks": dict}
    )
    return checkpoint


def checkpoint_step(path: str | Path) -> int:
    """Number of optimizer steps done before a checkpoint was saved; raises the errors of :func:`read_checkpoint`."""
    return _steps(read_checkpoint(path, mmap=True), Path(path))


def _steps(checkpoint: dict[str, Any], path: Path) -> int:
    step = checkpoint.get("global_step")
    if not isinstance(step, int) or isinstance(step, bool) or step < 0:
        raise ValueError(f"{path} is damaged: it has no number of steps{_alternatives(path)}")
    return step


def _check_entries(checkpoint: dict[str, Any], path: Path, kinds: Mapping[str, Any]) -> None:
    """Check that entries exist and have the given types, and that the weights have names."""
    for name, kind in kinds.items():
        value = checkpoint.get(name)
        if not isinstance(value, kind) or (name == "state_dict" and not all(isinstance(key, str) for key in value)):
            raise ValueError(
                f"{path} is damaged or was written by another program: its entry {name} is missing or has the wrong "
                f"type{_alternatives(path)}"
            )


def load_weights(module: nn.Module, weights: dict[str, Any]) -> None:
    """Load a checkpoint's ``state_dict`` into ``module``; geometries of variable size are resized first.

    Raises:
        ValueError: Names or shapes of tensors differ, so the checkpoint belongs to another configuration.
    """
    try:
        _load_weights(module, weights)
    except (LookupError, TypeError, AttributeError, RuntimeError) as error:  # The state of a part has another form.
        if is_out_of_memory(error):
            raise
        raise ValueError(
            f"the weights of the checkpoint cannot be loaded ({reason(error)}); use the config it was trained with, "
            "configs/resolved.yaml in its run folder, or another checkpoint"
        ) from error


def _load_weights(module: nn.Module, weights: dict[str, Any]) -> None:
    prepare_loading(module, weights)
    own = module.state_dict()
    missing, unexpected = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    changed = [name for name in sorted(own.keys() & weights.keys()) if _shape(own[name]) != _shape(weights[name])]
    problems = [
        f"{what} {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
        for what, names in (("missing:", missing), ("unexpected:", unexpected), ("different sizes:", changed))
        if names
    ]
    if problems:
        raise ValueError(
            f"the checkpoint belongs to another configuration ({'; '.join(problems)}); use the config it was "
            "trained with: configs/resolved.yaml in its run folder"
        )
    module.load_state_dict(weights)


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(getattr(value, "shape", ()))


def link_or_copy(source: Path, target: Path) -> None:
    """Atomically make ``target`` a hard link to ``source``, or a copy of it if hard links are not supported."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    with suppress(FileNotFoundError):
        temporary.unlink()
    try:
        os.link(source, temporary)
    except OSError:
        shutil.copyfile(source, temporary)
        sync_file(temporary)
    os.replace(temporary, target)
    sync_folder(target.parent)


def checkpoint_name(step: int) -> str:
    """File name of the numbered checkpoint after ``step`` optimizer steps."""
    return f"step-{step:06d}.ckpt"


def _alternatives(path: Path) -> str:
    others = [
        p.name for p in [*kept_checkpoints(path.parent), path.parent / LAST_CHECKPOINT] if p != path and p.is_file()
    ]
    if others:
        return f"; use another checkpoint in {path.parent}: {', '.join(others)}"
    return "; its folder has no other checkpoint, so start the run again"

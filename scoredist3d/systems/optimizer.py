"""The optimiser of a system: one over named parameter groups, each with its own learning rate schedule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from scoredist3d.config import Schedule, option
from scoredist3d.registry import near_matches


@dataclass
class OptimizerConfig:
    """One optimiser over all groups of the representation."""

    name: Literal["adam", "adamw", "sgd"] = option(
        "adam",
        "adamw decays weights apart from the gradient, adam adds no decay; sgd is plain gradient descent, in which "
        "several methods follow the sampler exactly.",
    )
    lr: Schedule = option(0.01, "Learning rate of the groups that lr_groups does not name.", ge=0)
    lr_groups: dict[str, Schedule] = option(
        {}, "Learning rates of single groups, e.g. {geometry.encoding: 0.01, background: 0.001}.", ge=0
    )
    betas: tuple[float, float] = option((0.9, 0.99), "Decay rates of the two moments.", ge=0, lt=1)
    eps: float = option(
        1e-15, "Added to the root of the second moment; small because hash grid gradients are small.", gt=0
    )
    weight_decay: float = option(0.0, "Decoupled weight decay (adamw only).", ge=0)

    def __post_init__(self) -> None:
        """Plain numbers become schedules, also where no validator has done it."""
        self.lr = Schedule.parse(self.lr)
        self.lr_groups = {name: Schedule.parse(value) for name, value in self.lr_groups.items()}

    def validate(self) -> list[str]:
        """Weight decay does nothing where the optimiser has none."""
        if self.name != "adamw" and self.weight_decay > 0:
            return [f"weight_decay: {self.weight_decay} has no effect with name={self.name}; use name=adamw"]
        return []


def build_optimizer(
    config: OptimizerConfig, groups: Sequence[dict[str, Any]], *, fused: bool = True
) -> torch.optim.Optimizer:
    """The configured optimiser over ``groups`` ({"name", "params"}); empty groups are left out.

    Raises:
        ValueError: ``lr_groups`` names a group that does not exist, or nothing is trainable.
    """
    trainable = []
    for group in groups:
        params = [p for p in group["params"] if p.requires_grad]
        if params:
            trainable.append({"name": group["name"], "params": params})
    names = [group["name"] for group in trainable]
    if not names:
        raise ValueError("nothing to optimise: no component of system has trainable parameters")
    for name in config.lr_groups:
        if not any(_belongs(group, name) for group in names):
            raise ValueError(
                f"system.optimizer.lr_groups.{name}: no such parameter group.{near_matches(name, names)} "
                f"Groups are {', '.join(names)}"
            )
    if config.name == "sgd":
        return torch.optim.SGD(trainable, lr=config.lr(0), fused=fused)
    options: dict[str, Any] = {"lr": config.lr(0), "betas": tuple(config.betas), "eps": config.eps, "fused": fused}
    if config.name == "adamw":
        return torch.optim.AdamW(trainable, weight_decay=config.weight_decay, **options)
    return torch.optim.Adam(trainable, **options)


def set_learning_rates(optimizer: torch.optim.Optimizer, config: OptimizerConfig, step: int) -> None:
    """Give each group the value of its schedule at ``step``; a function of the step alone, so nothing is saved."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(config, group["name"])(step)


def learning_rate(config: OptimizerConfig, group: str) -> Schedule:
    """The schedule of a group: the longest entry of ``lr_groups`` that is its name or a parent of it, else ``lr``."""
    matches = [name for name in config.lr_groups if _belongs(group, name)]
    return config.lr_groups[max(matches, key=len)] if matches else config.lr


def _belongs(group: str, name: str) -> bool:
    return group == name or group.startswith(name + ".")

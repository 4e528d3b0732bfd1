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

    A group may bring a config of its own under the key ``optimizer``.

    Raises:
        ValueError: ``lr_groups`` names a group that does not exist, or nothing is trainable.
    """
    trainable: list[tuple[OptimizerConfig, dict[str, Any]]] = []
    for group in groups:
        params = [p for p in group["params"] if p.requires_grad]
        if params:
            trainable.append((group.get("optimizer", config), {"name": group["name"], "params": params}))
    names = [group["name"] for _, group in trainable]
    if not names:
        raise ValueError("nothing to optimise: no component of system has trainable parameters")
    for name in config.lr_groups:
        if not any(_belongs(group, name) for group in names):
            raise ValueError(
                f"system.optimizer.lr_groups.{name}: no such parameter group.{near_matches(name, names)} "
                f"Groups are {', '.join(names)}"
            )
    by_config: list[tuple[OptimizerConfig, list[dict[str, Any]]]] = []
    for own, group in trainable:
        if not by_config or by_config[-1][0] is not own:
            by_config.append((own, []))
        by_config[-1][1].append(group)
    optimizers = [_build(own, members, fused) for own, members in by_config]
    return optimizers[0] if len(optimizers) == 1 else SideBySide(optimizers)


def _build(config: OptimizerConfig, groups: list[dict[str, Any]], fused: bool) -> torch.optim.Optimizer:
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=config.lr(0), fused=fused)
    options: dict[str, Any] = {"lr": config.lr(0), "betas": tuple(config.betas), "eps": config.eps, "fused": fused}
    if config.name == "adamw":
        return torch.optim.AdamW(groups, weight_decay=config.weight_decay, **options)
    return torch.optim.Adam(groups, **options)


class SideBySide(torch.optim.Optimizer):
    """Several optimisers over different parameters, stepped together as one."""

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        self.optimizers = tuple(optimizers)
        super().__init__([group for optimizer in optimizers for group in optimizer.param_groups], {})
        # The very same dicts, so that a learning rate set here is set there.
        self.param_groups = [group for optimizer in optimizers for group in optimizer.param_groups]

    def step(self, closure: Any = None) -> Any:
        """One step of each; the closure is evaluated once, first."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for optimizer in self.optimizers:
            optimizer.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Of each, by position."""
        return {"side_by_side": [optimizer.state_dict() for optimizer in self.optimizers]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        for optimizer, state in zip(self.optimizers, state_dict["side_by_side"], strict=True):
            optimizer.load_state_dict(state)
        self.param_groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]


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

"""Optimizers over named parameter groups, each group with its own learning-rate schedule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from scoredist3d.config import Schedule
from scoredist3d.config.optimizer import OptimizerConfig
from scoredist3d.registry import near_matches


def build_optimizer(
    config: OptimizerConfig, groups: Sequence[dict[str, Any]], *, fused: bool = True
) -> torch.optim.Optimizer:
    """The optimizer that a config describes, over named parameter groups.

    Args:
        config: Optimizer and learning rates.
        groups: Parameter groups ``{"name", "params"}``; groups without trainable parameters are skipped. A group with
            the key ``optimizer`` uses the config under this key instead of ``config``.
        fused: Use PyTorch's fused implementation of the update.

    Raises:
        ValueError: ``lr_groups`` names a group that does not exist, or no parameter is trainable.
    """
    trainable: list[tuple[OptimizerConfig, dict[str, Any]]] = []
    for group in groups:
        params = [p for p in group["params"] if p.requires_grad]
        if params:
            trainable.append((group.get("optimizer", config), {"name": group["name"], "params": params}))
    names = [group["name"] for _, group in trainable]
    if not names:
        raise ValueError(
            "nothing to optimize: no component of system has trainable parameters; "
            "choose a geometry, material or background that has some"
        )
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
    """Several optimizers over disjoint parameters, stepped as one."""

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        self.optimizers = tuple(optimizers)
        super().__init__([group for optimizer in optimizers for group in optimizer.param_groups], {})
        # These are the dicts of the inner optimizers, not copies, so a learning rate set here takes effect there.
        self.param_groups = [group for optimizer in optimizers for group in optimizer.param_groups]

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Step every optimizer; a closure is evaluated once, before the first step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for optimizer in self.optimizers:
            optimizer.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """The states of the optimizers, in order."""
        return {"side_by_side": [optimizer.state_dict() for optimizer in self.optimizers]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load states in the form that :meth:`state_dict` returns."""
        for optimizer, state in zip(self.optimizers, state_dict["side_by_side"], strict=True):
            optimizer.load_state_dict(state)
        self.param_groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]


def set_learning_rates(optimizer: torch.optim.Optimizer, config: OptimizerConfig, step: int) -> None:
    """Set the learning rate of each group to the value of its schedule at ``step``."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(config, group["name"])(step)


def learning_rate(config: OptimizerConfig, group: str) -> Schedule:
    """Learning-rate schedule of a group.

    This is the value of the longest key of ``lr_groups`` that is the name of the group or a dotted prefix of the name,
    or ``lr`` if no key matches.
    """
    matches = [name for name in config.lr_groups if _belongs(group, name)]
    return config.lr_groups[max(matches, key=len)] if matches else config.lr


def _belongs(group: str, name: str) -> bool:
    return group == name or group.startswith(name + ".")

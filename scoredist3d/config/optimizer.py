"""Configuration of the optimizer of a system."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from scoredist3d.config.fields import option
from scoredist3d.config.schedule import Schedule


@dataclass
class OptimizerConfig:
    """The optimizer for all parameter groups of a system."""

    name: Literal["adam", "adamw", "sgd"] = option(
        "adam",
        "Optimization algorithm. adamw adds decoupled weight decay to adam; sgd is plain gradient descent, for which "
        "the steps of several methods equal the steps of a sampler.",
    )
    lr: Schedule = option(0.01, "Learning rate of the parameter groups that are not in lr_groups.", ge=0)
    lr_groups: dict[str, Schedule] = option(
        {}, "Learning rates of individual parameter groups, e.g. {geometry.encoding: 0.01, background: 0.001}.", ge=0
    )
    betas: tuple[float, float] = option(
        (0.9, 0.99), "Decay rates of the first and second moment estimates.", ge=0, lt=1
    )
    eps: float = option(
        1e-15,
        "Constant added to the square root of the second moment; small because hash-grid gradients are small.",
        gt=0,
    )
    weight_decay: float = option(0.0, "Decoupled weight decay (adamw only).", ge=0)

    def __post_init__(self) -> None:
        """Convert plain numbers to schedules, even if the values have not been validated."""
        self.lr = Schedule.parse(self.lr)
        self.lr_groups = {name: Schedule.parse(value) for name, value in self.lr_groups.items()}

    def validate(self) -> list[str]:
        """Check that weight decay is set only for an optimizer that supports it."""
        if self.name != "adamw" and self.weight_decay > 0:
            return [f"weight_decay: {self.weight_decay} has no effect with name={self.name}; use name=adamw"]
        return []

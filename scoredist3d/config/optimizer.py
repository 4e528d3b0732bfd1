"""Configuration of the optimizer that every system has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from scoredist3d.config.fields import option
from scoredist3d.config.schedule import Schedule


@dataclass
class OptimizerConfig:
    """One optimizer over all parameter groups of a system."""

    name: Literal["adam", "adamw", "sgd"] = option(
        "adam",
        "adamw adds decoupled weight decay to adam; sgd is plain gradient descent, with which several methods follow "
        "the sampler exactly.",
    )
    lr: Schedule = option(0.01, "Learning rate of the groups that lr_groups does not name.", ge=0)
    lr_groups: dict[str, Schedule] = option(
        {}, "Learning rates of single groups, e.g. {geometry.encoding: 0.01, background: 0.001}.", ge=0
    )
    betas: tuple[float, float] = option((0.9, 0.99), "Decay rates of the two moments.", ge=0, lt=1)
    eps: float = option(
        1e-15, "Added to the root of the second moment; small because hash-grid gradients are small.", gt=0
    )
    weight_decay: float = option(0.0, "Decoupled weight decay (adamw only).", ge=0)

    def __post_init__(self) -> None:
        """Turn plain numbers into schedules, also where no validator has run."""
        self.lr = Schedule.parse(self.lr)
        self.lr_groups = {name: Schedule.parse(value) for name, value in self.lr_groups.items()}

    def validate(self) -> list[str]:
        """Problems: weight decay with an optimizer that has none."""
        if self.name != "adamw" and self.weight_decay > 0:
            return [f"weight_decay: {self.weight_decay} has no effect with name={self.name}; use name=adamw"]
        return []

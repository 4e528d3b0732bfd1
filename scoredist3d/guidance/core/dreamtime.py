"""DreamTime: a timestep that decreases with the step at a rate set by a weight function (arXiv 2306.12422)."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from scoredist3d.config import FieldError, option
from scoredist3d.diffusion.schedule import NoiseSchedule


@dataclass
class DreamTimeConfig:
    """Options of DreamTime, which replaces random timesteps with one that decreases from t_max to t_min."""

    steps: int = option(
        0, "Steps over which the timestep decreases from t_max to t_min; 0 draws random timesteps instead.", ge=0
    )
    kind: Literal["plateau", "snr", "uniform"] = option(
        "plateau",
        "Weight W(t), proportional to the number of steps spent at timestep t. plateau: 1 between m2 and m1, with "
        "Gaussian tails of widths s1 (above) and s2 (below); snr: sigma/alpha exp(-(t - m)^2 / 2 s^2); uniform: 1, "
        "which gives a linear decrease.",
    )
    m1: float = option(0.8, "Timestep at the upper end of the plateau.", ge=0, le=1)
    m2: float = option(0.5, "Timestep at the lower end of the plateau.", ge=0, le=1)
    s1: float = option(0.3, "Standard deviation of the tail above the plateau.", gt=0)
    s2: float = option(0.1, "Standard deviation of the tail below the plateau.", gt=0)
    m: float = option(0.5, "Timestep at the center of the weights for kind=snr.", ge=0, le=1)
    s: float = option(0.125, "Standard deviation of the weights for kind=snr.", gt=0)

    def validate(self) -> list[str]:
        """Require m2 <= m1."""
        return [f"m2: {self.m2:g} is above m1 {self.m1:g}; lower m2 or raise m1"] if self.m2 > self.m1 else []


class DreamTime:
    """Timestep as a function of the step: t(i) = argmin_t' | sum_{t >= t'} p(t) - i / N |, p(t) = W(t) / sum W.

    The sums run over the prior's timesteps in a range. t(i) starts at the noisiest timestep, never increases, and stays
    at the lowest timestep after N steps.
    """

    def __init__(self, config: DreamTimeConfig, schedule: NoiseSchedule, low: float, high: float) -> None:
        """Compute p over a range of timesteps.

        Args:
            config: Number of steps N and weight function W.
            schedule: Noise schedule of the prior.
            low, high: Ends of the range, both included.

        Raises:
            ValueError: The range contains no timestep, or the weights in it sum to zero or infinity.
        """
        timesteps = self.timesteps_between(schedule, low, high)
        if not len(timesteps):
            raise FieldError(f"no timestep lies between t_min {low:g} and t_max {high:g}; widen the range", "dreamtime")
        weights = time_prior(config, schedule, timesteps)
        total = float(weights.sum())
        if not 0.0 < total < float("inf"):
            raise FieldError(
                f"the weights of {config.kind} sum to {total:g} between {low:g} and {high:g}; lower t_max below the "
                "timestep at which the noisy input has no signal, or increase s, s1 and s2",
                "dreamtime.kind",
            )
        self._steps = config.steps
        self._timesteps: list[float] = timesteps.flip(0).tolist()
        self._above: list[float] = (weights.flip(0).cumsum(0) / total).tolist()

    @staticmethod
    def timesteps_between(schedule: NoiseSchedule, low: float, high: float) -> Tensor:
        """Timesteps (K,) of the schedule from ``low`` to ``high``, float64 and ascending."""
        count = schedule.num_train_timesteps
        grid = schedule.quantize(torch.linspace(0.0, 1.0, count + 1, dtype=torch.float64)).unique()
        ends = schedule.quantize(torch.tensor([low, high], dtype=torch.float64))
        return grid[(grid >= ends[0]) & (grid <= ends[1])]

    def __call__(self, step: int) -> float:
        """Timestep t(i) at step i."""
        progress = min(step / self._steps, 1.0)
        after = min(bisect_left(self._above, progress), len(self._above) - 1)
        before = max(after - 1, 0)
        nearer_before = progress - self._above[before] <= self._above[after] - progress
        return self._timesteps[before if nearer_before else after]


def time_prior(config: DreamTimeConfig, schedule: NoiseSchedule, t: Tensor) -> Tensor:
    """Unnormalized weights W(t) (K,) of :class:`DreamTimeConfig`."""
    if config.kind == "uniform":
        return torch.ones_like(t)
    if config.kind == "snr":
        return schedule.lambda_(t) * _bell(t - config.m, config.s)
    return _bell((t - config.m1).clamp_min(0.0), config.s1) * _bell((config.m2 - t).clamp_min(0.0), config.s2)


def _bell(x: Tensor, width: float) -> Tensor:
    return torch.exp(-x.square() / (2.0 * width**2))

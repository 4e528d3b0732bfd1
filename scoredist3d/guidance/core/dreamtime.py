"""DreamTime: timesteps that fall with the step as fast as a prior over timesteps says (arXiv 2306.12422)."""

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
    """One timestep per step, falling from t_max to t_min, in place of random ones; off with 0 steps."""

    steps: int = option(
        0, "Steps in which the timestep falls from t_max to t_min; 0 draws random timesteps instead.", ge=0
    )
    kind: Literal["plateau", "snr", "uniform"] = option(
        "plateau",
        "Share W(t) of the steps that a timestep gets: plateau 1 between m2 and m1 with Gaussian tails of widths s1 "
        "(above) and s2 (below); snr sigma/alpha exp(-(t - m)^2 / 2 s^2); uniform 1, a linear fall.",
    )
    m1: float = option(0.8, "Upper end of the plateau.", ge=0, le=1)
    m2: float = option(0.5, "Lower end of the plateau.", ge=0, le=1)
    s1: float = option(0.3, "Width of the tail above the plateau.", gt=0)
    s2: float = option(0.1, "Width of the tail below the plateau.", gt=0)
    m: float = option(0.5, "Centre of the kind snr.", ge=0, le=1)
    s: float = option(0.125, "Width of the kind snr.", gt=0)

    def validate(self) -> list[str]:
        """A plateau has two ends."""
        return [f"m2: {self.m2:g} must not exceed m1, which is {self.m1:g}"] if self.m2 > self.m1 else []


class DreamTime:
    """t(i) = argmin_t' | sum_{t >= t'} p(t) - i / N |, p(t) = W(t) / sum W over the model's timesteps in a range.

    Starts at the noisiest timestep, never rises, and stays at the lowest one after N steps. A function of the step alone.
    """

    def __init__(self, config: DreamTimeConfig, schedule: NoiseSchedule, low: float, high: float) -> None:
        """Args:
        config: N (``steps``) and W.
        schedule: Gives the timesteps.
        low, high: The range of timesteps, ends included.

        Raises:
            ValueError: The range is empty, or W is infinite or zero in all of it.
        """
        timesteps = self.timesteps_between(schedule, low, high)
        if not len(timesteps):
            raise FieldError(f"there is no timestep between t_min {low:g} and t_max {high:g}", "dreamtime")
        weights = time_prior(config, schedule, timesteps)
        total = float(weights.sum())
        if not 0.0 < total < float("inf"):
            raise FieldError(
                f"the weights of {config.kind} for the timesteps from {low:g} to {high:g} sum to {total:g}; "
                "lower t_max below the timestep without signal, or widen the widths",
                "dreamtime.kind",
            )
        self._steps = config.steps
        self._timesteps: list[float] = timesteps.flip(0).tolist()
        self._above: list[float] = (weights.flip(0).cumsum(0) / total).tolist()

    @staticmethod
    def timesteps_between(schedule: NoiseSchedule, low: float, high: float) -> Tensor:
        """(K,) float64, the model's timesteps from ``low`` to ``high``, rising."""
        count = schedule.num_train_timesteps
        grid = schedule.quantize(torch.linspace(0.0, 1.0, count + 1, dtype=torch.float64)).unique()
        ends = schedule.quantize(torch.tensor([low, high], dtype=torch.float64))
        return grid[(grid >= ends[0]) & (grid <= ends[1])]

    def __call__(self, step: int) -> float:
        """The timestep of a step."""
        progress = min(step / self._steps, 1.0)
        after = min(bisect_left(self._above, progress), len(self._above) - 1)
        before = max(after - 1, 0)
        nearer_before = progress - self._above[before] <= self._above[after] - progress
        return self._timesteps[before if nearer_before else after]


def time_prior(config: DreamTimeConfig, schedule: NoiseSchedule, t: Tensor) -> Tensor:
    """(K,), W(t) of :class:`DreamTimeConfig`, not normalised."""
    if config.kind == "uniform":
        return torch.ones_like(t)
    if config.kind == "snr":
        return schedule.lambda_(t) * _bell(t - config.m, config.s)
    return _bell((t - config.m1).clamp_min(0.0), config.s1) * _bell((config.m2 - t).clamp_min(0.0), config.s2)


def _bell(x: Tensor, width: float) -> Tensor:
    return torch.exp(-x.square() / (2.0 * width**2))

"""Steps along the probability-flow ODE, for methods that sample or invert a trajectory inside a distillation step."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from scoredist3d.diffusion.cfg import guided_prediction
from scoredist3d.diffusion.prediction import Prediction
from scoredist3d.diffusion.schedule import CLEAN, NoiseSchedule
from scoredist3d.guidance.core.base import Guidance
from scoredist3d.guidance.core.timesteps import timestep_tensor
from scoredist3d.guidance.core.weighting import finite_weight
from scoredist3d.priors.conditioning import CFGConditions, Conditioning
from scoredist3d.seeding import Rng


@dataclass(frozen=True)
class Grid:
    """Timesteps of a schedule as integers k with t = k / N, for exact arithmetic on a grid.

    Attributes:
        lowest: Index of the least noisy timestep: 0 for a VP chain, 1 for a flow.
        highest: Index of the noisiest timestep with signal, where a noise prediction still determines the image: N - 1,
            or N - 2 for a chain whose last timestep is pure noise.
        count: Number of timesteps N.
    """

    lowest: int
    highest: int
    count: int

    @classmethod
    def of(cls, schedule: NoiseSchedule) -> Grid:
        """Grid of a schedule's timesteps."""
        count = schedule.num_train_timesteps
        ends = schedule.quantize(torch.tensor([0.0, 1.0], dtype=torch.float64))
        lowest, highest = (round(end) for end in (ends * count).tolist())
        return cls(lowest, highest - (schedule.alpha(ends)[1].item() == 0.0), count)

    def index(self, timestep: float) -> int:
        """Index k of a quantized timestep."""
        return round(timestep * self.count)

    def timestep(self, index: int) -> float:
        """Timestep t of an index, which is clamped to the ends of the grid."""
        return min(max(index, self.lowest), self.highest) / self.count


class TrajectoryGuidance(Guidance):
    """Base class of methods that follow the probability-flow ODE between timesteps within a step.

    All items of a batch share one timestep, drawn once per step as in the released code of these methods. The batch is
    therefore solved jointly, with the same number of network evaluations for every image.
    """

    @property
    def grid(self) -> Grid:
        """Grid of the prior's timesteps."""
        return Grid.of(self.schedule)

    def sample_timesteps(self, batch: int, step: int, rng: Rng) -> list[float]:
        """One quantized draw from [t_min(step), t_max(step)] for the whole batch."""
        return super().sample_timesteps(1, step, rng) * batch

    def predict_at(
        self, x: Tensor, timestep: float, conditions: CFGConditions, scale: float, *, rescale: float = 0.0
    ) -> Prediction:
        """Guided prediction for states (B, C, h, w) at one timestep; clean states use the lowest timestep."""
        timestep = self.grid.timestep(self.grid.index(timestep)) if timestep == CLEAN else timestep
        return guided_prediction(self.prior, x, _times(timestep, x), conditions, scale, rescale=rescale)

    def move(self, prediction: Prediction, start: float, stop: float) -> Tensor:
        """DDIM step from ``start`` to ``stop``, up or down in noise; a clean state (start < 0) is its own x_0."""
        x0 = prediction.x_t if start < 0 else prediction.x0
        return self.schedule.ddim_step(prediction.eps, x0, _times(start, x0), _times(stop, x0))

    def walk(
        self, x: Tensor, timesteps: list[float], conditions: CFGConditions, scale: float, *, rescale: float = 0.0
    ) -> Tensor:
        """Solve the ODE along ``timesteps``: increasing timesteps invert an image, decreasing ones sample it."""
        for start, stop in pairwise(timesteps):
            x = self.move(self.predict_at(x, start, conditions, scale, rescale=rescale), start, stop)
        return x

    def weight_at(self, timestep: float) -> float:
        """Weight w(t) of the configured weighting at one timestep.

        Raises:
            ValueError: The weight is infinite because the noisy input has no signal.
        """
        return finite_weight(self.config.weighting, self.schedule, timestep)


def conditioning_tensors(conditions: CFGConditions) -> list[Tensor]:
    """All tensors that condition a guided prediction, including the Perp-Neg weights."""

    def parts(conditioning: Conditioning) -> list[Tensor]:
        fields = (conditioning.text, conditioning.camera, conditioning.pooled)
        return [part for part in fields if part is not None]

    tensors = [*parts(conditions.positive), *parts(conditions.unconditional)]
    for conditioning, weights in conditions.negatives:
        tensors += [*parts(conditioning), weights]
    return tensors


def same_conditioning(before: list[Tensor], now: list[Tensor]) -> bool:
    """Whether two lists of conditioning tensors are equal; waits for the device only if they do not share memory."""
    if [part.shape for part in before] != [part.shape for part in now]:
        return False
    pairs = [pair for pair in zip(before, now, strict=True) if not _same_memory(*pair)]
    return not pairs or bool(torch.stack([(a == b).all() for a, b in pairs]).all())


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.stride() == b.stride()


def _times(timestep: float, like: Tensor) -> Tensor:
    return timestep_tensor([timestep] * len(like), like)

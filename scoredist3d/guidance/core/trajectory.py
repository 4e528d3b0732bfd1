"""Walking the probability-flow ODE inside of a distillation step, for methods that follow or invert a trajectory."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from scoredist3d.config import FieldError
from scoredist3d.diffusion.schedule import CLEAN, NoiseSchedule
from scoredist3d.guidance.core.base import WEIGHTINGS, Guidance
from scoredist3d.guidance.core.context import timestep_tensor
from scoredist3d.priors.base import CFGConditions, Conditioning, Prediction, guided_prediction
from scoredist3d.seeding import Rng


@dataclass(frozen=True)
class Grid:
    """The timesteps of a schedule as whole numbers k of t = k / N, so that a grid can be counted without rounding.

    Attributes:
        lowest: The least noisy timestep: 0 of a VP chain, 1 of a flow.
        highest: The noisiest timestep that holds some image, where an eps-prediction still says something: N - 1 of both,
            and one less of a chain whose last timestep is pure noise.
        count: N.
    """

    lowest: int
    highest: int
    count: int

    @classmethod
    def of(cls, schedule: NoiseSchedule) -> Grid:
        """The timesteps of a schedule."""
        count = schedule.num_train_timesteps
        ends = schedule.quantize(torch.tensor([0.0, 1.0], dtype=torch.float64))
        lowest, highest = (round(end) for end in (ends * count).tolist())
        return cls(lowest, highest - (schedule.alpha(ends)[1].item() == 0.0), count)

    def index(self, timestep: float) -> int:
        """k of a quantized timestep."""
        return round(timestep * self.count)

    def timestep(self, index: int) -> float:
        """t of an index, held within the schedule's ends."""
        return min(max(index, self.lowest), self.highest) / self.count


class TrajectoryGuidance(Guidance):
    """A method whose steps walk the probability-flow ODE from timestep to timestep.

    All items of a batch share one timestep, drawn once per step as in the released code of these methods, so the batch
    walks as one and an image costs the same number of network rows as any other.
    """

    @property
    def grid(self) -> Grid:
        """The prior's timesteps."""
        return Grid.of(self.schedule)

    def sample_timesteps(self, batch: int, step: int, rng: Rng) -> list[float]:
        """One draw from [t_min(step), t_max(step)] for the whole batch, quantized."""
        return super().sample_timesteps(1, step, rng) * batch

    def predict_at(
        self, x: Tensor, timestep: float, conditions: CFGConditions, scale: float, *, rescale: float = 0.0
    ) -> Prediction:
        """The guided prediction for (B, C, h, w) states at one timestep; clean ones are told as the lowest timestep."""
        timestep = self.grid.timestep(self.grid.index(timestep)) if timestep == CLEAN else timestep
        return guided_prediction(self.prior, x, _times(timestep, x), conditions, scale, rescale=rescale)

    def move(self, prediction: Prediction, start: float, stop: float) -> Tensor:
        """The deterministic step start -> stop, up or down; from the clean image (start < 0) it is the x_0."""
        x0 = prediction.x_t if start < 0 else prediction.x0
        return self.schedule.ddim_step(prediction.eps, x0, _times(start, x0), _times(stop, x0))

    def walk(
        self, x: Tensor, timesteps: list[float], conditions: CFGConditions, scale: float, *, rescale: float = 0.0
    ) -> Tensor:
        """Follow the ODE from ``timesteps[0]`` to ``timesteps[-1]``: rising timesteps invert, falling ones sample."""
        for start, stop in pairwise(timesteps):
            x = self.move(self.predict_at(x, start, conditions, scale, rescale=rescale), start, stop)
        return x

    def weight_at(self, timestep: float) -> float:
        """w(t) of the configured weighting.

        Raises:
            ValueError: It is infinite: the timestep holds no image.
        """
        # On the CPU, whose tables cost no wait for the device.
        alpha, sigma = self.schedule.coefficients(torch.tensor([timestep], dtype=torch.float64))
        weight = WEIGHTINGS[self.config.weighting](alpha, sigma).item()
        if weight == float("inf"):
            raise FieldError(
                f"{self.config.weighting} is infinite at t = {timestep:g}, where this prior's timesteps "
                "hold no image; lower guidance.t_max or use the weighting uniform",
                "weighting",
            )
        return weight


def told(conditions: CFGConditions) -> list[Tensor]:
    """Every tensor that the network is told through the guided conditions, and Perp-Neg's weights."""

    def parts(conditioning: Conditioning) -> list[Tensor]:
        fields = (conditioning.text, conditioning.camera, conditioning.pooled)
        return [part for part in fields if part is not None]

    tensors = [*parts(conditions.positive), *parts(conditions.unconditional)]
    for conditioning, weights in conditions.negatives:
        tensors += [*parts(conditioning), weights]
    return tensors


def told_the_same(before: list[Tensor], now: list[Tensor]) -> bool:
    """Whether two conditionings agree; waits for the device only where they are not views of the same memory."""
    if [part.shape for part in before] != [part.shape for part in now]:
        return False
    pairs = [pair for pair in zip(before, now, strict=True) if not _same_memory(*pair)]
    return not pairs or bool(torch.stack([(a == b).all() for a, b in pairs]).all())


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.stride() == b.stride()


def _times(timestep: float, like: Tensor) -> Tensor:
    return timestep_tensor([timestep] * len(like), like)

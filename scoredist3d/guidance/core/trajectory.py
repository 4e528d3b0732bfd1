"""Walking the probability-flow ODE inside of a distillation step, for methods that follow or invert a trajectory."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from scoredist3d.diffusion.schedule import CLEAN, NoiseSchedule
from scoredist3d.guidance.core.base import WEIGHTINGS, Guidance
from scoredist3d.guidance.core.step import level_tensor
from scoredist3d.priors.base import Branches, Conditioning, Prediction, guided_prediction
from scoredist3d.seeding import Rng


@dataclass(frozen=True)
class Grid:
    """The levels of a schedule as whole numbers k of t = k / N, so that a grid can be counted without rounding.

    Attributes:
        lowest: The least noisy level: 0 of a VP chain, 1 of a flow.
        highest: The noisiest level that holds some image, where an eps-prediction still says something: N - 1 of both,
            and one less of a chain whose last level is pure noise.
        count: N.
    """

    lowest: int
    highest: int
    count: int

    @classmethod
    def of(cls, schedule: NoiseSchedule) -> Grid:
        """The levels of a schedule."""
        count = schedule.num_train_timesteps
        ends = schedule.snap(torch.tensor([0.0, 1.0], dtype=torch.float64))
        lowest, highest = (round(end) for end in (ends * count).tolist())
        return cls(lowest, highest - (schedule.alpha(ends)[1].item() == 0.0), count)

    def index(self, level: float) -> int:
        """k of a snapped level."""
        return round(level * self.count)

    def level(self, index: int) -> float:
        """t of an index, held within the schedule's ends."""
        return min(max(index, self.lowest), self.highest) / self.count


class TrajectoryGuidance(Guidance):
    """A method whose steps walk the probability-flow ODE from level to level.

    All items of a batch share one level, drawn once per step as in the released code of these methods, so the batch
    walks as one and an image costs the same number of network rows as any other.
    """

    @property
    def grid(self) -> Grid:
        """The prior's levels."""
        return Grid.of(self.schedule)

    def sample_levels(self, batch: int, step: int, rng: Rng) -> list[float]:
        """One draw from [t_min(step), t_max(step)] for the whole batch, snapped."""
        return super().sample_levels(1, step, rng) * batch

    def predict_at(
        self, x: Tensor, level: float, branches: Branches, scale: float, *, rescale: float = 0.0
    ) -> Prediction:
        """The guided prediction for (B, C, h, w) states at one level; clean ones are told as the lowest level."""
        level = self.grid.level(self.grid.index(level)) if level == CLEAN else level
        return guided_prediction(self.prior, x, _times(level, x), branches, scale, rescale=rescale)

    def move(self, prediction: Prediction, start: float, stop: float) -> Tensor:
        """The deterministic step start -> stop, up or down; from the clean image (start < 0) it is the x_0."""
        x0 = prediction.x_t if start < 0 else prediction.x0
        return self.schedule.ddim_step(prediction.eps, x0, _times(start, x0), _times(stop, x0))

    def walk(self, x: Tensor, levels: list[float], branches: Branches, scale: float, *, rescale: float = 0.0) -> Tensor:
        """Follow the ODE from ``levels[0]`` to ``levels[-1]``: rising levels invert, falling ones sample."""
        for start, stop in pairwise(levels):
            x = self.move(self.predict_at(x, start, branches, scale, rescale=rescale), start, stop)
        return x

    def weight_at(self, level: float) -> float:
        """w(t) of the configured weighting.

        Raises:
            ValueError: It is infinite: the level holds no image.
        """
        # On the CPU, whose tables cost no wait for the device.
        alpha, sigma = self.schedule.coefficients(torch.tensor([level], dtype=torch.float64))
        weight = WEIGHTINGS[self.config.weighting](alpha, sigma).item()
        if weight == float("inf"):
            raise ValueError(
                f"guidance.weighting: {self.config.weighting} is infinite at t = {level:g}, where this prior's levels "
                "hold no image; lower guidance.t_max or use the weighting uniform"
            )
        return weight


def told(branches: Branches) -> list[Tensor]:
    """Every tensor that the network is told through the guided branches, and Perp-Neg's weights."""

    def parts(conditioning: Conditioning) -> list[Tensor]:
        fields = (conditioning.text, conditioning.camera, conditioning.pooled)
        return [part for part in fields if part is not None]

    tensors = [*parts(branches.positive), *parts(branches.unconditional)]
    for conditioning, weights in branches.negatives:
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


def _times(level: float, like: Tensor) -> Tensor:
    return level_tensor([level] * len(like), like)

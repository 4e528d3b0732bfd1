"""The output of a denoiser, convertible between noise, clean image and velocity."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from scoredist3d.diffusion.schedule import NoiseSchedule, PredictionType


@dataclass(frozen=True)
class Prediction:
    """One denoiser output; the equivalent noise, clean image and velocity are computed on first access.

    Attributes:
        output: (B, C, h, w), the network's output.
        kind: Parametrization of ``output``.
        x_t: (B, C, h, w), the network's input.
        t: (B,), the timestep of ``x_t``, in [0, 1].
        schedule: Noise schedule that relates the parametrizations.
    """

    output: Tensor
    kind: PredictionType
    x_t: Tensor
    t: Tensor
    schedule: NoiseSchedule

    @cached_property
    def eps(self) -> Tensor:
        """(B, C, h, w), the predicted noise in ``x_t``."""
        return self.schedule.to_eps(self.output, self.x_t, self.t, self.kind)

    @cached_property
    def x0(self) -> Tensor:
        """(B, C, h, w), the predicted clean image."""
        return self.schedule.to_x0(self.output, self.x_t, self.t, self.kind)

    @cached_property
    def v(self) -> Tensor:
        """(B, C, h, w), the predicted velocity, in the convention of the schedule's family."""
        return self.schedule.to_v(self.output, self.x_t, self.t, self.kind)

    def with_output(self, output: Tensor, kind: PredictionType | None = None) -> Prediction:
        """A prediction at the same (x_t, t) with another output; ``kind`` defaults to this prediction's."""
        return Prediction(output, kind or self.kind, self.x_t, self.t, self.schedule)

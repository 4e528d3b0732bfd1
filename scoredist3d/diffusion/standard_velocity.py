"""Noise schedule with another velocity convention."""

from __future__ import annotations

from torch import Tensor

from scoredist3d.diffusion.schedule import NoiseSchedule


class StandardVelocity(NoiseSchedule):
    """A schedule with the velocity v = (alpha eps - sigma x_0) / (alpha^2 + sigma^2) in place of its own.

    On variance-preserving chains it is the usual velocity. On every schedule, v = 0 is the exact prediction for
    standard normal latents.
    """

    def __init__(self, schedule: NoiseSchedule) -> None:
        """Args:
        schedule: Schedule that defines the coefficients and timesteps.
        """
        self._schedule = schedule
        self.prediction_type = "v_prediction"
        self.num_train_timesteps = schedule.num_train_timesteps

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma) of the underlying schedule."""
        return self._schedule.coefficients(t)

    def velocity_coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma) / (alpha^2 + sigma^2)."""
        alpha, sigma = self.coefficients(t)
        power = alpha.square() + sigma.square()
        return alpha / power, sigma / power

    def quantize(self, t: Tensor) -> Tensor:
        """The nearest timestep of the underlying schedule."""
        return self._schedule.quantize(t)

    def model_timestep(self, t: Tensor) -> Tensor:
        """The network's timestep input in the underlying schedule."""
        return self._schedule.model_timestep(t)

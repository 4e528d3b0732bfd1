"""Weights over timesteps, written for noise differences, for regression to a predicted image, and for one ODE step.

For x_t = alpha z + sigma eps the three forms of a weighted difference are equal:

    w (eps_hat - eps)  =  w alpha / sigma (z - x0_hat)  =  w alpha (v_hat - v),    with v the schedule's velocity

Each function uses the form that stays finite where alpha or sigma is 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from scoredist3d.config import FieldError
from scoredist3d.diffusion.prediction import Prediction
from scoredist3d.diffusion.schedule import NoiseSchedule, per_item

Weighting = Literal["sds", "uniform", "fantasia3d", "lambda", "flow"]

WEIGHTINGS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sds": lambda alpha, sigma: sigma.square(),
    "uniform": lambda alpha, sigma: torch.ones_like(sigma),
    "fantasia3d": lambda alpha, sigma: alpha * sigma.square(),
    "lambda": lambda alpha, sigma: sigma / alpha,
    "flow": lambda alpha, sigma: 1.0 / alpha,
}
"""Functions w(alpha, sigma): the weight of a difference of noise predictions."""


def time_weight(weighting: Weighting, schedule: NoiseSchedule, t: Tensor) -> Tensor:
    """Weight w (B,) at the timesteps ``t`` (B,); infinite for ``lambda`` and ``flow`` where alpha is 0."""
    return WEIGHTINGS[weighting](*schedule.coefficients(t))


def finite_weight(weighting: Weighting, schedule: NoiseSchedule, timestep: float) -> float:
    """Weight w at one timestep, computed in float64 on the CPU to avoid waiting for the device.

    Raises:
        ValueError: w is infinite because alpha is 0.
    """
    weight = time_weight(weighting, schedule, torch.tensor([timestep], dtype=torch.float64)).item()
    if weight == float("inf"):
        raise FieldError(
            f"{weighting} is infinite at t = {timestep:g}, where the noisy input of this prior contains no signal; "
            "lower guidance.t_max or use weighting: uniform",
            "weighting",
        )
    return weight


def weighted_difference(
    weighting: Weighting, schedule: NoiseSchedule, prediction: Prediction, z: Tensor, eps: Tensor
) -> Tensor:
    """Weighted noise difference w(t) (eps_hat - eps) for x_t = alpha z + sigma eps.

    ``lambda`` is computed as z - x0_hat and ``flow`` as v_hat - v; both forms are finite where alpha is 0.
    """
    if weighting == "lambda":
        return z - prediction.x0
    if weighting == "flow":
        return prediction.v - schedule.velocity(z, eps, prediction.t)
    return per_item(time_weight(weighting, schedule, prediction.t), z) * (prediction.eps - eps)


def regression_weight(weighting: Weighting, schedule: NoiseSchedule, t: Tensor) -> Tensor:
    """Weight c(t) (B,) with c (z - x0_hat) = w(t) (eps_hat - eps): c = w alpha / sigma, finite where alpha is 0."""
    alpha, sigma = schedule.coefficients(t)
    return {
        "sds": alpha * sigma,
        "uniform": alpha / sigma,
        "fantasia3d": alpha.square() * sigma,
        "lambda": torch.ones_like(alpha),
        "flow": 1.0 / sigma,
    }[weighting]


def ode_step_weight(schedule: NoiseSchedule, t: Tensor, s: Tensor) -> Tensor:
    """Regression weight 1 - lambda_s / lambda_t of the ODE step t -> s, with lambda = sigma / alpha.

    (lambda_t - lambda_s) (eps_hat - eps) = (1 - lambda_s / lambda_t) (z - x0_hat); finite where alpha_t is 0.
    """
    alpha_t, sigma_t = schedule.coefficients(t)
    alpha_s, sigma_s = schedule.coefficients(s)
    return 1.0 - (sigma_s * alpha_t) / (alpha_s * sigma_t)

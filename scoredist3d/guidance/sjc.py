"""Score Jacobian Chaining."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from scoredist3d.config import FieldError, Schedule, option
from scoredist3d.diffusion.schedule import per_item
from scoredist3d.guidance.core.base import Guidance, Score, Weighting
from scoredist3d.guidance.core.context import StepContext
from scoredist3d.priors.base import CFGConditions, Prior
from scoredist3d.registry import register
from scoredist3d.seeding import Rng


@register("guidance", "sjc", summary="Chain the denoiser's score through the render.", arxiv="2212.00774")
class ScoreJacobianChaining(Guidance):
    """The score of the perturbed render, averaged over noise, in the variance-exploding coordinates of the paper.

    There y = z + lambda_t n, lambda = sigma / alpha, the denoiser is D(y) = y - lambda_t eps_hat(alpha_t y, t) and
    minus the score is (y - D) / lambda_t. Its perturb-and-average estimate (eq. 15) is

        G = -(D - y) / lambda_t = eps_hat          and, with less variance and the same mean (eq. 16),
        G = -(D - z) / lambda_t = eps_hat - n,     which is SDS with w = 1.

    alpha_t y is x_t, so the same network is asked the same question as in SDS. The paper's emptiness and depth losses
    belong to its voxel scene, not to the guidance.
    """

    @dataclass
    class Config(Guidance.Config):
        """Options of SJC."""

        guidance_scale: Schedule = option(100.0, "gamma of eps_u + gamma (eps_c - eps_u).")
        t_min: Schedule = option(0.01, "Lowest timestep; the paper leaves out the 10 lowest of 1000.", ge=0, le=1)
        t_max: Schedule = option(0.969, "Highest timestep; the paper leaves out the 30 highest.", ge=0, le=1)
        weighting: Weighting = option(
            "uniform",
            "w(t) before G: uniform 1 (the paper's), sds sigma^2, fantasia3d alpha sigma^2, lambda sigma/alpha, "
            "flow 1/alpha.",
        )
        variance_reduction: bool = option(True, "Subtract the noise that was added (eq. 16); off is eq. 15.")

    config: Config

    def __init__(self, config: Config, *, prior: Prior, rng: Rng | None = None) -> None:
        super().__init__(config, prior=prior, rng=rng)
        if not config.variance_reduction and config.weighting in ("lambda", "flow"):
            highest = self.schedule.quantize(torch.tensor([max(config.t_max.values)], dtype=torch.float64))
            if float(self.schedule.alpha(highest)) == 0.0:
                raise FieldError(
                    f"{config.weighting} is infinite at t_max {float(highest):g}, where the prior sees only noise; "
                    "lower t_max or set variance_reduction=true",
                    "weighting",
                )

    def score_gradient(self, z: Tensor, conditions: CFGConditions, ctx: StepContext) -> Score:
        """w(t) (eps_hat - n), or w(t) eps_hat."""
        x_t, n = self.noised(z, ctx)
        prediction = self.guided(x_t, conditions, ctx)
        if self.config.variance_reduction:
            return Score(self.weighted(prediction, z, n))
        return Score(per_item(self.time_weight(ctx.t), z) * prediction.eps)

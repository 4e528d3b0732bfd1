"""Score Jacobian chaining."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from scoredist3d.config import FieldError, Schedule, option
from scoredist3d.diffusion.schedule import per_item
from scoredist3d.guidance.core.base import Guidance
from scoredist3d.guidance.core.context import StepContext
from scoredist3d.guidance.core.outputs import Score
from scoredist3d.guidance.core.weighting import Weighting
from scoredist3d.priors.base import Prior
from scoredist3d.priors.conditioning import CFGConditions
from scoredist3d.registry import register
from scoredist3d.seeding import Rng


@register(
    "guidance",
    "sjc",
    summary="Chain the score of the noised render with the Jacobian of the renderer.",
    arxiv="2212.00774",
)
class ScoreJacobianChaining(Guidance):
    """SJC: the score of the noised render averaged over noise, in the paper's variance-exploding coordinates.

    With y = z + lambda_t n and lambda = sigma / alpha, the denoiser is D(y) = y - lambda_t eps_hat(alpha_t y, t), and
    the negative score is (y - D) / lambda_t. Its perturb-and-average estimate (eq. 15) is

        G = -(D - y) / lambda_t = eps_hat          and, with less variance and the same mean (eq. 16),
        G = -(D - z) / lambda_t = eps_hat - n,     which is SDS with w = 1.

    alpha_t y equals x_t, so the input of the network is the same as in SDS. The emptiness and depth losses of the paper
    belong to its voxel scene, not to the guidance.
    """

    @dataclass
    class Config(Guidance.Config):
        """Options of SJC."""

        guidance_scale: Schedule = option(100.0, "Guidance scale gamma in eps_u + gamma (eps_c - eps_u).")
        t_min: Schedule = option(
            0.01,
            "Lowest timestep, as a fraction of the prior's range; the paper omits the 10 lowest of 1000.",
            ge=0,
            le=1,
        )
        t_max: Schedule = option(
            0.969,
            "Highest timestep, as a fraction of the prior's range; the paper omits the 30 highest of 1000.",
            ge=0,
            le=1,
        )
        weighting: Weighting = option(
            "uniform",
            "Weight w(t) of G. uniform: 1, as in the paper; sds: sigma^2; fantasia3d: alpha sigma^2; lambda: "
            "sigma/alpha; flow: 1/alpha.",
        )
        variance_reduction: bool = option(True, "Subtract the added noise (eq. 16); if false, use eq. 15.")

    config: Config

    def __init__(self, config: Config, *, prior: Prior, rng: Rng | None = None) -> None:
        """Create the method; for the arguments see :class:`Guidance`.

        Raises:
            ValueError: Without variance reduction the weight is infinite at ``t_max``.
        """
        super().__init__(config, prior=prior, rng=rng)
        if not config.variance_reduction and config.weighting in ("lambda", "flow"):
            highest = self.schedule.quantize(torch.tensor([max(config.t_max.values)], dtype=torch.float64))
            if float(self.schedule.alpha(highest)) == 0.0:
                raise FieldError(
                    f"{config.weighting} is infinite at t_max {float(highest):g}, where the noisy input has no signal; "
                    "lower guidance.t_max or set guidance.variance_reduction: true",
                    "weighting",
                )

    def score_gradient(self, z: Tensor, conditions: CFGConditions, ctx: StepContext) -> Score:
        """Gradient w(t) (eps_hat - n), or w(t) eps_hat without variance reduction."""
        x_t, n = self.noised(z, ctx)
        prediction = self.guided(x_t, conditions, ctx)
        if self.config.variance_reduction:
            return Score(self.weighted(prediction, z, n))
        return Score(per_item(self.time_weight(ctx.t), z) * prediction.eps)

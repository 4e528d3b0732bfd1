"""Score Distillation Sampling."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from scoredist3d.config import Schedule, option
from scoredist3d.guidance.core.base import Guidance, Score
from scoredist3d.guidance.core.context import StepContext
from scoredist3d.guidance.core.image_space import regression_weight, with_image_term
from scoredist3d.priors.conditioning import CFGConditions
from scoredist3d.registry import register


@register("guidance", "sds", summary="Follow the denoiser's error on a freshly noised render.", arxiv="2209.14988")
class ScoreDistillationSampling(Guidance):
    """G = w(t) (eps_hat(alpha_t z + sigma_t eps, t, y) - eps), eps ~ N(0, I) drawn anew at every step (DreamFusion, eq.
    3).

    Minimises a weighted sum over timesteps of KL(N(alpha_t z, sigma_t^2) || p_t(. | y)), and so seeks modes.
    Subtracting eps leaves the mean unchanged and lowers the variance. With ``weighting: lambda`` G is z - x0_hat, the
    gradient of regression to the predicted image (the form of MVDream); ``uniform`` is score Jacobian chaining. HiFA's
    annealing is one schedule of shape ``sqrt`` for both t_min and t_max; D-SDS's score debiasing is a growing
    ``grad_clip``.
    """

    @dataclass
    class Config(Guidance.Config):
        """Options of SDS."""

        guidance_scale: Schedule = option(
            100.0, "gamma of eps_u + gamma (eps_c - eps_u); SDS on large models needs about 100."
        )
        image_weight: Schedule = option(
            0.0,
            "Weight of HiFA's image-space term w(t) alpha/sigma (rgb - decode(x0_hat)): on the render, or through the "
            "decoder where latents are optimised; needs a decoder call per step.",
            ge=0,
        )

    config: Config

    def score_gradient(self, z: Tensor, conditions: CFGConditions, ctx: StepContext) -> Score:
        """w(t) (eps_hat - eps), and HiFA's image-space term where it has a weight."""
        x_t, eps = self.noised(z, ctx)
        prediction = self.guided(x_t, conditions, ctx)
        score = Score(self.weighted(prediction, z, eps))
        image_weight = self.config.image_weight(ctx.step)
        if image_weight == 0.0:
            return score
        weight = image_weight * regression_weight(self.config.weighting, self.schedule, ctx.t)
        return with_image_term(score, self.prior, z, prediction.x0, ctx, weight)

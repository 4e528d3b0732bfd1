"""Score distillation sampling."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from scoredist3d.config import Schedule, option
from scoredist3d.guidance.core.base import Guidance
from scoredist3d.guidance.core.context import StepContext
from scoredist3d.guidance.core.image_space import with_image_term
from scoredist3d.guidance.core.outputs import Score
from scoredist3d.priors.conditioning import CFGConditions
from scoredist3d.registry import register


@register(
    "guidance",
    "sds",
    summary="Noise-prediction residual of the prior on the noised render, with fresh noise.",
    arxiv="2209.14988",
)
class ScoreDistillationSampling(Guidance):
    """SDS: G = w(t) (eps_hat(alpha_t z + sigma_t eps, t, y) - eps) with fresh eps ~ N(0, I) (DreamFusion, eq. 3).

    SDS minimizes a weighted sum over timesteps of KL(N(alpha_t z, sigma_t^2) || p_t(. | y)), so it seeks modes.
    Subtracting eps does not change the mean of G and reduces its variance. With ``weighting: lambda`` G is z - x0_hat,
    the gradient of regression to the predicted image (the form in MVDream); ``uniform`` is score Jacobian chaining.
    HiFA's annealing corresponds to a single schedule of shape ``sqrt`` for t_min and t_max, and D-SDS's score debiasing
    to an increasing ``grad_clip``.
    """

    @dataclass
    class Config(Guidance.Config):
        """Options of SDS."""

        guidance_scale: Schedule = option(
            100.0, "Guidance scale gamma in eps_u + gamma (eps_c - eps_u); SDS needs about 100 with large models."
        )
        image_weight: Schedule = option(
            0.0,
            "Weight of HiFA's image-space term w(t) alpha/sigma (rgb - decode(x0_hat)), which acts on the render, or "
            "through the decoder if latents are optimized; it requires one decoding per step.",
            ge=0,
        )

    config: Config

    def score_gradient(self, z: Tensor, conditions: CFGConditions, ctx: StepContext) -> Score:
        """Gradient w(t) (eps_hat - eps) and the gradient of HiFA's image-space term."""
        x_t, eps = self.noised(z, ctx)
        prediction = self.guided(x_t, conditions, ctx)
        score = Score(self.weighted(prediction, z, eps))
        image_weight = self.config.image_weight(ctx.step)
        return with_image_term(score, self.prior, z, prediction.x0, ctx, self.config.weighting, image_weight)

"""Score Distillation Sampling."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional

from scoredist3d.config import Schedule, option
from scoredist3d.guidance.base import Guidance, GuidanceStep, Score
from scoredist3d.noise import per_item
from scoredist3d.priors.base import Branches, Prediction
from scoredist3d.registry import register


@register("guidance", "sds", summary="Follow the denoiser's error on a freshly noised render.", arxiv="2209.14988")
class ScoreDistillationSampling(Guidance):
    """G = w(t) (eps_hat(alpha_t z + sigma_t eps, t, y) - eps), eps ~ N(0, I) drawn anew at every step (DreamFusion, eq.
    3).

    Minimises a weighted sum over noise levels of KL(N(alpha_t z, sigma_t^2) || p_t(. | y)), and so seeks modes.
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
            "Weight of HiFA's image-space term w(t) alpha/sigma (rgb - decode(x0_hat)); needs a decoder call per step.",
            ge=0,
        )

    config: Config

    def score_gradient(self, z: Tensor, branches: Branches, step: GuidanceStep) -> Score:
        """w(t) (eps_hat - eps), and HiFA's image-space term where it has a weight."""
        x_t, eps = self.noised(z, step)
        prediction = self.guided(x_t, branches, step)
        return Score(self.weighted(prediction, z, eps), self._image_gradient(prediction, step))

    def _image_gradient(self, prediction: Prediction, step: GuidanceStep) -> Tensor | None:
        """HiFA (arXiv 2305.18766): the same pull as the latent term's, on the decoded prediction, in [0, 1] RGB."""
        weight = self.config.image_weight(step.step)
        if weight == 0.0:
            return None
        if step.rgb is None:
            raise ValueError(
                "guidance.image_weight needs the rendered image, and this system distils latents directly; set it to 0"
            )
        rgb = step.rgb.detach()
        decoded = self.prior.decode(prediction.x0).movedim(-1, 1)
        target = functional.interpolate(
            decoded, rgb.shape[1:3], mode="bilinear", align_corners=False, antialias=True
        ).movedim(1, -1)
        scale = weight * self.time_weight(step.t) / self.schedule.lambda_(step.t)
        return per_item(scale, rgb) * (rgb - target)

"""HiFA: regression to an image that is denoised in a few steps."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from scoredist3d.config import Schedule, option
from scoredist3d.diffusion.schedule import per_item
from scoredist3d.guidance.core.base import Guidance
from scoredist3d.guidance.core.context import StepContext
from scoredist3d.guidance.core.image_space import with_image_term
from scoredist3d.guidance.core.outputs import NFE, Score
from scoredist3d.guidance.core.timesteps import timestep_tensor
from scoredist3d.guidance.core.weighting import Weighting, regression_weight
from scoredist3d.priors.conditioning import CFGConditions
from scoredist3d.registry import register


@register(
    "guidance",
    "hifa",
    summary="Regress latents and pixels to an image that is denoised in a few steps.",
    arxiv="2305.18766",
)
class HiFA(Guidance):
    """HiFA: the gradient of c/2 ||z - z_hat||^2 + lambda_rgb c/2 ||x - decode(z_hat)||^2 with a constant target z_hat.

    z_hat is x_t denoised completely in a few stochastic DDIM steps (eta 1) with classifier-free guidance; SDS predicts
    it in one step. With one step the latent term is SDS: c = w(t) alpha / sigma of the configured ``weighting``, where
    ``lambda`` gives the constant c of the paper and ``uniform`` its "noisematch". The paper anneals one timestep for
    all items, t = t_max - (t_max - t_min) sqrt(step / N): set t_min and t_max to the same schedule of shape ``sqrt``.

    The authors' code takes strides of 1 / denoise_steps of the whole chain, hence fewer steps at lower timesteps; here
    the number of steps is the same at every timestep. The depth and z-variance terms of the paper are losses of the
    scene.
    """

    @dataclass
    class Config(Guidance.Config):
        """Options of HiFA."""

        weight: Schedule = option(0.05, "Weight of both terms, w in the paper.", ge=0)
        guidance_scale: Schedule = option(100.0, "Guidance scale gamma in eps_u + gamma (eps_c - eps_u).")
        weighting: Weighting = option(
            "lambda",
            "Weight c(t) of both terms. lambda: 1 (the paper's constant); uniform: alpha/sigma (its noisematch); sds: "
            "alpha sigma; fantasia3d: alpha^2 sigma; flow: 1/sigma.",
        )
        latent_weight: Schedule = option(1.0, "Weight of the latent term.", ge=0)
        image_weight: Schedule = option(
            0.1,
            "Weight lambda_rgb of the image term, which acts on the render, or through the decoder if latents are "
            "optimized.",
            ge=0,
        )
        denoise_steps: int = option(4, "Number of DDIM steps from x_t to the target.", ge=1)
        eta: float = option(1.0, "Amount of fresh noise in the denoising steps: 1 as in DDPM, 0 for none.", ge=0, le=1)

    config: Config

    def score_gradient(self, z: Tensor, conditions: CFGConditions, ctx: StepContext) -> Score:
        """Latent gradient c (z - z_hat) and the gradient of the image term."""
        target = self.target(self.noised(z, ctx)[0], conditions, ctx)
        c = regression_weight(self.config.weighting, self.schedule, ctx.t)
        score = Score(self._value("latent_weight", ctx.step) * per_item(c, z) * (z - target))
        image_weight = self._value("image_weight", ctx.step)
        return with_image_term(score, self.prior, z, target, ctx, self.config.weighting, image_weight)

    def target(self, x_t: Tensor, conditions: CFGConditions, ctx: StepContext) -> Tensor:
        """Target z_hat (B, C, h, w): every item denoised from its own timestep, all in one batch."""
        trajectories = [
            self.schedule.timesteps(self.config.denoise_steps, start=timestep) for timestep in ctx.timesteps
        ]
        columns = [timestep_tensor(timesteps, x_t) for timesteps in zip(*trajectories, strict=True)]
        for index, (t, s) in enumerate(pairwise(columns[:-1])):
            prediction = self.guided(x_t, conditions, ctx, t=t)
            noise = ctx.noise(x_t, f"hifa/{index}") if self.config.eta > 0.0 else None
            x_t = self.schedule.ddim_step(prediction.eps, prediction.x0, t, s, eta=self.config.eta, noise=noise)
        return self.guided(x_t, conditions, ctx, t=columns[-2]).x0

    def nfe(self, conditions: CFGConditions, ctx: StepContext) -> NFE:
        """One guided prediction per denoising step."""
        return NFE(self.config.denoise_steps * super().nfe(conditions, ctx).prior)

"""Score distillation with a learned manifold corrective."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from scoredist3d.config import Schedule, option
from scoredist3d.diffusion.cfg import guided_and_unconditional
from scoredist3d.diffusion.schedule import per_item
from scoredist3d.guidance.core.base import NFE, Guidance, Score, StepContext
from scoredist3d.guidance.core.corrective import AUTO, load_corrective
from scoredist3d.guidance.core.image_space import regression_weight
from scoredist3d.priors.base import Prior
from scoredist3d.priors.conditioning import CFGConditions
from scoredist3d.registry import register
from scoredist3d.seeding import Rng


@register(
    "guidance",
    "lmc",
    summary="SDS whose pull to natural images is freed from the denoiser's blur by a small trained network.",
    arxiv="2401.05293",
)
class ManifoldCorrective(Guidance):
    """G = w (eps_hat - eps_u) + lambda_lmc w alpha/sigma J^T (zbar - x0_u), zbar = (1 - beta) z + beta b(z, t).

    SDS is the same with beta 0, since eps_u - eps = alpha/sigma (z - x0_u) for the unconditional prediction x0_u: its
    second term pulls z to its one-step denoising, which is blurred the more the larger t is. The frozen corrective b
    (:mod:`scoredist3d.guidance.core.corrective`) imitates that blur, so that b - x0_u points to the natural images and
    a small guidance scale suffices. J is the identity, or with ``jacobian: full`` the derivative of zbar by z.

    The decomposition is exact algebra and b's regression follows the abstract (LMC-SDS). The paper has no public code,
    and what is not settled by its abstract is a choice made here: J, the weight w alpha/sigma (with which the identity
    as b gives SDS), the corrective's size, the blend beta and the defaults. b was trained with the empty prompt, so a
    negative prompt moves x0_u away from what it imitates.
    """

    @dataclass
    class Config(Guidance.Config):
        """Options of LMC."""

        guidance_scale: Schedule = option(
            8.0, "omega, the weight of eps_c - eps_u; far below that of SDS. The paper's value is not known here."
        )
        corrective: str = option(
            AUTO,
            "auto for the one that ships with the embedded prior, a folder written by scripts/train_corrective.py, or "
            "identity for none (SDS).",
        )
        beta: Schedule = option(
            1.0,
            "Share of b(z, t) in what is compared with x0_u: 0 is SDS; ramp it where z starts off as noise.",
            ge=0,
            le=1,
        )
        lambda_lmc: Schedule = option(1.0, "Weight of the pull; 0 is classifier score distillation.", ge=0)
        jacobian: Literal["identity", "full"] = option("identity", "Whether the pull passes through b's Jacobian.")
        remove_mean: bool = option(
            False, "Take the mean over space of each channel out of the pull, so that b's bias cannot shift colours."
        )
        noise: Literal["fresh", "fixed"] = option("fresh", "Noise of each step, or one noise for each particle's run.")

    config: Config

    def __init__(self, config: Config, *, prior: Prior, rng: Rng | None = None) -> None:
        """As the base.

        Raises:
            ValueError: There is no corrective for this prior; see
                :func:`~scoredist3d.guidance.core.corrective.load_corrective`.
        """
        super().__init__(config, prior=prior, rng=rng)
        self.corrective = load_corrective(config.corrective, prior)

    def score_gradient(self, z: Tensor, conditions: CFGConditions, ctx: StepContext) -> Score:
        """The text's direction and the corrected pull, both from one forward pass of the denoiser."""
        x_t, eps = self.noised(z, ctx)
        scale, rescale = self.config.guidance_scale(ctx.step), self.config.guidance_rescale
        guided, unconditional = guided_and_unconditional(self.prior, x_t, ctx.t, conditions, scale, rescale=rescale)
        residual = self.weighted(unconditional, z, eps)  # w alpha/sigma (z - x0_u), without dividing by sigma or alpha
        pull, diagnostics = self._corrected(residual, z, ctx)
        text = self.weighted(guided, z, eps) - residual
        return Score(text + self.config.lambda_lmc(ctx.step) * pull, diagnostics=diagnostics)

    def noised(self, z: Tensor, ctx: StepContext) -> tuple[Tensor, Tensor]:
        """(x_t, eps) with the step's noise or the particle's."""
        if self.config.noise == "fresh":
            return super().noised(z, ctx)
        eps = ctx.particle_noise(z, "lmc")
        return self.schedule.add_noise(z, eps, ctx.t), eps

    def nfe(self, conditions: CFGConditions, ctx: StepContext) -> NFE:
        """Both conditions whatever the scale, and a row of the corrective where it has a share."""
        return NFE(
            2 + len(conditions.negatives), own=int(self.corrective is not None and self.config.beta(ctx.step) > 0.0)
        )

    def _corrected(self, residual: Tensor, z: Tensor, ctx: StepContext) -> tuple[Tensor, dict[str, Tensor]]:
        """w alpha/sigma J^T (zbar - x0_u) from w alpha/sigma (z - x0_u)."""
        pull, diagnostics, beta = residual, {}, self.config.beta(ctx.step)
        full = self.config.jacobian == "full"
        network = self.corrective if beta > 0.0 else None
        if network is not None:
            with torch.set_grad_enabled(full):
                clean = z.clone().requires_grad_(full)
                correction = network(clean, ctx.t) - clean
            weight = regression_weight(self.config.weighting, self.schedule, ctx.t)
            pull = residual + per_item(beta * weight, z) * correction.detach()
            diagnostics["correction_rms"] = correction.detach().square().mean().sqrt()
        mean = pull.mean((-2, -1), keepdim=True)
        diagnostics |= {"pull_rms": pull.square().mean().sqrt(), "pull_mean_rms": mean.square().mean().sqrt()}
        if self.config.remove_mean:
            pull = pull - mean
        if full and network is not None:
            pull = pull + beta * torch.autograd.grad(correction, clean, pull)[0]
        return pull, diagnostics

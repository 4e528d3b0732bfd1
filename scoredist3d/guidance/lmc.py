"""Score distillation with a learned manifold corrective (LMC)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from scoredist3d.config import Schedule, option
from scoredist3d.diffusion.cfg import guided_and_unconditional
from scoredist3d.diffusion.schedule import per_item
from scoredist3d.guidance.core.base import Guidance
from scoredist3d.guidance.core.context import StepContext
from scoredist3d.guidance.core.corrective import AUTO, load_corrective
from scoredist3d.guidance.core.outputs import NFE, Score
from scoredist3d.guidance.core.weighting import regression_weight
from scoredist3d.priors.base import Prior
from scoredist3d.priors.conditioning import CFGConditions
from scoredist3d.registry import register
from scoredist3d.seeding import Rng


@register(
    "guidance",
    "lmc",
    summary="SDS with a small trained network that removes the denoiser's blur from the gradient.",
    arxiv="2401.05293",
)
class ManifoldCorrective(Guidance):
    """LMC: G = w (eps_hat - eps_u) + lambda_lmc w alpha/sigma J^T (zbar - x0_u), zbar = (1 - beta) z + beta b(z, t).

    SDS is the case beta = 0, because eps_u - eps = alpha/sigma (z - x0_u) for the unconditional prediction x0_u. The
    second term of SDS moves z to its one-step denoising, which is blurred, increasingly so at larger t. The frozen
    corrective b (:mod:`scoredist3d.guidance.core.corrective`) imitates that blur. b - x0_u then points to natural
    images, and a small guidance scale suffices. J is the identity or, with ``jacobian: full``, the derivative of zbar
    with respect to z.

    The decomposition is exact, and the regression that trains b follows the abstract (LMC-SDS). The paper has no public
    code. The following choices are ours, since the abstract leaves them open: J, the weight w alpha/sigma (with which
    the identity as b gives SDS), the size of the corrective, the blend factor beta, and the defaults. b was trained
    with the empty prompt; a negative prompt moves x0_u away from the prediction that b imitates.
    """

    @dataclass
    class Config(Guidance.Config):
        """Options of LMC."""

        guidance_scale: Schedule = option(
            8.0,
            "Guidance scale omega, the weight of eps_c - eps_u; far lower than for SDS. The paper's value is unknown "
            "to us.",
        )
        corrective: str = option(
            AUTO,
            "Corrective network. auto: the one trained for the embedded prior; identity: none (SDS); any other value: "
            "a folder written by scripts/train_corrective.py.",
        )
        beta: Schedule = option(
            1.0,
            "Blend factor of b(z, t) in zbar: 0 is SDS; increase it over the first steps if z starts as noise.",
            ge=0,
            le=1,
        )
        lambda_lmc: Schedule = option(1.0, "Weight of the second term; 0 is classifier score distillation.", ge=0)
        jacobian: Literal["identity", "full"] = option(
            "identity", "J. identity: the identity matrix; full: the Jacobian of zbar."
        )
        remove_mean: bool = option(
            False,
            "Subtract the spatial mean of each channel of the second term, so that a bias of b cannot shift colors.",
        )
        noise: Literal["fresh", "fixed"] = option(
            "fresh", "Noise. fresh: new at every step; fixed: constant for each particle."
        )

    config: Config

    def __init__(self, config: Config, *, prior: Prior, rng: Rng | None = None) -> None:
        """Create the method and load the corrective; for the arguments see :class:`Guidance`.

        Raises:
            ValueError: The configured corrective does not exist or does not fit this prior; see
                :func:`~scoredist3d.guidance.core.corrective.load_corrective`.
        """
        super().__init__(config, prior=prior, rng=rng)
        self.corrective = load_corrective(config.corrective, prior)

    def score_gradient(self, z: Tensor, conditions: CFGConditions, ctx: StepContext) -> Score:
        """Guidance direction plus the corrected second term, both from one forward pass of the denoiser."""
        x_t, eps = self.noised(z, ctx)
        scale, rescale = self.config.guidance_scale(ctx.step), self.config.guidance_rescale
        guided, unconditional = guided_and_unconditional(self.prior, x_t, ctx.t, conditions, scale, rescale=rescale)
        residual = self.weighted(unconditional, z, eps)  # w alpha/sigma (z - x0_u), without dividing by sigma or alpha
        pull, diagnostics = self._corrected(residual, z, ctx)
        text = self.weighted(guided, z, eps) - residual
        return Score(text + self.config.lambda_lmc(ctx.step) * pull, diagnostics=diagnostics)

    def noised(self, z: Tensor, ctx: StepContext) -> tuple[Tensor, Tensor]:
        """Noisy latents x_t and their noise eps, which is fresh or fixed for the particle."""
        if self.config.noise == "fresh":
            return super().noised(z, ctx)
        eps = ctx.particle_noise(z, "lmc")
        return self.schedule.add_noise(z, eps, ctx.t), eps

    def nfe(self, conditions: CFGConditions, ctx: StepContext) -> NFE:
        """Both predictions of CFG at any guidance scale, and one evaluation of the corrective if beta is above 0."""
        return NFE(
            2 + len(conditions.negatives), own=int(self.corrective is not None and self.config.beta(ctx.step) > 0.0)
        )

    def _corrected(self, residual: Tensor, z: Tensor, ctx: StepContext) -> tuple[Tensor, dict[str, Tensor]]:
        """Second term w alpha/sigma J^T (zbar - x0_u) from ``residual`` = w alpha/sigma (z - x0_u), and diagnostics."""
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

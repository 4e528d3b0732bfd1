"""Adversarial score distillation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from scoredist3d.config import Schedule, option
from scoredist3d.diffusion.cfg import perpendicular, predict_each
from scoredist3d.diffusion.prediction import Prediction
from scoredist3d.diffusion.schedule import per_item
from scoredist3d.guidance.core.base import NFE, StepContext
from scoredist3d.guidance.core.score_models import matching_output
from scoredist3d.guidance.vsd import VariationalGuidance
from scoredist3d.priors.conditioning import CFGConditions, Conditioning
from scoredist3d.registry import register


@register(
    "guidance",
    "asd",
    summary="VSD whose second network is a full discriminator: it also moves away from the prior's prediction.",
    arxiv="2312.00739",
)
class AdversarialScoreDistillation(VariationalGuidance):
    """VSD's G with phi trained as the optimal discriminator of a Wasserstein GAN:

        L_phi = E || eps_phi - eps ||^2 + gamma || eps_phi - stopgrad(eps_hat(x_t, t, y)) ||^2

    in phi's parametrisation, with the Perp-Neg terms of the prompt in eps_hat but without text guidance. Its minimum is
    eps_phi = (eps_q + gamma eps_hat) / (1 + gamma), where eps_q is VSD's: a negative gamma enlarges the difference
    between the prior and the renders by 1 / (1 + gamma). gamma = 0 is VSD; at -1 there is no minimum, and only the
    early training is of use.

    For a phi that predicts velocities, the second target is the velocity that the prior predicts at x_t. The released
    code takes the one of the render and the predicted noise, alpha eps_hat - sigma z. This pair does not make up x_t,
    so the minimum is another one, eps_q + alpha^2 gamma / (1 + gamma) (eps_hat - eps_q), which enlarges the difference
    by (1 + sigma^2 gamma) / (1 + gamma) only. ``reference_quirk`` is that target.
    """

    @dataclass
    class Config(VariationalGuidance.Config):
        """Options of ASD."""

        gamma: Schedule = option(-0.75, "gamma, the weight of the distance to the prior's prediction.", ge=-1)
        reference_quirk: bool = option(
            False, "Train a phi that predicts velocities as the released code does, on the render's own image."
        )

        def validate(self) -> list[str]:
            """The prior's prediction for old latents would need the prompts of their views."""
            problems = super().validate()
            if self.phi.replay and any(self.gamma.values):
                problems.append("phi.replay: works with gamma 0 only; set it to 0")
            return problems

    config: Config

    def camera_scale(self, step: int) -> float:
        """phi is always told the camera."""
        return 1.0

    def phi_loss(self, prediction: Prediction, z: Tensor, eps: Tensor, conditions: CFGConditions, step: int) -> Tensor:
        """VSD's loss plus gamma times the distance to the prior's conditional prediction."""
        loss = super().phi_loss(prediction, z, eps, conditions, step)
        gamma = self.config.gamma(step)
        if gamma == 0.0:
            return loss
        with torch.no_grad():
            real = self._real(prediction.x_t, prediction.t, conditions)
            clean = z if self.config.reference_quirk and prediction.kind == "v_prediction" else real.x0
            target = matching_output(prediction, clean, real.eps)
        return loss + gamma * (prediction.output - target).square().mean()

    def nfe(self, conditions: CFGConditions, ctx: StepContext) -> NFE:
        """VSD's, and the prior's prediction for every row that phi is trained on."""
        cost = super().nfe(conditions, ctx)
        extra = self.phi_nfe() if self.config.gamma(ctx.step) != 0.0 else 0
        return NFE(cost.prior + extra * (1 + len(conditions.negatives)), cost.own)

    def _real(self, x_t: Tensor, t: Tensor, conditions: CFGConditions) -> Prediction:
        """eps_hat = eps_y + sum_i w_i perp(eps_i, eps_y) over the Perp-Neg prompts i.

        perp(eps_i, eps_y) = perp(eps_i - eps_y, eps_y), so it is formed in the network's own parametrisation.
        """
        repeats = self.config.phi.repeats
        batch = len(x_t) // repeats
        texts = [conditions.positive, *(text for text, _ in conditions.negatives)]
        repeated = [Conditioning.cat([text.expand(batch)] * repeats) for text in texts]
        real, *others = predict_each(self.prior, x_t, t, repeated)
        output = real.output
        for other, (_, weights) in zip(others, conditions.negatives, strict=True):
            away = perpendicular(other.output - real.output, real.eps)
            output = output + per_item(weights.expand(batch).repeat(repeats), away) * away
        return real.with_output(output)

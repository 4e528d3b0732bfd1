"""Adversarial score distillation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from scoredist3d.config import Schedule, option
from scoredist3d.diffusion.cfg import perpendicular, predict_each
from scoredist3d.diffusion.prediction import Prediction
from scoredist3d.diffusion.schedule import per_item
from scoredist3d.guidance.core.context import StepContext
from scoredist3d.guidance.core.outputs import NFE
from scoredist3d.guidance.core.score_models import matching_output
from scoredist3d.guidance.core.variational import VariationalGuidance
from scoredist3d.priors.conditioning import CFGConditions, Conditioning
from scoredist3d.registry import register


@register(
    "guidance",
    "asd",
    summary="VSD as a GAN: the second network is a discriminator that also moves away from the prior's prediction.",
    arxiv="2312.00739",
)
class AdversarialScoreDistillation(VariationalGuidance):
    """ASD: the gradient of VSD, with phi trained as the optimal discriminator of a Wasserstein GAN,

        L_phi = E || eps_phi - eps ||^2 + gamma || eps_phi - stopgrad(eps_hat(x_t, t, y)) ||^2

    in the parametrization of phi's output. Here eps_hat includes the Perp-Neg terms of the prompt but no
    classifier-free guidance. The minimum is eps_phi = (eps_q + gamma eps_hat) / (1 + gamma), where eps_q is the minimum
    of VSD's loss. A negative gamma thus enlarges the difference between the prior and the renders by the factor
    1 / (1 + gamma). gamma = 0 is VSD. At gamma = -1 there is no minimum, and only the early phase of the training is
    useful.

    For a phi that predicts velocities, the second target is the velocity that the prior predicts at x_t. The released
    code instead combines the render and the predicted noise, alpha eps_hat - sigma z. This image and this noise do
    not add up to x_t, so the minimum becomes eps_q + alpha^2 gamma / (1 + gamma) (eps_hat - eps_q), which enlarges the
    difference only by (1 + sigma^2 gamma) / (1 + gamma). ``reference_quirk`` selects that target.
    """

    @dataclass
    class Config(VariationalGuidance.Config):
        """Options of ASD."""

        gamma: Schedule = option(
            -0.75, "Weight of the squared distance of phi to the prior's prediction; 0 is VSD.", ge=-1
        )
        reference_quirk: bool = option(
            False, "For a phi that predicts velocities, use the target of the released code, alpha eps_hat - sigma z."
        )

        def validate(self) -> list[str]:
            """Reject replay: the prior's prediction for replayed latents would need the prompts of their views."""
            problems = super().validate()
            if self.phi.replay and any(self.gamma.values):
                problems.append("phi.replay: needs gamma: 0; set phi.replay to 0")
            return problems

    config: Config

    def camera_scale(self, step: int) -> float:
        """Camera scale 1: phi is always conditioned on the camera."""
        return 1.0

    def phi_loss(self, prediction: Prediction, z: Tensor, eps: Tensor, conditions: CFGConditions, step: int) -> Tensor:
        """Loss of VSD plus gamma times the squared distance to the prior's conditional prediction."""
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
        """Evaluations of VSD, plus one conditional prediction of the prior per training evaluation of phi."""
        vsd = super().nfe(conditions, ctx)
        extra = self.phi_nfe() if self.config.gamma(ctx.step) != 0.0 else 0
        return NFE(vsd.prior + extra * (1 + len(conditions.negatives)), vsd.own)

    def _real(self, x_t: Tensor, t: Tensor, conditions: CFGConditions) -> Prediction:
        """Prediction eps_hat = eps_y + sum_i w_i perp(eps_i, eps_y) over the Perp-Neg prompts i.

        It is computed in the parametrization of the network's output, since perp(eps_i, eps_y) = perp(eps_i - eps_y,
        eps_y).
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

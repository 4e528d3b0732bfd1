"""Adversarial score distillation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from scoredist3d.config import Schedule, option
from scoredist3d.guidance.base import Cost, GuidanceStep
from scoredist3d.guidance.variational import matching_output
from scoredist3d.guidance.vsd import VariationalGuidance
from scoredist3d.priors.base import Branches, Conditioning, Prediction
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

    in phi's parametrisation, without text guidance in eps_hat. Its minimum is eps_phi = (eps_q + gamma eps_hat) / (1 +
    gamma), where eps_q is VSD's: a negative gamma enlarges the difference between the prior and the renders by 1 / (1 +
    gamma). gamma = 0 is VSD; at -1 there is no minimum, and only the early training is of use.
    """

    @dataclass
    class Config(VariationalGuidance.Config):
        """Options of ASD."""

        gamma: Schedule = option(-0.75, "gamma, the weight of the distance to the prior's prediction.", ge=-1)

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

    def phi_loss(self, prediction: Prediction, z: Tensor, eps: Tensor, branches: Branches, step: int) -> Tensor:
        """VSD's loss plus gamma times the distance to the prior's conditional prediction."""
        loss = super().phi_loss(prediction, z, eps, branches, step)
        gamma = self.config.gamma(step)
        if gamma == 0.0:
            return loss
        repeats = self.config.phi.repeats
        real = Conditioning.cat([branches.positive.expand(len(z) // repeats)] * repeats)
        with torch.no_grad():
            other = self.prior.predict(prediction.x_t, prediction.t, real)
            target = matching_output(prediction, other.x0, other.eps)
        return loss + gamma * (prediction.output - target).square().mean()

    def cost(self, branches: Branches, step: GuidanceStep) -> Cost:
        """VSD's, and one row of the prior for every one that phi is trained on."""
        cost = super().cost(branches, step)
        extra = self.phi_rows() if self.config.gamma(step.step) != 0.0 else 0
        return Cost(cost.prior + extra, cost.own)

"""Probability-flow distillation: regression to the end of the sampling ODE through the inverted render."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from scoredist3d.config import option
from scoredist3d.diffusion.schedule import per_item
from scoredist3d.guidance.core.context import StepContext
from scoredist3d.guidance.core.inversion import InversionGuidance
from scoredist3d.guidance.core.outputs import NFE, Score
from scoredist3d.guidance.core.weighting import regression_weight
from scoredist3d.priors.conditioning import CFGConditions
from scoredist3d.registry import register


@register(
    "guidance",
    "pfd",
    summary="SDI whose target is a multi-step solution of the sampling ODE instead of a one-step prediction.",
    arxiv="2605.09071",
)
class ProbabilityFlowDistillation(InversionGuidance):
    """PFD: G = c(t) (z - z_hat), where z_hat is the end of the sampling ODE that starts at the inverted render x_t.

    SDI moves z to the posterior mean x0_hat(x_t), which is one DDIM step from t to the clean image. PFD takes
    ``ode_steps`` DDIM (for flows: Euler) steps with classifier-free guidance; with one step and equal options it is
    SDI. c(t) is w(t) alpha / sigma, and 1 for ``weighting: lambda``. If both ODEs have the same guidance scale and are
    solved exactly, z_hat is z, so that data of the prior stay where they are; SDI contracts them to their mean.

    The inversion stands for the distribution of the renders, which guidance away from the prompt approximates: at
    scale 1 - gamma its prediction is eps_y - gamma (eps_y - eps_u), the guided prediction with exchanged roles.

    The authors have published no code. We know only the abstract and what third parties report of the text: G, the
    scale of the inversion, which has no noise, and a uniform t. The number and the spacing of the steps are ours.
    """

    @dataclass
    class Config(InversionGuidance.Config):
        """Options of PFD."""

        tau_max: float = option(0.0, "Upper bound of the uniformly drawn tau in the inversion to t + tau.", ge=0, lt=1)
        inversion_eta: float = option(0.0, "Strength of the noise that is added to the inversion.", ge=0)
        ode_steps: int = option(10, "Number of steps from t to the target; 1 is SDI.", ge=1)

    config: Config

    def score_gradient(self, z: Tensor, conditions: CFGConditions, ctx: StepContext) -> Score:
        """Gradient c (z - z_hat)."""
        x_t, kappa = self.inverted(z, conditions, ctx)
        c = regression_weight(self.config.weighting, self.schedule, ctx.t)
        gradient = per_item(c, z) * (z - self.target(x_t, conditions, ctx))
        return Score(gradient, diagnostics={"kappa_rms": kappa.square().mean().sqrt()})

    def target(self, x_t: Tensor, conditions: CFGConditions, ctx: StepContext) -> Tensor:
        """Clean latents z_hat (B, C, h, w) at the end of the ODE from x_t."""
        *path, _ = self.schedule.timesteps(self.config.ode_steps, start=ctx.timesteps[0])
        scale, rescale = self._value("guidance_scale", ctx.step), self.config.guidance_rescale
        x = self.walk(x_t, path, conditions, scale, rescale=rescale)
        # The last step ends at the predicted image. The sum alpha x_0 + sigma eps is not finite for all networks.
        return self.predict_at(x, path[-1], conditions, scale, rescale=rescale).x0

    def noisy_input(self, z: Tensor, conditions: CFGConditions, ctx: StepContext) -> Tensor:
        """Inverted latents x_t."""
        return self.inverted(z, conditions, ctx)[0]

    def nfe(self, conditions: CFGConditions, ctx: StepContext) -> NFE:
        """One guided prediction per step of the inversion and of the ODE to the target."""
        target = self.config.ode_steps * self.guided_nfe(conditions, self._value("guidance_scale", ctx.step))
        return NFE(target + self.inversion_nfe(conditions, ctx))

    def default_inversion_scale(self, guidance_scale: float) -> float:
        """1 - guidance_scale, with which prompt and empty prompt exchange their roles."""
        return 1.0 - guidance_scale

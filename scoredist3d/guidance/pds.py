"""Posterior Distillation Sampling."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from scoredist3d.config import Schedule, option
from scoredist3d.diffusion.schedule import per_item
from scoredist3d.guidance.core.base import Score, StepContext, Weighting
from scoredist3d.guidance.core.editing import EditingGuidance
from scoredist3d.priors.base import CFGConditions
from scoredist3d.registry import register


@register(
    "guidance",
    "pds",
    summary="Edit: match the source's stochastic latents, which adds a pull towards the source.",
    arxiv="2311.13831",
    aliases=("posterior-distillation",),
)
class PosteriorDistillation(EditingGuidance):
    """G = psi_t (z - z_src) + chi_t (eps_hat(x_t, y) - eps_hat(x_t_src, y_src)).

    PDS matches zeta = (x_t' - mu(x_t; eps_hat)) / sigma~, the noise of the generative step t -> t', between the edited
    latents and the source, x_t and x_t' being noised equally on both sides. With mu = c0 x0_hat + c1 x_t that is the
    line above, where psi = (alpha_t' - c0 - c1 alpha_t) / sigma~ and chi = c0 sigma_t / (alpha_t sigma~).

    For the posterior of the step t -> t' itself psi is 0, and PDS is DDS weighted by chi. The authors' code goes
    ``stride`` = 2 timesteps down and takes the variance of a single one: that alone makes psi positive (1.61 at t =
    0.021, 0.05 at 0.401 on Stable Diffusion's schedule), the pull at small t that preserves the source's identity.
    Scale, timesteps and weights are those of their code, which takes t from 0.1 to 0.9 for edits that change more.

    ``form: dreamcatalyst`` has that method's weights in place of psi and chi (arXiv 2407.11394), on this prior rather
    than on an instruction-following one: psi = 0.075 exp(t), chi = 0.2 + 0.8 t^(1/e); it lets t fall from 0.9 to 0.2.
    """

    @dataclass
    class Config(EditingGuidance.Config):
        """Options of PDS."""

        guidance_scale: Schedule = option(100.0, "gamma of both predictions; 100 is the authors' for radiance fields.")
        weighting: Weighting = option("uniform", "w(t) before psi and chi, see sds; the authors' is uniform.")
        form: Literal["posterior", "dreamcatalyst"] = option("posterior", "Where psi and chi come from.")
        stride: int = option(
            2, "Timesteps between t and t'; the variance stays that of one, so 1 means psi = 0 and weighted DDS.", ge=1
        )
        identity_weight: Schedule = option(1.0, "Factor of psi, the pull towards the source.", ge=0)

    config: Config

    def score_gradient(self, z: Tensor, conditions: CFGConditions, ctx: StepContext) -> Score:
        """The line above; eps_hat - eps = (z - x0_hat) / lambda keeps its second term finite where alpha is 0."""
        edited, source, _ = self.both(z, conditions, ctx)
        assert ctx.source is not None
        # In float64 on the CPU: psi is a small difference of numbers around 1.
        timesteps = torch.tensor(ctx.timesteps, dtype=torch.float64)
        moved = z - ctx.source
        if self.config.form == "dreamcatalyst":
            psi, chi = 0.075 * timesteps.exp(), 0.2 + 0.8 * timesteps ** (1 / math.e)
            change, factor = edited.eps - source.eps, chi
        else:
            psi, factor = self._posterior(timesteps)
            change = (z - edited.x0) - (ctx.source - source.x0)
        psi = psi * self._value("identity_weight", ctx.step)
        gradient = per_item(psi.to(z.device), z) * moved + per_item(factor.to(z.device), z) * change
        return Score(per_item(self.time_weight(ctx.t), z) * gradient)

    def coefficients(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """(psi, chi) of the posterior form at float64 ``timesteps`` (N,); chi is infinite where alpha is 0."""
        psi, factor = self._posterior(timesteps)
        return psi, factor * self.schedule.lambda_(timesteps)

    def _posterior(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """(psi, chi / lambda) from the schedule.

        q(x_s | x_t, x_0) of a chain with a = alpha_t / alpha_s and beta = sigma_t^2 - a^2 sigma_s^2 has the mean
        (alpha_s beta x_0 + a sigma_s^2 x_t) / sigma_t^2 and the variance beta sigma_s^2 / sigma_t^2: the textbook
        posterior on variance-preserving chains, and as true of flows. As in the authors' code, a and beta are of the
        step from t - 1, the other symbols of t' = t - stride. The lowest timesteps, which have no noisy t' below them,
        take the coefficients of the first that has.
        """
        one = 1.0 / self.schedule.num_train_timesteps
        t = timesteps.clamp_min((self.config.stride + 1) * one)
        alpha_t, sigma_t = self.schedule.coefficients(t)
        alpha_1, sigma_1 = self.schedule.coefficients(t - one)
        alpha_s, sigma_s = self.schedule.coefficients(t - self.config.stride * one)
        a = alpha_t / alpha_1
        beta = sigma_t.square() - (a * sigma_1).square()
        c0, c1 = alpha_s * beta / sigma_t.square(), a * sigma_s.square() / sigma_t.square()
        deviation = (beta * sigma_s.square()).sqrt() / sigma_t
        return (alpha_s - c0 - c1 * alpha_t) / deviation, c0 / deviation

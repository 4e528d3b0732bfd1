"""Variational score distillation."""

from __future__ import annotations

from dataclasses import dataclass

from scoredist3d.config import Schedule, option
from scoredist3d.guidance.core.variational import VariationalGuidance
from scoredist3d.registry import register


@register(
    "guidance",
    "vsd",
    summary="Difference between the prior's score and the score of the renders, which a second network learns.",
    arxiv="2305.16213",
)
class VariationalScoreDistillation(VariationalGuidance):
    """VSD: G = w(t) (eps_hat(x_t, t, y) - eps_phi(x_t, t, c, y)) (ProlificDreamer, eq. 9).

    G is the gradient flow of the KL divergence, at every timestep, from the distribution of the renders of all
    particles to the prior. If phi is the score of a single point, VSD equals SDS. With an exact phi the particles keep
    the spread of the prior, so ordinary guidance scales suffice. The paper anneals the timesteps in two phases:
    ``t_max: {from: 0.98, to: 0.5, end: 5000, shape: step}``.
    """

    @dataclass
    class Config(VariationalGuidance.Config):
        """Options of VSD."""

        gamma_phi: Schedule = option(
            1.0,
            "Camera scale gamma_phi in phi(none) + gamma_phi (phi(c) - phi(none)); 0 and 1 need one evaluation of phi, "
            "other values two.",
        )

    config: Config

    def camera_scale(self, step: int) -> float:
        """The configured ``gamma_phi`` at a step."""
        return self.config.gamma_phi(step)

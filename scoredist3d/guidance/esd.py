"""Entropic score distillation."""

from __future__ import annotations

from dataclasses import dataclass

from scoredist3d.config import Schedule, option
from scoredist3d.guidance.vsd import VariationalGuidance
from scoredist3d.registry import register


@register(
    "guidance",
    "esd",
    summary="VSD with a bonus for views that differ: its second network is told less of the camera.",
    arxiv="2401.00909",
)
class EntropicScoreDistillation(VariationalGuidance):
    """G = w(t) (eps_hat(x_t, t, y) - lambda eps_phi(x_t, t, y) - (1 - lambda) eps_phi(x_t, t, c, y)).

    The first phi is told no camera and so knows the renders from all around together; pushing them away from it
    maximises their entropy over cameras, against one face on every side. lambda = 0 is VSD; it is the camera scale
    1 - lambda of phi.
    """

    @dataclass
    class Config(VariationalGuidance.Config):
        """Options of ESD."""

        entropy: Schedule = option(
            0.5,
            "lambda, the share of phi that is told no camera; 0 is VSD, which takes one call of phi less.",
            ge=0,
            le=1,
        )

    config: Config

    def camera_scale(self, step: int) -> float:
        """1 - lambda."""
        return 1.0 - self.config.entropy(step)

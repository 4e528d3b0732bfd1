"""Entropic score distillation."""

from __future__ import annotations

from dataclasses import dataclass

from scoredist3d.config import Schedule, option
from scoredist3d.guidance.core.variational import VariationalGuidance
from scoredist3d.registry import register


@register(
    "guidance",
    "esd",
    summary="VSD with an entropy term over views: the second network also predicts without a camera.",
    arxiv="2401.00909",
)
class EntropicScoreDistillation(VariationalGuidance):
    """ESD: G = w(t) (eps_hat(x_t, t, y) - lambda eps_phi(x_t, t, y) - (1 - lambda) eps_phi(x_t, t, c, y)).

    Without a camera, eps_phi is the score of the renders of all views together. Moving away from it maximizes the
    entropy of the renders over the cameras, which counteracts the Janus problem. This is VSD with the camera scale
    1 - lambda; lambda = 0 is VSD itself.
    """

    @dataclass
    class Config(VariationalGuidance.Config):
        """Options of ESD."""

        entropy: Schedule = option(
            0.5,
            "Weight lambda of phi without a camera; 0 is VSD, which saves one evaluation of phi.",
            ge=0,
            le=1,
        )

    config: Config

    def camera_scale(self, step: int) -> float:
        """Camera scale 1 - lambda at a step."""
        return 1.0 - self.config.entropy(step)

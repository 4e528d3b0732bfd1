"""Delta denoising score."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from scoredist3d.config import Schedule, option
from scoredist3d.guidance.core.context import StepContext
from scoredist3d.guidance.core.editing import EditingGuidance
from scoredist3d.guidance.core.outputs import Score
from scoredist3d.guidance.core.weighting import Weighting
from scoredist3d.priors.conditioning import CFGConditions
from scoredist3d.registry import register


@register(
    "guidance",
    "dds",
    summary="Edit: difference of the SDS gradients of the edited image and the source, with equal noise.",
    arxiv="2304.07090",
    aliases=("delta-denoising",),
)
class DeltaDenoising(EditingGuidance):
    """DDS: G = w(t) (eps_hat(alpha z + sigma eps, t, y) - eps_hat(alpha z_src + sigma eps, t, y_src)).

    Both predictions use the same eps and t. The source is a good image of its own text, so its SDS gradient is the
    error of SDS. Subtracting it from the gradient of the edited latents leaves the difference between the texts. Start
    the optimization from the source. For two Gaussians of equal covariance, the fixed point is z_src + (m_y - m_src), a
    pure translation of the source. Equal texts at z = z_src give exactly 0.
    """

    @dataclass
    class Config(EditingGuidance.Config):
        """Options of DDS; the defaults are those of the authors' code."""

        guidance_scale: Schedule = option(7.5, "Guidance scale gamma of both predictions.")
        t_min: Schedule = option(0.05, "Lowest timestep, as a fraction of the prior's range.", ge=0, le=1)
        t_max: Schedule = option(0.949, "Highest timestep, as a fraction of the prior's range.", ge=0, le=1)
        weighting: Weighting = option(
            "uniform", "Weight w(t) of the difference, with the same choices as for sds; the authors use uniform."
        )

    config: Config

    def score_gradient(self, z: Tensor, conditions: CFGConditions, ctx: StepContext) -> Score:
        """SDS gradient of the edited latents minus that of the source."""
        edited, source, eps = self.both(z, conditions, ctx)
        assert ctx.source is not None
        return Score(self.weighted(edited, z, eps) - self.weighted(source, ctx.source, eps))

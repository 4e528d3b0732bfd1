"""Delta Denoising Score."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from scoredist3d.config import Schedule, option
from scoredist3d.guidance.core.base import Score, StepContext, Weighting
from scoredist3d.guidance.core.editing import EditingGuidance
from scoredist3d.priors.base import CFGConditions
from scoredist3d.registry import register


@register(
    "guidance",
    "dds",
    summary="Edit: the prompt's SDS less the source's, same noise.",
    arxiv="2304.07090",
    aliases=("delta-denoising",),
)
class DeltaDenoising(EditingGuidance):
    """G = w(t) (eps_hat(alpha z + sigma eps, t, y) - eps_hat(alpha z_src + sigma eps, t, y_src)).

    The same eps and t on both sides: the error that SDS makes on the source, which is a good image of its own text, is
    taken off that on the edited latents, and what is left is the difference between the texts. Start from the source.
    For two Gaussians of one spread the fixed point is z_src + (m_y - m_src), the source moved and otherwise untouched.
    Equal texts at z = z_src give exactly 0.
    """

    @dataclass
    class Config(EditingGuidance.Config):
        """Options of DDS; the timestep range, the scale and the constant w are the authors'."""

        guidance_scale: Schedule = option(7.5, "gamma of both predictions.")
        t_min: Schedule = option(0.05, "Lowest timestep, as a share of the model's.", ge=0, le=1)
        t_max: Schedule = option(0.949, "Highest timestep, as a share of the model's.", ge=0, le=1)
        weighting: Weighting = option("uniform", "w(t) before the difference, see sds; the authors' is uniform.")

    config: Config

    def score_gradient(self, z: Tensor, conditions: CFGConditions, ctx: StepContext) -> Score:
        """SDS of the edited latents less SDS of the source."""
        edited, source, eps = self.both(z, conditions, ctx)
        assert ctx.source is not None
        return Score(self.weighted(edited, z, eps) - self.weighted(source, ctx.source, eps))

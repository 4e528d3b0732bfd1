"""Shared base of editing methods: predictions for the edited and the source latents with the same noise."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from scoredist3d.config import option
from scoredist3d.diffusion.prediction import Prediction
from scoredist3d.guidance.core.base import Guidance
from scoredist3d.guidance.core.context import StepContext
from scoredist3d.guidance.core.outputs import NFE
from scoredist3d.guidance.core.prompting import warn_of_unknown_words
from scoredist3d.priors.conditioning import CFGConditions, Conditioning
from scoredist3d.prompts.processor import ExtraPrompt


class EditingGuidance(Guidance):
    """Base class of editing methods, which compare the predictions for the edited latents and for the source.

    The first is conditioned on the prompt, the second on the description of the source.
    """

    needs_source = True

    @dataclass
    class Config(Guidance.Config):
        """Options that editing methods share."""

        source_prompt: str = option(
            "",
            "Description of the source. Repeat the words of the prompt for everything that should stay the same; if "
            "empty, the source prediction is conditioned on no text other than view words.",
        )

    config: Config

    def extra_prompts(self, prompt: str) -> dict[str, ExtraPrompt]:
        """Extra text ``source``, which gets the same view words as the prompt."""
        text = self.config.source_prompt
        warn_of_unknown_words(
            self.prior, "source_prompt", text, "describe the source in words that the prior was trained on"
        )
        return {"source": ExtraPrompt(text)}

    def nfe(self, conditions: CFGConditions, ctx: StepContext) -> NFE:
        """Two guided predictions."""
        return NFE(2 * self.guided_nfe(conditions, self._value("guidance_scale", ctx.step)))

    def both(self, z: Tensor, conditions: CFGConditions, ctx: StepContext) -> tuple[Prediction, Prediction, Tensor]:
        """Guided predictions for edited and source latents with equal noise, and the noise; one forward pass."""
        if ctx.source is None:
            raise ValueError(f"{type(self).__name__} edits a source: the step context has no source; set ctx.source")
        eps = ctx.noise(z)
        t = ctx.t.repeat(2)
        x_t = self.schedule.add_noise(torch.cat([z, ctx.source.detach()]), eps.repeat(2, 1, 1, 1), t)
        joint = self.guided(x_t, _side_by_side(conditions, conditions.extra["source"], len(z)), ctx, t=t)
        edited, source = (
            Prediction(output, joint.kind, x, ctx.t, self.schedule)
            for output, x in zip(joint.output.chunk(2), x_t.chunk(2), strict=True)
        )
        return edited, source, eps


def _side_by_side(conditions: CFGConditions, source: Conditioning, batch: int) -> CFGConditions:
    """CFG conditions for 2 B items: the prompt for the first half, the source prompt for the second half."""

    def join(first: Conditioning, second: Conditioning) -> Conditioning:
        return Conditioning.cat([first.expand(batch), second.expand(batch)])

    return CFGConditions(
        join(conditions.positive, source),
        join(conditions.unconditional, conditions.unconditional),
        negatives=tuple((join(text, text), weights.expand(batch).repeat(2)) for text, weights in conditions.negatives),
    )

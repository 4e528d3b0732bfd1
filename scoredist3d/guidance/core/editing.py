"""What methods share that edit: the source and the edited latents, judged by one forward pass with one noise."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from scoredist3d.config import option
from scoredist3d.guidance.core.base import Cost, Guidance, GuidanceStep
from scoredist3d.guidance.core.prompting import warn_of_unknown_words
from scoredist3d.priors.base import Branches, Conditioning, Prediction
from scoredist3d.prompts.processor import ExtraPrompt


class EditingGuidance(Guidance):
    """Compares the edited latents under the prompt with the source's under a description of the source."""

    needs_source = True

    @dataclass
    class Config(Guidance.Config):
        """What the source shows."""

        source_prompt: str = option(
            "",
            "What the source shows, in the words of the prompt as far as nothing should change; the empty text says "
            "nothing about it.",
        )

    config: Config

    def extra_prompts(self, prompt: str) -> dict[str, ExtraPrompt]:
        """``source``, with the prompt's view words."""
        text = self.config.source_prompt
        warn_of_unknown_words(self.prior, "source_prompt", text, "describe the source in words that it knows")
        return {"source": ExtraPrompt(text)}

    def cost(self, branches: Branches, step: GuidanceStep) -> Cost:
        """Two guided predictions."""
        return Cost(2 * self.guided_rows(branches, self._value("guidance_scale", step.step)))

    def both(self, z: Tensor, branches: Branches, step: GuidanceStep) -> tuple[Prediction, Prediction, Tensor]:
        """Guided predictions for the edited and for the source latents, noised with the same eps, and that eps."""
        if step.source is None:
            raise ValueError(f"{type(self).__name__} needs the source's latents")
        eps = step.noise(z)
        t = step.t.repeat(2)
        x_t = self.schedule.add_noise(torch.cat([z, step.source.detach()]), eps.repeat(2, 1, 1, 1), t)
        joint = self.guided(x_t, _side_by_side(branches, branches.extra["source"], len(z)), step, t=t)
        edited, source = (
            Prediction(output, joint.kind, x, step.t, self.schedule)
            for output, x in zip(joint.output.chunk(2), x_t.chunk(2), strict=True)
        )
        return edited, source, eps


def _side_by_side(branches: Branches, source: Conditioning, batch: int) -> Branches:
    """Branches for 2 B items: the prompt for the first half, the source's text for the second."""

    def join(first: Conditioning, second: Conditioning) -> Conditioning:
        return Conditioning.cat([first.expand(batch), second.expand(batch)])

    return Branches(
        join(branches.positive, source),
        join(branches.unconditional, branches.unconditional),
        negatives=tuple((join(text, text), weights.expand(batch).repeat(2)) for text, weights in branches.negatives),
    )

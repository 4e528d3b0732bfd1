"""Noise-Free Score Distillation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from scoredist3d.config import Schedule, option
from scoredist3d.diffusion.cfg import perp_neg, predict_each
from scoredist3d.diffusion.schedule import per_item
from scoredist3d.guidance.core.base import NFE, Guidance, Score, StepContext
from scoredist3d.guidance.core.prompting import empty_of, warn_of_unknown_words
from scoredist3d.priors.conditioning import CFGConditions
from scoredist3d.prompts.processor import ExtraPrompt
from scoredist3d.registry import register


@register(
    "guidance", "nfsd", summary="The prompt's direction plus a correction towards good images.", arxiv="2310.17590"
)
class NoiseFreeScoreDistillation(Guidance):
    """G = w(t) (delta_D + gamma (eps_y - eps_0)), with eps_y and eps_0 under the prompt and under the empty one.

    delta_D, the correction that brings an unlikely image into the model's domain, is eps_0 itself below the threshold
    timestep 0.2, where the prediction holds little noise, and eps_0 - eps_neg above it, the negative prompt standing for
    what is wrong with a render. No injected noise remains in G, so that an ordinary scale of 7.5 suffices. G jumps at
    the threshold. An empty negative prompt makes it the classifier score above.
    """

    @dataclass
    class Config(Guidance.Config):
        """Options of NFSD; scale, threshold and words are the paper's."""

        guidance_scale: Schedule = option(7.5, "gamma before eps_y - eps_0.")
        threshold: float = option(0.2, "Level from which the negative prompt makes the correction.", ge=0, le=1)
        negative_prompt: str | None = option(
            "unrealistic, blurry, low quality, out of focus, ugly, low contrast, dull, dark, low-resolution, gloomy",
            "What is wrong with a render, without view words; null takes the run's own negative_prompt.",
        )

    config: Config

    def extra_prompts(self, prompt: str) -> dict[str, ExtraPrompt]:
        """``undesired``, the negative prompt where it is this method's own."""
        text = self.config.negative_prompt
        if text is None:
            return {}
        warn_of_unknown_words(self.prior, "negative_prompt", text, "set it to words that it knows, or to an empty text")
        return {"undesired": ExtraPrompt(text, view_words=False)}

    def nfe(self, conditions: CFGConditions, ctx: StepContext) -> NFE:
        """The empty prompt; prompt and Perp-Neg's where the scale is not 0; the negative one where an item needs it."""
        guided = 1 + len(conditions.negatives) if self._value("guidance_scale", ctx.step) != 0.0 else 0
        return NFE(1 + guided + self._corrects(ctx))

    def score_gradient(self, z: Tensor, conditions: CFGConditions, ctx: StepContext) -> Score:
        """The correction and the direction, from one forward pass."""
        x_t, _ = self.noised(z, ctx)
        scale = self._value("guidance_scale", ctx.step)
        conditionings = [empty_of(conditions)]
        if self._corrects(ctx):
            conditionings.append(conditions.extra.get("undesired", conditions.unconditional))
        if scale != 0.0:
            conditionings += [conditions.positive, *(text for text, _ in conditions.negatives)]
        empty, *others = [prediction.eps for prediction in predict_each(self.prior, x_t, ctx.t, conditionings)]
        total = empty
        if self._corrects(ctx):
            noisy = torch.tensor([timestep >= self.config.threshold for timestep in ctx.timesteps]).to(z.device)
            total = torch.where(noisy[:, None, None, None], empty - others.pop(0), empty)
        if scale != 0.0:
            positive, *away = others
            direction = positive - empty
            if away:
                direction = direction + perp_neg(
                    positive, away, [weights for _, weights in conditions.negatives], empty
                )
            total = total + scale * direction
        return Score(per_item(self.time_weight(ctx.t), z) * total)

    def _corrects(self, ctx: StepContext) -> bool:
        """Whether any item is noisy enough to need the negative prompt."""
        return max(ctx.timesteps) >= self.config.threshold

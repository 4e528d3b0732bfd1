"""Noise-free score distillation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from scoredist3d.config import Schedule, option
from scoredist3d.diffusion.cfg import perp_neg, predict_each
from scoredist3d.diffusion.schedule import per_item
from scoredist3d.guidance.core.base import Guidance
from scoredist3d.guidance.core.context import StepContext
from scoredist3d.guidance.core.outputs import NFE, Score
from scoredist3d.guidance.core.prompting import empty_of, warn_of_unknown_words
from scoredist3d.priors.conditioning import CFGConditions
from scoredist3d.prompts.processor import ExtraPrompt
from scoredist3d.registry import register


@register(
    "guidance",
    "nfsd",
    summary="Prompt direction plus a correction towards realistic images, without injected noise.",
    arxiv="2310.17590",
)
class NoiseFreeScoreDistillation(Guidance):
    """NFSD: G = w(t) (delta_D + gamma (eps_y - eps_0)), with predictions for the prompt (y) and the empty prompt (0).

    delta_D is a correction that brings an unlikely image into the prior's domain. Below the threshold timestep 0.2,
    where the prediction contains little noise, it is eps_0. Above, it is eps_0 - eps_neg, where the negative prompt
    describes the defects of a render. G contains no injected noise, so an ordinary scale of 7.5 suffices. G is
    discontinuous at the threshold. With an empty negative prompt, G above the threshold is that of classifier score
    distillation.
    """

    @dataclass
    class Config(Guidance.Config):
        """Options of NFSD; the default guidance scale, threshold and negative prompt are those of the paper."""

        guidance_scale: Schedule = option(7.5, "Guidance scale gamma, the weight of eps_y - eps_0.")
        threshold: float = option(0.2, "Lowest timestep at which the correction uses the negative prompt.", ge=0, le=1)
        negative_prompt: str | None = option(
            "unrealistic, blurry, low quality, out of focus, ugly, low contrast, dull, dark, low-resolution, gloomy",
            "Description of a defective render, without view words; null uses the run's negative_prompt.",
        )

    config: Config

    def extra_prompts(self, prompt: str) -> dict[str, ExtraPrompt]:
        """Extra text ``undesired``: this method's own negative prompt, if set."""
        text = self.config.negative_prompt
        if text is None:
            return {}
        warn_of_unknown_words(
            self.prior, "negative_prompt", text, "set it to words that the prior was trained on, or to an empty text"
        )
        return {"undesired": ExtraPrompt(text, view_words=False)}

    def nfe(self, conditions: CFGConditions, ctx: StepContext) -> NFE:
        """One evaluation for each text that the step needs.

        These are the empty prompt, the negative prompt if an item reaches the threshold, and, unless the guidance
        scale is 0, the prompt and the prompts of Perp-Neg.
        """
        guided = 1 + len(conditions.negatives) if self._value("guidance_scale", ctx.step) != 0.0 else 0
        return NFE(1 + guided + self._corrects(ctx))

    def score_gradient(self, z: Tensor, conditions: CFGConditions, ctx: StepContext) -> Score:
        """Gradient w(t) (delta_D + gamma (eps_y - eps_0)), with all predictions from one forward pass."""
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
        """Whether the timestep of any item reaches the threshold, so that the negative prompt is needed."""
        return max(ctx.timesteps) >= self.config.threshold

"""Score distillation as a bridge between image distributions (SDS-Bridge)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from scoredist3d.config import Schedule, option
from scoredist3d.diffusion.cfg import predict_each
from scoredist3d.diffusion.samplers import solve_ode
from scoredist3d.diffusion.schedule import per_item
from scoredist3d.guidance.core.base import Guidance
from scoredist3d.guidance.core.context import StepContext
from scoredist3d.guidance.core.outputs import NFE, Score
from scoredist3d.guidance.core.prompting import warn_of_unknown_words
from scoredist3d.guidance.core.weighting import Weighting, time_weight
from scoredist3d.priors.conditioning import CFGConditions, Conditioning
from scoredist3d.prompts.processor import ExtraPrompt
from scoredist3d.registry import register


@register(
    "guidance",
    "bridge",
    summary="SDS first, then the direction from a description of the render's defects to the prompt.",
    arxiv="2406.09417",
)
class Bridge(Guidance):
    """SDS-Bridge: stage one is SDS towards the prompt; stage two, from ``stage_two_start_step`` on, is

        G = w2(t) w (eps_hat(x_t, y_target) - eps_hat(x_t, y_source)),

    without classifier-free guidance and without the injected noise, where w is ``stage_two_weight`` and w2(t) is
    ``stage_two_weighting``. It is the one-step form of a dual diffusion bridge between two image distributions, each
    described by a text: from images with the defects of the renders after stage one to good images that match the
    prompt. The texts are

        y_target = prompt + target_modifier,    y_source = source_prompt, or prompt + source_modifier.

    For two Gaussians of equal covariance, G is a constant drift. Stage two therefore has no fixed point and must be
    short. ``path: full`` solves the whole bridge (arXiv 2203.08382): z is inverted to timestep t with the source text
    and sampled back with the target text to z', and G = w (z - z'). Use it at the end of an optimization, with
    decreasing timesteps. To edit an image, start from it with ``stage_two_start_step: 0`` and describe it as the
    source.
    """

    @dataclass
    class Config(Guidance.Config):
        """Options of SDS-Bridge; the defaults are those of the authors' code for radiance fields."""

        guidance_scale: Schedule = option(
            100.0, "Guidance scale of stage one (SDS); the authors use 100 in 3D and 40 in 2D."
        )
        stage_two_start_step: int = option(
            20000,
            "First step of stage two; 0 skips stage one. The paper uses 20000 of 25000 in 3D, and 500 of 2500 in 2D.",
            ge=0,
        )
        stage_two_weight: Schedule = option(1.0, "Weight w of stage two; the paper uses 1 in 3D and 25 in 2D.", ge=0)
        stage_two_weighting: Weighting = option(
            "uniform", "Weight w2(t) of stage two, with the same choices as weighting; the authors' 2D code uses sds."
        )
        target_modifier: str = option(
            ", .",
            "Text appended to the prompt in both stages; the authors' 2D code appends ', detailed high resolution, "
            "high quality, sharp' in stage two only.",
        )
        source_modifier: str = option(
            ", oversaturated, smooth, pixelated, cartoon, foggy, hazy, blurry, bad structure, noisy, malformed",
            "Text appended to the prompt to describe the result of stage one.",
        )
        source_modifier_only: bool = option(False, "Use source_modifier alone as the source text, without the prompt.")
        source_prompt: str | None = option(None, "Complete source text, which replaces the prompt and source_modifier.")
        path: Literal["one-step", "full"] = option(
            "one-step",
            "Form of stage two. one-step: one prediction per text; full: the full bridge, by inversion and sampling.",
        )
        path_steps: int = option(10, "ODE steps of the inversion and of the sampling, for path=full.", ge=1)

        def validate(self) -> list[str]:
            """Reject two conflicting descriptions of the source."""
            problems = super().validate()
            if self.source_prompt is not None and self.source_modifier_only:
                problems.append("source_modifier_only: has no effect with source_prompt; remove one of the two")
            return problems

    config: Config

    def extra_prompts(self, prompt: str) -> dict[str, ExtraPrompt]:
        """Extra text ``source``, and ``target`` if it differs from the prompt; both get the prompt's view words."""
        advice = "set source_prompt or source_modifier to words that the prior was trained on"
        source = self.config.source_prompt
        if source is None:
            source = self.config.source_modifier
            warn_of_unknown_words(self.prior, "source_modifier", source, advice)
            source = source.lstrip(" ,") if self.config.source_modifier_only else prompt + source
        else:
            warn_of_unknown_words(self.prior, "source_prompt", source, advice)
        texts = {"source": ExtraPrompt(source)}
        if self.config.target_modifier:
            advice = "set it to words that the prior was trained on, or to an empty text"
            warn_of_unknown_words(self.prior, "target_modifier", self.config.target_modifier, advice)
            texts["target"] = ExtraPrompt(prompt + self.config.target_modifier)
        return texts

    def nfe(self, conditions: CFGConditions, ctx: StepContext) -> NFE:
        """Evaluations of SDS in stage one; two in stage two, or one per ODE step for the full path."""
        if self._in_stage_one(ctx):
            return super().nfe(conditions, ctx)
        return NFE(2 if self.config.path == "one-step" else 2 * self.config.path_steps)

    def score_gradient(self, z: Tensor, conditions: CFGConditions, ctx: StepContext) -> Score:
        """SDS in stage one, the bridge in stage two; the stage depends on the step only."""
        conditions = replace(conditions, positive=conditions.extra.get("target", conditions.positive))
        if self._in_stage_one(ctx):
            x_t, eps = self.noised(z, ctx)
            return Score(self.weighted(self.guided(x_t, conditions, ctx), z, eps))
        source = conditions.extra["source"]
        weight = self._value("stage_two_weight", ctx.step)
        if self.config.path == "full":
            return Score(weight * (z - self._transported(z, source, conditions.positive, ctx)))
        x_t, _ = self.noised(z, ctx)
        target, origin = predict_each(self.prior, x_t, ctx.t, [conditions.positive, source])
        w2 = time_weight(self.config.stage_two_weighting, self.schedule, ctx.t)
        return Score(weight * per_item(w2, z) * (target.eps - origin.eps))

    def _in_stage_one(self, ctx: StepContext) -> bool:
        return ctx.step < self.config.stage_two_start_step

    def _transported(self, z: Tensor, source: Conditioning, target: Conditioning, ctx: StepContext) -> Tensor:
        """Latents z after inversion to each item's timestep with the source text and sampling with the target text."""
        ends = []
        for items, timestep in ctx.runs():
            under_source, under_target = (self._under(text, items, len(z)) for text in (source, target))
            down = self.schedule.timesteps(self.config.path_steps, start=timestep)
            up = down[-2::-1]
            # No noise prediction is defined at the clean image, so the first step uses the prediction at its end point.
            lowest = z.new_full((len(z[items]),), up[0])
            eps, _ = under_source(per_item(self.schedule.alpha(lowest), z) * z[items], lowest)
            noisy = solve_ode(self.schedule, under_source, self.schedule.add_noise(z[items], eps, lowest), up)
            ends.append(solve_ode(self.schedule, under_target, noisy, down))
        return torch.cat(ends)

    def _under(self, text: Conditioning, items: slice, batch: int) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Function (x_t, t) -> (eps, x_0): the unguided prediction for a text, for some items of the batch."""
        chosen = text.expand(batch)[items]

        def predict(x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
            prediction = self.prior.predict(x_t, t, chosen)
            return prediction.eps, prediction.x0

        return predict

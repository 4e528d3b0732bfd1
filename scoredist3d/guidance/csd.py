"""Classifier score distillation."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from scoredist3d.config import Schedule, option
from scoredist3d.diffusion.cfg import perp_neg, predict_each
from scoredist3d.diffusion.schedule import per_item
from scoredist3d.guidance.core.base import Guidance
from scoredist3d.guidance.core.context import StepContext
from scoredist3d.guidance.core.outputs import NFE, Score
from scoredist3d.guidance.core.prompting import empty_of
from scoredist3d.priors.conditioning import CFGConditions, Conditioning
from scoredist3d.registry import register

_COEFFICIENTS = ("c_y", "c_n", "c_0")


@register(
    "guidance",
    "csd",
    summary="Follow only the score of the implicit classifier, eps_y - eps_0.",
    arxiv="2310.19415",
    aliases=("classifier-sd",),
)
class ClassifierScoreDistillation(Guidance):
    """CSD: G = w(t) (c_y eps_y + c_n eps_neg + c_0 eps_0 + c_eps eps); all four coefficients are schedules.

    eps_y, eps_neg and eps_0 are the predictions for the prompt, the negative prompt of the run and the empty prompt;
    eps is the added noise. Texts with coefficient 0 are not evaluated. Settings of (c_y, c_n, c_0, c_eps):

    * (1, 0, -1, 0), the default: -grad log p(y | x_t), which dominates SDS at large scales.
    * (w1, -w2, w2 - w1, 0): the paper's w1 (eps_y - eps_0) + w2 (eps_0 - eps_neg). The authors' code increases w2 from
      0 to 1 over 5000 steps in the coarse stage (c_n 0 -> -1, c_0 -1 -> 0) and decreases it from 1 to 0.5 over 10000
      steps in the refinement stage (c_n -1 -> -0.5, c_0 0 -> -0.5). It uses ``weighting: uniform`` with a pixel-space
      model and ``sds`` with a latent one.
    * (gamma, 0, 1 - gamma, -1): SDS with guidance scale gamma.

    Perp-Neg adds ``perp_neg_weight`` sum_i w_i perp(eps_i - eps_neg, eps_y - eps_neg). As in the authors' code these
    directions are relative to the negative prompt, regardless of the coefficients.
    """

    @dataclass
    class Config(Guidance.Config):
        """Options of CSD."""

        guidance_scale: Schedule = option(
            7.5, "Guidance scale of previews; the gradient uses the coefficients instead."
        )
        c_y: Schedule = option(1.0, "Coefficient of the prediction for the prompt.")
        c_n: Schedule = option(
            0.0,
            "Coefficient of the prediction for the run's negative_prompt, or for the empty prompt if there is none.",
        )
        c_0: Schedule = option(-1.0, "Coefficient of the prediction for the empty prompt.")
        c_eps: Schedule = option(0.0, "Coefficient of the added noise.")
        perp_neg_weight: Schedule = option(
            3.0,
            "Weight of the Perp-Neg terms, which are relative to the negative prompt; the authors' code uses 3.",
            ge=0,
        )

    config: Config

    def nfe(self, conditions: CFGConditions, ctx: StepContext) -> NFE:
        """One evaluation per text with a nonzero coefficient; Perp-Neg also needs the prompt and negative prompts."""
        return NFE(len(self._needed(conditions, ctx.step)))

    def score_gradient(self, z: Tensor, conditions: CFGConditions, ctx: StepContext) -> Score:
        """Weighted sum of the predictions, from one forward pass."""
        x_t, eps = self.noised(z, ctx)
        needed = self._needed(conditions, ctx.step)
        predictions = predict_each(self.prior, x_t, ctx.t, list(needed.values())) if needed else []
        found = dict(zip(needed, (prediction.eps for prediction in predictions), strict=True))
        total = self._value("c_eps", ctx.step) * eps
        for name in _COEFFICIENTS:
            if name in found:
                total = total + self._value(name, ctx.step) * found[name]
        if "away 0" in needed:
            away = [found[f"away {index}"] for index in range(len(conditions.negatives))]
            term = perp_neg(found["c_y"], away, [weights for _, weights in conditions.negatives], found["c_n"])
            total = total + self._value("perp_neg_weight", ctx.step) * term
        return Score(per_item(self.time_weight(ctx.t), z) * total)

    def _needed(self, conditions: CFGConditions, step: int) -> dict[str, Conditioning]:
        """Conditionings to evaluate at this step, by coefficient name; Perp-Neg prompts are named ``away <index>``."""
        texts = dict(
            zip(_COEFFICIENTS, (conditions.positive, conditions.unconditional, empty_of(conditions)), strict=True)
        )
        avoids = bool(conditions.negatives) and self._value("perp_neg_weight", step) != 0.0
        always = {"c_y", "c_n"} if avoids else set()
        needed = {name: text for name, text in texts.items() if name in always or self._value(name, step) != 0.0}
        if avoids:
            needed |= {f"away {index}": text for index, (text, _) in enumerate(conditions.negatives)}
        return needed

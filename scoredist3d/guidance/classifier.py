"""Classifier Score Distillation."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from scoredist3d.config import Schedule, option
from scoredist3d.diffusion.schedule import per_item
from scoredist3d.guidance.core.base import Cost, Guidance, GuidanceStep, Score
from scoredist3d.guidance.core.prompting import empty_of
from scoredist3d.priors.base import Branches, Conditioning, perp_neg, predict_branches
from scoredist3d.registry import register

_NETWORK = ("c_y", "c_n", "c_0")


@register(
    "guidance", "classifier-sd", summary="Follow the implicit classifier eps_y - eps_0 alone.", arxiv="2310.19415"
)
class ClassifierScoreDistillation(Guidance):
    """G = w(t) (c_y eps_y + c_n eps_neg + c_0 eps_0 + c_eps eps), all four coefficients schedules.

    eps_y, eps_neg and eps_0 are the predictions under the prompt, the run's negative prompt and the empty one; eps is
    the noise that was added. Only branches with a coefficient are evaluated. Known settings of (c_y, c_n, c_0, c_eps):

    * (1, 0, -1, 0), the default: -grad log p(y | x_t), the part of SDS that does the work at large scales.
    * (w1, -w2, w2 - w1, 0): the paper's w1 (eps_y - eps_0) + w2 (eps_0 - eps_neg). Its code lets w2 rise from 0 to 1
      over 5000 steps in the coarse stage (c_n 0 -> -1, c_0 -1 -> 0) and fall from 1 to 0.5 over 10000 in the refinement
      (c_n -1 -> -0.5, c_0 0 -> -0.5), with ``weighting: uniform`` on a pixel model and ``sds`` on a latent one.
    * (gamma, 0, 1 - gamma, -1): SDS with scale gamma.

    With Perp-Neg, sum_i w_i perp(eps_i - eps_neg, eps_y - eps_neg) is added, times ``perp_neg_weight``. As in the
    authors' code these directions are relative to the negative prompt, whatever the coefficients are.
    """

    @dataclass
    class Config(Guidance.Config):
        """The coefficients."""

        guidance_scale: Schedule = option(7.5, "Scale of previews; the gradient is made of the coefficients instead.")
        c_y: Schedule = option(1.0, "Coefficient of the prediction under the prompt.")
        c_n: Schedule = option(0.0, "Coefficient of that under the run's negative_prompt (the empty one without).")
        c_0: Schedule = option(-1.0, "Coefficient of that under the empty prompt.")
        c_eps: Schedule = option(0.0, "Coefficient of the noise that was added.")
        perp_neg_weight: Schedule = option(
            3.0, "Factor of Perp-Neg's terms, relative to the negative prompt; 3 is the authors' code's.", ge=0
        )

    config: Config

    def cost(self, branches: Branches, step: GuidanceStep) -> Cost:
        """One row per branch with a coefficient; Perp-Neg's prompts need those of the prompt and the negative one."""
        return Cost(len(self._needed(branches, step.step)))

    def score_gradient(self, z: Tensor, branches: Branches, step: GuidanceStep) -> Score:
        """The weighted sum, from one forward pass."""
        x_t, eps = self.noised(z, step)
        needed = self._needed(branches, step.step)
        predictions = predict_branches(self.prior, x_t, step.t, list(needed.values())) if needed else []
        found = dict(zip(needed, (prediction.eps for prediction in predictions), strict=True))
        total = self._value("c_eps", step.step) * eps
        for name in _NETWORK:
            if name in found:
                total = total + self._value(name, step.step) * found[name]
        if "away 0" in needed:
            away = [found[f"away {index}"] for index in range(len(branches.negatives))]
            term = perp_neg(found["c_y"], away, [weights for _, weights in branches.negatives], found["c_n"])
            total = total + self._value("perp_neg_weight", step.step) * term
        return Score(per_item(self.time_weight(step.t), z) * total)

    def _needed(self, branches: Branches, step: int) -> dict[str, Conditioning]:
        """The texts to evaluate in this step, by coefficient."""
        texts = dict(zip(_NETWORK, (branches.positive, branches.unconditional, empty_of(branches)), strict=True))
        avoids = bool(branches.negatives) and self._value("perp_neg_weight", step) != 0.0
        always = {"c_y", "c_n"} if avoids else set()
        needed = {name: text for name, text in texts.items() if name in always or self._value(name, step) != 0.0}
        if avoids:
            needed |= {f"away {index}": text for index, (text, _) in enumerate(branches.negatives)}
        return needed

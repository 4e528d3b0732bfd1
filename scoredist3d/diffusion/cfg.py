"""Classifier-free guidance, Perp-Neg and rescaling: predictions under several conditionings and their combination."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from scoredist3d.diffusion.denoiser import C, Denoiser, GuidanceConditions, GuidedDenoiser
from scoredist3d.diffusion.prediction import Prediction
from scoredist3d.diffusion.schedule import per_item


def predict_each(denoiser: Denoiser[C], x_t: Tensor, t: Tensor, conditionings: Sequence[C]) -> list[Prediction]:
    """The predictions at one (x_t, t) under several conditionings, from one batched forward pass."""
    batch, count = len(x_t), len(conditionings)
    expanded = [conditioning.expand(batch) for conditioning in conditionings]
    joined = expanded[0].cat(expanded)
    prediction = denoiser.predict(x_t.repeat(count, *[1] * (x_t.ndim - 1)), t.repeat(count), joined)
    outputs = prediction.output.chunk(count)
    return [Prediction(output, prediction.kind, x_t, t, denoiser.schedule) for output in outputs]


def guided_prediction(
    denoiser: GuidedDenoiser[C],
    x_t: Tensor,
    t: Tensor,
    conditions: GuidanceConditions[C],
    scale: float,
    *,
    rescale: float = 0.0,
) -> Prediction:
    """Classifier-free guidance, eps_u + scale (eps_c - eps_u), from one batched forward pass.

    Scale 1 evaluates the positive condition only, and scale 0 the unconditional one only. With
    ``conditions.negatives``, the direction is that of Perp-Neg (arXiv 2304.04968): e_pos + sum_i w_i perp(e_i, e_pos),
    where each e is relative to the unconditional prediction. The weights of every combination sum to 1 at a fixed
    (x_t, t). Combining the network's outputs is therefore equivalent to combining eps, x_0 or v.

    Args:
        denoiser: The denoiser.
        x_t: (B, C, h, w).
        t: (B,) in [0, 1].
        conditions: The conditionings to combine.
        scale: Guidance scale gamma, in the convention of diffusers.
        rescale: Weight in [0, 1] of the guided x_0 rescaled to the standard deviation of the positive prediction's x_0
            (arXiv 2305.08891, section 3.4, in the x_0 form of MVDream), per group of jointly denoised views.
    """
    if scale == 0.0:
        return predict_each(denoiser, x_t, t, [conditions.unconditional])[0]
    if scale == 1.0 and not conditions.negatives:
        return predict_each(denoiser, x_t, t, [conditions.positive])[0]
    return guided_and_unconditional(denoiser, x_t, t, conditions, scale, rescale=rescale)[0]


def guided_and_unconditional(
    denoiser: GuidedDenoiser[C],
    x_t: Tensor,
    t: Tensor,
    conditions: GuidanceConditions[C],
    scale: float,
    *,
    rescale: float = 0.0,
) -> tuple[Prediction, Prediction]:
    """The guided and the unconditional prediction from one forward pass, without the shortcuts for scales 0 and 1.

    The arguments are those of :func:`guided_prediction`.
    """
    negatives = [conditioning for conditioning, _ in conditions.negatives]
    conditionings = [conditions.positive, conditions.unconditional, *negatives]
    positive, unconditional, *others = predict_each(denoiser, x_t, t, conditionings)
    guided = unconditional.output + scale * (positive.output - unconditional.output)
    if others:
        weights = [weights for _, weights in conditions.negatives]
        outputs = [other.output for other in others]
        guided = guided + scale * perp_neg(positive.output, outputs, weights, unconditional.output)
    prediction = positive.with_output(guided)
    if rescale > 0.0:
        prediction = _rescaled(prediction, positive, rescale, denoiser.views)
    return prediction, unconditional


def perp_neg(positive: Tensor, others: Sequence[Tensor], weights: Sequence[Tensor], reference: Tensor) -> Tensor:
    """The term sum_i w_i perp(e_i - e_r, e_y - e_r) that Perp-Neg (arXiv 2304.04968) adds to the direction e_y - e_r.

    Args:
        positive: (B, C, h, w), the prediction e_y under the prompt.
        others: Predictions e_i under the negative prompts, (B, C, h, w) each; at least one.
        weights: (B,) each, negative numbers.
        reference: (B, C, h, w), the prediction e_r that directions are relative to.
    """
    direction = positive - reference
    terms = [
        per_item(w, other) * perpendicular(other - reference, direction)
        for other, w in zip(others, weights, strict=True)
    ]
    return sum(terms[1:], start=terms[0])


def perpendicular(a: Tensor, b: Tensor) -> Tensor:
    """The component of ``a`` orthogonal to ``b``, per item: a - <a, b> / <b, b> b."""
    dims = tuple(range(1, a.ndim))
    along = (a * b).sum(dims, keepdim=True) / b.square().sum(dims, keepdim=True).clamp_min(torch.finfo(b.dtype).tiny)
    return a - along * b


def _rescaled(guided: Prediction, positive: Prediction, weight: float, views: int) -> Prediction:
    """The guided x_0 blended with its rescaled version; see ``rescale`` of :func:`guided_prediction`."""

    def standard_deviation(x: Tensor) -> Tensor:
        return x.reshape(len(x) // views, -1).std(dim=1).repeat_interleave(views)

    ratio = standard_deviation(positive.x0) / standard_deviation(guided.x0)
    return guided.with_output(guided.x0 * per_item(weight * ratio + (1.0 - weight), guided.x0), "sample")

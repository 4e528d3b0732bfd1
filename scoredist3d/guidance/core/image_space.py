"""HiFA's image-space term: regression of the pixels to the decoded predicted image (arXiv 2305.18766)."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from scoredist3d.diffusion.schedule import per_item
from scoredist3d.guidance.core.context import StepContext
from scoredist3d.guidance.core.outputs import Score
from scoredist3d.guidance.core.weighting import Weighting, regression_weight
from scoredist3d.priors.base import Prior


def with_image_term(
    score: Score, prior: Prior, z: Tensor, x0: Tensor, ctx: StepContext, weighting: Weighting, image_weight: float
) -> Score:
    """Add the gradient of image_weight c(t) / 2 ||x - stopgrad(decode(x0))||^2, with x in [0, 1] RGB.

    If the step has a render, x is the render, and the decoded image is resized to its resolution. A system that
    optimizes latents has no render; x is then decode(z), and the gradient passes through the decoder.

    Args:
        score: Score of the latent term.
        prior: Prior whose decoder is used.
        z: (B, C, h, w), detached latents of the step.
        x0: (B, C, h, w), predicted clean latents.
        ctx: Context of the step, with or without ``rgb``.
        weighting: Weighting of the latent term, which gives c(t); see
            :func:`~scoredist3d.guidance.core.weighting.regression_weight`.
        image_weight: Weight of the term; at 0 the score is returned unchanged.
    """
    if image_weight == 0.0:
        return score
    weight = image_weight * regression_weight(weighting, prior.schedule, ctx.t)
    target = prior.decode(x0).clamp(0.0, 1.0)
    if ctx.rgb is not None:
        rgb = ctx.rgb.detach()
        return replace(score, rgb_gradient=per_item(weight, rgb) * (rgb - resized(target, rgb)))
    with torch.enable_grad():
        leaf = z.detach().requires_grad_()
        image = prior.decode(leaf)
        (gradient,) = torch.autograd.grad(image, leaf, per_item(weight, image) * (image.detach() - target))
    return replace(score, gradient=score.gradient + gradient)


def resized(image: Tensor, like: Tensor) -> Tensor:
    """``image`` (B, h, w, 3) resized to the height and width of ``like`` (B, H, W, 3)."""
    if image.shape[1:3] == like.shape[1:3]:
        return image
    resized = functional.interpolate(
        image.movedim(-1, 1), like.shape[1:3], mode="bilinear", align_corners=False, antialias=True
    )
    return resized.movedim(1, -1)

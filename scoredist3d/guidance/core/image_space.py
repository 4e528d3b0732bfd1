"""HiFA's image-space term: the same pull towards the predicted image, on pixels (arXiv 2305.18766)."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from scoredist3d.diffusion.schedule import NoiseSchedule, per_item
from scoredist3d.guidance.core.base import Score, Weighting
from scoredist3d.guidance.core.context import StepContext
from scoredist3d.priors.base import Prior


def regression_weight(weighting: Weighting, schedule: NoiseSchedule, t: Tensor) -> Tensor:
    """(B,), the c(t) for which c (z - x0_hat) is w(t) (eps_hat - eps): w(t) alpha / sigma, finite where alpha is 0."""
    alpha, sigma = schedule.coefficients(t)
    return {
        "sds": alpha * sigma,
        "uniform": alpha / sigma,
        "fantasia3d": alpha.square() * sigma,
        "lambda": torch.ones_like(alpha),
        "flow": 1.0 / sigma,
    }[weighting]


def with_image_term(score: Score, prior: Prior, z: Tensor, x0: Tensor, ctx: StepContext, weight: Tensor) -> Score:
    """Add the gradient of weight/2 ||x - stopgrad(decode(x0))||^2, x in [0, 1] RGB.

    x is the render where the step has one, at its own size. A system that optimises latents has none; there x is
    decode(z), and the gradient goes back through the decoder.

    Args:
        score: What the latent term gives.
        prior: Decodes.
        z: (B, C, h, w), the detached latents of the step.
        x0: (B, C, h, w), the predicted clean latents.
        ctx: The step, with or without ``rgb``.
        weight: (B,).
    """
    target = prior.decode(x0).clamp(0.0, 1.0)
    if ctx.rgb is not None:
        rgb = ctx.rgb.detach()
        return replace(score, rgb_gradient=per_item(weight, rgb) * (rgb - _resized(target, rgb)))
    with torch.enable_grad():
        leaf = z.detach().requires_grad_()
        image = prior.decode(leaf)
        (gradient,) = torch.autograd.grad(image, leaf, per_item(weight, image) * (image.detach() - target))
    return replace(score, gradient=score.gradient + gradient)


def _resized(image: Tensor, like: Tensor) -> Tensor:
    if image.shape[1:3] == like.shape[1:3]:
        return image
    resized = functional.interpolate(
        image.movedim(-1, 1), like.shape[1:3], mode="bilinear", align_corners=False, antialias=True
    )
    return resized.movedim(1, -1)

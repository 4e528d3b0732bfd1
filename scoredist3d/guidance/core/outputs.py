"""Results of one distillation step: the score of a method, its network evaluations, and the surrogate loss."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class Score:
    """Gradient that a method computes for one step; all tensors are detached.

    Attributes:
        gradient: (B, C, h, w), dL/dz of each item; the base class clips it and divides it by the batch size.
        rgb_gradient: (B, H, W, 3), gradient of an image-space term with respect to ``StepContext.rgb``.
        diagnostics: Further values to log.
        opacity_gradient: (B, H, W, 1), gradient of the image-space term with respect to ``StepContext.opacity``.
        normal_gradient, depth_gradient: (B, H, W, 3) and (B, H, W, 1), gradients with respect to ``StepContext.normal``
            and ``StepContext.depth``.
    """

    gradient: Tensor
    rgb_gradient: Tensor | None = None
    diagnostics: dict[str, Tensor] = field(default_factory=dict)
    opacity_gradient: Tensor | None = None
    normal_gradient: Tensor | None = None
    depth_gradient: Tensor | None = None


@dataclass(frozen=True)
class NFE:
    """Number of network evaluations of one step, per image of the batch.

    Attributes:
        prior: Evaluations of the frozen denoiser: 2 for one prediction with classifier-free guidance. The number
            is fractional if only some images of the batch need a prediction.
        own: Evaluations of networks that the method owns, including those for their training.
    """

    prior: float
    own: int = 0


@dataclass(frozen=True)
class GuidanceOutput:
    """Loss of one step and values to log.

    Attributes:
        loss: Scalar whose gradient with respect to z is the method's gradient divided by the batch size.
        diagnostics: Detached one-element tensors, still on their device.
    """

    loss: Tensor
    diagnostics: dict[str, Tensor]


def surrogate_loss(x: Tensor, gradient: Tensor) -> Tensor:
    """Scalar with the value sum ||G||^2 / (2 B), whose gradient with respect to ``x`` is G / B."""
    along = ((x - x.detach()) * gradient).sum()
    return (along + 0.5 * gradient.square().sum()) / len(x)

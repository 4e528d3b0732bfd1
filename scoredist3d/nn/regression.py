"""Fitting of features to a target function at random points."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from scoredist3d.seeding import Rng


def fit_features(
    predict: Callable[[Tensor], Tensor],
    target: Callable[[Tensor], Tensor],
    parameters: Sequence[nn.Parameter],
    points: Callable[[torch.Generator, int], Tensor],
    rng: Rng,
    *,
    steps: int = 300,
    lr: float = 0.02,
    batch_size: int = 2048,
) -> float:
    """Fit ``predict`` to ``target`` by least squares, with Adam and a cosine-decayed learning rate.

    Args:
        predict: Maps (N, 3) points to (N, F), differentiable in ``parameters``.
        target: Maps (N, 3) points to target values (N, F); not differentiated.
        parameters: The parameters to fit, updated in place; their ``grad`` is unchanged.
        points: Maps a generator and N to (N, 3) points; called at every step.
        rng: Random streams for the points. Only streams shared by all ranks are used, so that the ranks stay in sync.
        steps: Number of optimizer steps.
        lr: Initial learning rate.
        batch_size: Number of points N per step.

    Returns:
        Root mean square error at new points after the last step.
    """
    device, stream = parameters[0].device, rng.shared()
    optimizer = torch.optim.Adam(parameters, lr=lr, betas=(0.9, 0.99), eps=1e-15)

    def squared_error(step: int) -> Tensor:
        where = points(stream("fit", step, device), batch_size)
        with torch.no_grad():
            wanted = target(where)
        return (predict(where) - wanted).square().mean()

    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        with torch.enable_grad():
            gradients = torch.autograd.grad(squared_error(step), parameters, allow_unused=True)
        held = [parameter.grad for parameter in parameters]
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
        for parameter, before in zip(parameters, held, strict=True):
            parameter.grad = before
    with torch.no_grad():
        return math.sqrt(float(squared_error(steps)))

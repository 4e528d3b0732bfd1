"""Regression of a geometry's outputs onto those of the object that it starts from."""

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
    """Move ``parameters`` so that ``predict`` becomes ``target`` (least squares, Adam with a cosine-decayed rate).

    Args:
        predict: (N, 3) points to (N, F), differentiable in ``parameters``.
        target: (N, 3) points to the (N, F) wanted there; not differentiated.
        parameters: What is moved, in place; their ``grad`` is left as it was.
        points: Generator and N to (N, 3) points to look at, fresh in each step.
        rng: The same on every rank gives the same result on every rank; only its shared streams are used.
        steps: Optimiser steps.
        lr: Learning rate at the start.
        batch_size: N.

    Returns:
        Root mean square error over fresh points at the end.
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

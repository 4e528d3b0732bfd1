"""Training a system in Python, without a run folder, checkpoints or Lightning."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from scoredist3d.seeding import Rng
from scoredist3d.systems.base import System
from scoredist3d.training.metrics import MetricBuffer
from scoredist3d.training.optimizer import build_optimizer, set_learning_rates

CHECK_EVERY = 10
"""Number of steps between two checks for non-finite values, on devices where a check has to wait for results."""


def fit(
    system: System,
    *,
    steps: int,
    seed: int = 0,
    device: torch.device | str | None = None,
    on_step: Callable[[int, Mapping[str, float]], Any] | None = None,
) -> None:
    """Optimize a system in place.

    With the same configuration and seed, the result equals that of a run on one device in float32 without gradient
    clipping and accumulation, provided that the system was built with ``rng=Rng(seed)``.

    Args:
        system: A new system, e.g. from :func:`scoredist3d.build`.
        steps: Number of optimizer steps.
        seed: Seed of all random numbers drawn during training.
        device: Device to which the system is moved first; None leaves the system where it is.
        on_step: Called after each step with the step number (from 0) and the logged values, such as ``loss``.

    Raises:
        NonFiniteError: A loss is NaN or infinite.
    """
    if device is not None:
        system.to_device(torch.device(device))
    rng, buffer = Rng(seed), MetricBuffer()
    settings = system.config.optimizer
    optimizer = build_optimizer(settings, system.parameter_groups())
    every = 1 if on_step is not None or system.device.type == "cpu" else CHECK_EVERY
    for step in range(steps):
        set_learning_rates(optimizer, settings, step)
        system.prepare_step(step, rng)
        result = system.training_step(step, rng)
        buffer.add(step, {"loss": result.loss, **result.scalars})
        if (step + 1) % every == 0:
            buffer.mean_row()
        optimizer.zero_grad(set_to_none=True)
        result.loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        system.post_backward(step, optimizer, rng)
        if on_step is not None:
            on_step(step, dict(buffer.latest))
    buffer.fetch()
    system.check_finite()

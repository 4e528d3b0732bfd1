"""Betas (noise variances per step) of variance-preserving chains in diffusers' scheduler configurations."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def scheduler_betas(config: Mapping[str, Any]) -> Tensor:
    """Betas (N,) in float64 of a diffusers scheduler configuration.

    Raises:
        ValueError: Unknown ``beta_schedule``.
    """
    if config.get("trained_betas") is not None:
        return torch.as_tensor(config["trained_betas"], dtype=torch.float64)
    steps = int(config.get("num_train_timesteps", 1000))
    start, end = float(config.get("beta_start", 1e-4)), float(config.get("beta_end", 0.02))
    name = config.get("beta_schedule", "linear")
    if name == "linear":
        return torch.linspace(start, end, steps, dtype=torch.float64)
    if name == "scaled_linear":
        return torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64).square()
    if name == "squaredcos_cap_v2":
        u = torch.linspace(0.0, 1.0, steps + 1, dtype=torch.float64)
        abar = torch.cos((u + 0.008) / 1.008 * math.pi / 2).square()
        return (1.0 - abar[1:] / abar[:-1]).clamp_max(0.999)
    raise ValueError(f"unknown beta_schedule {name!r}; use linear, scaled_linear or squaredcos_cap_v2")


def zero_terminal_snr(abar: Tensor) -> Tensor:
    """``abar`` (N,) with sqrt(abar) rescaled to zero SNR at the last timestep (arXiv 2305.08891, algorithm 1)."""
    root = abar.sqrt()
    first, last = root[0], root[-1]
    return ((root - last) * first / (first - last)).square()

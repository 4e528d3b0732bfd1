"""A tiny surface estimator with random weights, which finds the object in every pixel."""

from __future__ import annotations

from pathlib import Path

import torch

from scoredist3d.procedural.surface_estimator import SurfaceEstimator

LEVEL = 0.3125  # in scene units; exact in the half precision of the file


def random_estimator() -> SurfaceEstimator:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return SurfaceEstimator((8, 8)).requires_grad_(False)


def write_opaque_estimator(folder: Path) -> str:
    """Write the estimator to ``folder``, and return the option with which it is selected."""
    network = random_estimator()
    network.head.bias[16:20] = 20.0  # logit of the opacity, one bias for each of the 2x2 pixels of a block
    network.save(folder)
    return str(folder)


def write_level_estimator(folder: Path) -> str:
    """Write an estimator that finds the object in every pixel, at the distance of the origin plus :data:`LEVEL`.

    The expected error is the least one.
    """
    network = random_estimator()
    network.head.weight.zero_()
    # Seven maps with a bias for each of the 2x2 pixels of a block: normal, depth, logit of the opacity, log errors.
    network.head.bias.copy_(torch.tensor([0.0, 0.0, 1.0, LEVEL, 20.0, -20.0, -20.0]).repeat_interleave(4))
    network.save(folder)
    return str(folder)

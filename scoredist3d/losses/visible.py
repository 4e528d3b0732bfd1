"""Random points on the surface that is visible in a render."""

from __future__ import annotations

import torch
from torch import Tensor

from scoredist3d.renderers.base import Render


def visible_positions(render: Render, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Positions of random covered pixels, all with the same probability, without synchronizing with the device.

    Args:
        render: The views, with the map ``position``.
        count: Number of points N.
        generator: Random generator on the device of the render.

    Returns:
        (N, 3) world points, and whether any pixel is covered, as a boolean scalar; if none is, the points are
        meaningless.
    """
    position = render.get("position").reshape(-1, 3)
    # Draw covered pixels by searching in the cumulative count of covered pixels. Unlike nonzero(), this does not
    # synchronize with the device.
    covered = (render.opacity.reshape(-1) > 0.5).cumsum(0)
    draw = torch.rand(count, generator=generator, device=covered.device, dtype=torch.float64)
    chosen = torch.searchsorted(covered, (draw * covered[-1]).long(), right=True).clamp_max(len(covered) - 1)
    return position[chosen], covered[-1] > 0

"""Noise that persists over the steps for each particle: constant, slowly renewed, or cropped from a world map."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from scoredist3d.cameras import Cameras
from scoredist3d.config import Schedule
from scoredist3d.guidance.core.context import StepContext

WORLD_MAP_ANGLE = 180.0
"""Default azimuth range of a view in a world map, in degrees (FSD)."""


class PersistentNoise:
    """Gaussian noise of each particle that follows X_{k+1} = sqrt(1 - g_k) X_k + sqrt(g_k) xi_k over the steps k.

    At g = 0 the noise is constant. X_k depends on (seed, stream, particle, k) only. Ranks therefore agree, a particle
    may skip steps, and a resumed run needs no saved state. The chain is sampled at every ``BLOCK``-th step, and
    between two known steps by bisection with its Gaussian bridge: if a and b are the correlations of a middle step
    with its lower and upper neighbor, the noise of the middle step, given both neighbors, has the mean
    (a (1 - b^2) X_low + b (1 - a^2) X_high) / (1 - a^2 b^2) and the variance (1 - a^2)(1 - b^2) / (1 - a^2 b^2).
    """

    BLOCK = 4096
    """Spacing of the grid, in steps; bisection inside a block takes at most 12 levels."""

    def __init__(self, rate: Schedule) -> None:
        """Tabulate the correlations of the chain.

        Args:
            rate: Schedule of g over the steps, in [0, 1).
        """
        self._rate = rate
        log_kept = [0.0]
        for step in range(rate.end):
            log_kept.append(log_kept[-1] + 0.5 * math.log1p(-rate(step)))
        self._log_kept = log_kept

    def __call__(self, ctx: StepContext, like: Tensor, stream: str) -> Tensor:
        """Noise X at the current step, in the shape of ``like`` (B, ...), for the particle that each item shows."""
        return self.along(ctx.step, lambda at: ctx.particle_noise(like, f"{stream}@{at}" if at else stream))

    def along(self, step: int, draw: Callable[[int], Tensor]) -> Tensor:
        """X at ``step``, a linear combination of the draws.

        Because it is linear, ``draw`` may also return a linear function of Gaussian noise; the result is then that
        function of X.

        Args:
            step: Optimizer step.
            draw: The draw of a step of the grid or of a bisection; step 0 is X_0.
        """
        low, x_low = 0, draw(0)
        if max(self._rate.values) == 0.0:
            return x_low
        while low + self.BLOCK <= step:
            x_low = self._forward(x_low, low, low + self.BLOCK, draw(low + self.BLOCK))
            low += self.BLOCK
        if low == step:
            return x_low
        high = low + self.BLOCK
        x_high = self._forward(x_low, low, high, draw(high))
        while True:
            middle = (low + high) // 2
            x_middle = self._between(x_low, x_high, low, middle, high, draw(middle))
            if middle == step:
                return x_middle
            if middle < step:
                low, x_low = middle, x_middle
            else:
                high, x_high = middle, x_middle

    def _log_correlation(self, low: int, high: int) -> float:
        """Logarithm of the product of sqrt(1 - g_k) over low <= k < high."""

        def log_kept(step: int) -> float:
            last = len(self._log_kept) - 1
            beyond = max(step - last, 0) * 0.5 * math.log1p(-self._rate(last))
            return self._log_kept[min(step, last)] + beyond

        return log_kept(high) - log_kept(low)

    def _forward(self, x: Tensor, low: int, high: int, noise: Tensor) -> Tensor:
        log_correlation = self._log_correlation(low, high)
        return math.exp(log_correlation) * x + math.sqrt(-math.expm1(2.0 * log_correlation)) * noise

    def _between(self, x_low: Tensor, x_high: Tensor, low: int, middle: int, high: int, noise: Tensor) -> Tensor:
        log_a, log_b = self._log_correlation(low, middle), self._log_correlation(middle, high)
        lost_a, lost_b, lost = (-math.expm1(2.0 * log) for log in (log_a, log_b, log_a + log_b))
        if lost == 0.0:
            return x_low
        mean = (math.exp(log_a) * lost_b * x_low + math.exp(log_b) * lost_a * x_high) / lost
        return mean + math.sqrt(lost_a * lost_b / lost) * noise


def world_map_shape(height: int, width: int, angle: float) -> tuple[int, int]:
    """Size (rows, columns) of a world map whose ``height`` x ``width`` windows span ``angle`` degrees of azimuth.

    The columns cover the full circle. The rows have room for a window centered on each pole.
    """
    return int(180.0 / angle * height) + height, int(360.0 / angle * width)


def world_map_noise(
    draw: Callable[[Tensor, str], Tensor],
    like: Tensor,
    cameras: Cameras | None,
    angle: float,
    opacity: Tensor | None = None,
) -> Tensor:
    """Noise of the views of an object from a world map, with noise of its own in the background.

    Args:
        draw: Gaussian noise in the shape of its first argument; the second one names the noise, ``world`` for the map
            and ``background``.
        like: (B, C, h, w), latents of the views.
        cameras: B views, or None; see :func:`world_map_crop`.
        angle: Azimuth range of a view in the map, in degrees.
        opacity: (B, H, W, 1), opacity of the renders; without it the whole image shows the map.

    Returns:
        (B, C, h, w) noise.
    """
    height, width = like.shape[-2:]
    world = draw(like.new_empty(*like.shape[:2], *world_map_shape(height, width, angle)), "world")
    n = world_map_crop(world, cameras, height, width)
    return n if opacity is None else torch.where(covered(opacity, like), n, draw(like, "background"))


def world_map_crop(world: Tensor, cameras: Cameras | None, height: int, width: int) -> Tensor:
    """Windows of a world map seen by the cameras (FSD, arXiv 2405.10988); nearby views see shifted windows.

    The window moves right as the azimuth increases and down as the elevation decreases, so a map cell moves in
    the image as the front of the object does. Shifts are whole cells: nothing is interpolated, and every value stays
    N(0, 1). The columns are periodic. The rows cover elevations from 90 to -90 degrees without the discontinuity at 0
    in the authors' later code.

    Args:
        world: (B, C, rows, columns), one map per item; see :func:`world_map_shape`.
        cameras: B views; without cameras every item is seen from the front at elevation 0.
        height, width: Size of the windows, in cells.

    Returns:
        (B, C, height, width) noise.
    """
    count, _, rows, columns = world.shape
    if cameras is None:
        azimuth = elevation = world.new_zeros(count)
    else:
        azimuth, elevation = cameras.azimuth, cameras.elevation
    column = torch.round(azimuth.double() / (2.0 * math.pi) * columns).long()
    row = torch.round((0.5 - elevation.double() / math.pi) * (rows - height)).long().clamp(0, rows - height)
    i = row[:, None] + torch.arange(height, device=world.device)
    j = (column[:, None] + torch.arange(width, device=world.device)) % columns
    items = torch.arange(count, device=world.device)[:, None, None]
    return world[items, :, i[:, :, None], j[:, None, :]].movedim(-1, 1)


def covered(opacity: Tensor, like: Tensor) -> Tensor:
    """Mask (B, 1, h, w) of the cells of ``like`` in which the mean of ``opacity`` (B, H, W, 1) is at least 0.5."""
    return functional.adaptive_avg_pool2d(opacity.detach().movedim(-1, 1), (like.shape[-2], like.shape[-1])) >= 0.5
